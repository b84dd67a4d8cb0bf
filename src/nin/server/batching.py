"""One thread that computes: the images of all clients who wait are classified together."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import torch
from torch import Tensor

from nin import data
from nin.prediction import BATCH, Classifier
from nin.server.inspection import Network


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


@dataclasses.dataclass(frozen=True)
class _Job:
    """Images to classify, uint8 (N, C, H, W), and by whom, or something else to compute; and where the result goes."""

    work: Tensor | Callable[[], Any]
    future: Future[Any]
    classifier: Classifier | None = None

    def joins(self, other: _Job) -> bool:
        """Return whether both may be in one batch."""
        return isinstance(other.work, Tensor) and other.classifier is self.classifier


class Batcher:
    """A queue and the thread that empties it.

    A single thread, because two computations at once take longer than one after the other, and because a batch is
    what makes many small requests fast. Nobody waits for a batch to fill: it holds what has come in the meantime.

    Args:
        waiting: jobs that may wait.
    """

    def __init__(self, *, waiting: int) -> None:
        self.batches = 0  # computed so far, for tests and the curious
        self._queue: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="nin-batcher", daemon=True)
        self._thread.start()

    def classify(self, classifier: Classifier, pixels: Tensor) -> Future[Answer]:
        """Classify images, uint8 (N, C, H, W); raises `FullError` where too much is waiting."""
        return self._put(_Job(pixels, Future(), classifier))

    def compute(self, work: Callable[[], Any]) -> Future[Any]:
        """Call a function in its turn; raises `FullError` where too much is waiting."""
        return self._put(_Job(work, Future()))

    def stop(self) -> None:
        """End the thread; what still waits is cancelled."""
        with contextlib.suppress(queue.Empty):
            while job := self._queue.get_nowait():
                job.future.cancel()
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _put(self, job: _Job) -> Future[Any]:
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise FullError from None
        return job.future

    def _run(self) -> None:
        held: _Job | None = None  # taken from the queue while a batch was gathered, but no part of it
        while (job := held or self._queue.get()) is not None:
            held = None
            if job.classifier is not None:
                jobs, held = self._gather(job)
                self._answer(job.classifier, [j for j in jobs if j.future.set_running_or_notify_cancel()])
            elif job.future.set_running_or_notify_cancel():
                _settle(job)

    def _gather(self, first: _Job) -> tuple[list[_Job], _Job | None]:
        """Return what waits for the same network, and what was taken from the queue but is something else."""
        jobs, count = [first], len(cast(Tensor, first.work))
        while count < BATCH:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                self._queue.put(None)
                break
            if not first.joins(following):
                return jobs, following
            jobs.append(following)
            count += len(cast(Tensor, following.work))
        return jobs, None

    def _answer(self, classifier: Classifier, jobs: list[_Job]) -> None:
        if not jobs:  # everyone has gone away
            return
        try:
            self.batches += 1
            parts = [cast(Tensor, job.work) for job in jobs]
            answer = classify(classifier, torch.cat(parts))
            start = 0
            for job, part in zip(jobs, parts, strict=True):
                rows = slice(start, start + len(part))
                start += len(part)
                job.future.set_result(Answer(answer.scores[rows], answer.maps[rows]))
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait, not to this thread
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)


@torch.inference_mode()
def classify(classifier: Classifier, pixels: Tensor) -> Answer:
    """Return the answers for images, BATCH at a time."""
    p = classifier.info.preprocessing
    network = cast(Network, classifier.model)
    maps = [network.maps(data.to_float(part.to(classifier.device), p.mean, p.std)) for part in pixels.split(BATCH)]
    whole = torch.cat(maps).float().cpu()
    return Answer(whole.mean((2, 3)), whole)


def _settle(job: _Job) -> None:
    try:
        job.future.set_result(cast(Callable[[], Any], job.work)())
    except Exception as error:  # noqa: BLE001 - as above
        job.future.set_exception(error)
