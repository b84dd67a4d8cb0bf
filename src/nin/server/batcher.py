"""Dynamic batching: one thread classifies the images of all requests that wait, together."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

import torch
from torch import Tensor

from nin.inference.classifier import INFERENCE_BATCH_SIZE, Classifier
from nin.models import Network

T = TypeVar("T")


class FullError(Exception):
    """The queue is full."""


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """Class scores and class maps of a request's images.

    Attributes:
        scores: (N, classes), float32.
        maps: (N, classes, h, w), float32, whose means are the scores.
    """

    scores: Tensor
    maps: Tensor


@dataclasses.dataclass(eq=False)
class _QueuedCall:
    """A request in the queue.

    Attributes:
        classifier: of the images; None where something else is computed.
        pixels: the images, uint8 (N, C, H, W).
        result: set by the first of a batch for all others in it.
    """

    classifier: Classifier | None = None
    pixels: Tensor | None = None
    result: ClassScores | None = None


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
        self._queue: list[_QueuedCall] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nin-batcher")

    @property
    def queued(self) -> int:
        """Number of calls that wait."""
        return len(self._queue)

    def classify(self, classifier: Classifier, pixels: Tensor) -> Future[ClassScores]:
        """Classify images, uint8 (N, C, H, W); raises `FullError` where the queue is full."""
        call = _QueuedCall(classifier, pixels)
        return self._enqueue(call, lambda: self._classify_batch(call))

    def compute(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in its turn; raises `FullError` where the queue is full."""
        call = _QueuedCall()

        def begin() -> T:
            self._dequeue(call)
            return function()

        return self._enqueue(call, begin)

    def stop(self) -> None:
        """End the thread; what still waits is cancelled."""
        self._thread.shutdown(cancel_futures=True)

    def _enqueue(self, call: _QueuedCall, function: Callable[[], T]) -> Future[T]:
        with self._lock:
            if len(self._queue) >= self._max_queued:
                raise FullError
            self._queue.append(call)
            future = self._thread.submit(function)
        # a future that its client cancelled never runs, and would take a place in the queue for ever
        future.add_done_callback(lambda _: self._dequeue(call))
        return future

    def _dequeue(self, call: _QueuedCall) -> None:
        with self._lock:
            if call in self._queue:
                self._queue.remove(call)

    def _classify_batch(self, call: _QueuedCall) -> ClassScores:
        if call.result is None:
            batch = self._next_batch(call)
            parts = [cast(Tensor, each.pixels) for each in batch]
            self.batches += 1
            result = classify(cast(Classifier, call.classifier), torch.cat(parts))
            sizes = [len(part) for part in parts]
            rows = zip(result.scores.split(sizes), result.maps.split(sizes), strict=True)
            for each, (scores, maps) in zip(batch, rows, strict=True):
                each.result = ClassScores(scores, maps)
        return cast(ClassScores, call.result)

    def _next_batch(self, first: _QueuedCall) -> list[_QueuedCall]:
        """Return the call and those that wait for the same network, of about INFERENCE_BATCH_SIZE images together."""
        with self._lock:
            batch, count = [first], len(cast(Tensor, first.pixels))
            for call in self._queue:
                if call is not first and call.classifier is first.classifier and count < INFERENCE_BATCH_SIZE:
                    batch.append(call)
                    count += len(cast(Tensor, call.pixels))
            self._queue = [call for call in self._queue if call not in batch]
        return batch


@torch.inference_mode()
def classify(classifier: Classifier, pixels: Tensor) -> ClassScores:
    """Return class scores and class maps of images, INFERENCE_BATCH_SIZE at a time."""
    network = cast(Network, classifier.fastest)
    maps = (
        torch.cat([network.maps(classifier.inputs(part)) for part in pixels.split(INFERENCE_BATCH_SIZE)]).float().cpu()
    )
    return ClassScores(maps.mean((2, 3)), maps)
