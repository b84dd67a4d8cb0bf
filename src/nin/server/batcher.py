"""Dynamic batching: one thread classifies the images of all requests that wait, together."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

import torch
from torch import Tensor

from nin.inference.classifier import INFERENCE_BATCH_SIZE, Classifier

T = TypeVar("T")


class FullError(Exception):
    """The queue is full."""


@dataclasses.dataclass(eq=False)
class _QueuedImages:
    """The images of a request in the queue.

    Attributes:
        classifier: of the images.
        pixels: uint8 (N, C, H, W).
        maps: their class maps; set by the first of a batch for all others in it.
    """

    classifier: Classifier
    pixels: Tensor
    maps: Tensor | None = None


class Batcher:
    """A thread that computes one thing after the other.

    A single thread, because two computations at once take longer than one after the other, and because a batch is
    what makes many small requests fast. No request waits for a batch to fill: it holds what has come in the meantime.
    Where a batch fails, each of its images is classified in its own turn, so nobody gets the error of another.

    Args:
        max_queued: calls that may wait for their turn.
    """

    def __init__(self, *, max_queued: int) -> None:
        self.batches = 0  # computed so far; tests see by it what was computed together
        self._max_queued = max_queued
        self._queue: list[object] = []  # a `_QueuedImages`, or an object that stands for another call
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nin-batcher")

    @property
    def queued(self) -> int:
        """Number of calls that wait."""
        return len(self._queue)

    def classify(self, classifier: Classifier, pixels: Tensor) -> Future[Tensor]:
        """Return the class maps of images, uint8 (N, C, H, W); raises `FullError` where the queue is full."""
        images = _QueuedImages(classifier, pixels)
        return self._enqueue(images, lambda: self._classify_batch(images))

    def compute(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in its turn; raises `FullError` where the queue is full."""
        return self._enqueue(object(), function)

    def stop(self) -> None:
        """End the thread; what still waits is cancelled."""
        self._thread.shutdown(cancel_futures=True)

    def _enqueue(self, call: object, function: Callable[[], T]) -> Future[T]:
        def begin() -> T:
            self._dequeue(call)
            return function()

        with self._lock:
            if len(self._queue) >= self._max_queued:
                raise FullError
            self._queue.append(call)
            future = self._thread.submit(begin)
        # a future that its client cancelled never runs, and would take a place in the queue for ever
        future.add_done_callback(lambda _: self._dequeue(call))
        return future

    def _dequeue(self, call: object) -> None:
        with self._lock:
            if call in self._queue:
                self._queue.remove(call)

    def _classify_batch(self, images: _QueuedImages) -> Tensor:
        if images.maps is None:
            batch = self._next_batch(images)
            self.batches += 1
            maps = classify(images.classifier, torch.cat([each.pixels for each in batch]))
            for each, part in zip(batch, maps.split([len(each.pixels) for each in batch]), strict=True):
                each.maps = part
        return cast(Tensor, images.maps)

    def _next_batch(self, first: _QueuedImages) -> list[_QueuedImages]:
        """Return the images and those that wait for the same network, about INFERENCE_BATCH_SIZE together."""
        batch, count = [first], len(first.pixels)
        with self._lock:
            waiting = [call for call in self._queue if isinstance(call, _QueuedImages)]
            for call in waiting:
                if call.classifier is first.classifier and count < INFERENCE_BATCH_SIZE:
                    batch.append(call)
                    count += len(call.pixels)
                    self._queue.remove(call)
        return batch


@torch.inference_mode()
def classify(classifier: Classifier, pixels: Tensor) -> Tensor:
    """Return the class maps of images, INFERENCE_BATCH_SIZE at a time: float32 (N, classes, h, w)."""
    scores = bool(classifier.no_maps_reason)  # which are maps of one pixel
    network = classifier.fastest if scores else classifier.fastest_maps
    results = torch.cat([network(classifier.inputs(part)) for part in pixels.split(INFERENCE_BATCH_SIZE)])
    return (results[:, :, None, None] if scores else results).float().cpu()
