"""One thread that computes: the images of all clients who wait are classified together."""

from __future__ import annotations

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
    """Too much is waiting."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the network says of a request's images.

    Attributes:
        scores: (N, classes), float32.
        maps: (N, classes, h, w), float32, whose means are the scores.
    """

    scores: Tensor
    maps: Tensor


@dataclasses.dataclass(eq=False)
class _Job:
    """What somebody waits for.

    Attributes:
        classifier: who classifies, or None where something else is computed.
        pixels: the images, uint8 (N, C, H, W).
        answer: given by the first of a batch to all others in it.
    """

    classifier: Classifier | None = None
    pixels: Tensor | None = None
    answer: Answer | None = None


class Batcher:
    """A thread that computes one thing after the other.

    A single thread, because two computations at once take longer than one after the other, and because a batch is
    what makes many small requests fast. Nobody waits for a batch to fill: it holds what has come in the meantime.
    Where a batch fails, each of its images is classified in its own turn, so nobody gets the error of another.

    Args:
        most_waiting: jobs that may wait for their turn.
    """

    def __init__(self, *, most_waiting: int) -> None:
        self.batches = 0  # computed so far, for tests and the curious
        self._most_waiting = most_waiting
        self._waiting: list[_Job] = []  # for an answer or for their turn, in order
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nin-batcher")

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    def classify(self, classifier: Classifier, pixels: Tensor) -> Future[Answer]:
        """Classify images, uint8 (N, C, H, W); raises `FullError` where too much is waiting."""
        job = _Job(classifier, pixels)
        return self._put(job, lambda: self._answer(job))

    def compute(self, work: Callable[[], T]) -> Future[T]:
        """Call a function in its turn; raises `FullError` where too much is waiting."""
        job = _Job()

        def begin() -> T:
            self._leave(job)
            return work()

        return self._put(job, begin)

    def stop(self) -> None:
        """End the thread; what still waits is cancelled."""
        self._thread.shutdown(cancel_futures=True)

    def _put(self, job: _Job, work: Callable[[], T]) -> Future[T]:
        with self._lock:
            if len(self._waiting) >= self._most_waiting:
                raise FullError
            self._waiting.append(job)
            future = self._thread.submit(work)
        future.add_done_callback(lambda _: self._leave(job))  # one that has gone away never has its turn
        return future

    def _leave(self, job: _Job) -> None:
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)

    def _answer(self, job: _Job) -> Answer:
        if job.answer is None:
            batch = self._gather(job)
            parts = [cast(Tensor, each.pixels) for each in batch]
            self.batches += 1
            answer = classify(cast(Classifier, job.classifier), torch.cat(parts))
            sizes = [len(part) for part in parts]
            rows = zip(answer.scores.split(sizes), answer.maps.split(sizes), strict=True)
            for each, (scores, maps) in zip(batch, rows, strict=True):
                each.answer = Answer(scores, maps)
        return cast(Answer, job.answer)

    def _gather(self, first: _Job) -> list[_Job]:
        """Return the job and those that wait for the same network, of about INFERENCE_BATCH_SIZE images together."""
        with self._lock:
            batch, count = [first], len(cast(Tensor, first.pixels))
            for job in self._waiting:
                if job is not first and job.classifier is first.classifier and count < INFERENCE_BATCH_SIZE:
                    batch.append(job)
                    count += len(cast(Tensor, job.pixels))
            self._waiting = [job for job in self._waiting if job not in batch]
        return batch


@torch.inference_mode()
def classify(classifier: Classifier, pixels: Tensor) -> Answer:
    """Return the answers for images, INFERENCE_BATCH_SIZE at a time."""
    network = cast(Network, classifier.fastest)
    maps = [network.maps(classifier.inputs(part)) for part in pixels.split(INFERENCE_BATCH_SIZE)]
    whole = torch.cat(maps).float().cpu()
    return Answer(whole.mean((2, 3)), whole)
