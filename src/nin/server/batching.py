"""One thread that computes: the images of all clients who wait are classified together."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from nin import data, models
from nin.prediction import BATCH, Classifier


class FullError(Exception):
    """Too much is waiting."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the network says of a request's images.

    Attributes:
        scores: (N, classes), float32.
        maps: (N, classes, h, w), float32, whose means are the scores; None where the network makes none.
    """

    scores: Tensor
    maps: Tensor | None


@dataclasses.dataclass(frozen=True)
class _Job:
    """Images to classify, uint8 (N, C, H, W), or something else to compute; and where the result goes."""

    work: Tensor | Callable[[], Any]
    future: Future[Any]


class Batcher:
    """A queue and the thread that empties it.

    A single thread, because two computations at once take longer than one after the other, and because a batch is
    what makes many small requests fast. Nobody waits for a batch to fill: it holds what has come in the meantime.

    Args:
        classifier: the network; None where there is none, and `classify` is not called.
        waiting: jobs that may wait.
    """

    def __init__(self, classifier: Classifier | None, *, waiting: int) -> None:
        self.classifier = classifier
        self.batches = 0  # computed so far, for tests and the curious
        self._queue: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="nin-batcher", daemon=True)
        self._thread.start()

    def classify(self, pixels: Tensor) -> Future[Answer]:
        """Classify images, uint8 (N, C, H, W); raises `FullError` where too much is waiting."""
        return self._put(pixels)

    def compute(self, work: Callable[[], Any]) -> Future[Any]:
        """Call a function in its turn; raises `FullError` where too much is waiting."""
        return self._put(work)

    def stop(self) -> None:
        """End the thread; what still waits is cancelled."""
        with contextlib.suppress(queue.Empty):
            while job := self._queue.get_nowait():
                job.future.cancel()
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _put(self, work: Tensor | Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            self._queue.put_nowait(_Job(work, future))
        except queue.Full:
            raise FullError from None
        return future

    def _run(self) -> None:
        held: _Job | None = None  # taken from the queue while a batch was gathered, but no part of it
        while (job := held or self._queue.get()) is not None:
            held = None
            if isinstance(job.work, Tensor):
                jobs, count = [job], len(job.work)
                while count < BATCH and held is None:
                    try:
                        following = self._queue.get_nowait()
                    except queue.Empty:
                        break
                    if following is None:
                        self._queue.put(None)
                        break
                    if isinstance(following.work, Tensor):
                        jobs.append(following)
                        count += len(following.work)
                    else:
                        held = following
                self._answer([j for j in jobs if j.future.set_running_or_notify_cancel()])
            elif job.future.set_running_or_notify_cancel():
                _settle(job.future, job.work)

    def _answer(self, jobs: list[_Job]) -> None:
        if not jobs:  # everyone has gone away
            return
        try:
            self.batches += 1
            parts = [job.work for job in jobs if isinstance(job.work, Tensor)]
            answer = self._classify(torch.cat(parts))
            start = 0
            for job, part in zip(jobs, parts, strict=True):
                rows = slice(start, start + len(part))
                start += len(part)
                job.future.set_result(Answer(answer.scores[rows], None if answer.maps is None else answer.maps[rows]))
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait, not to this thread
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)

    @torch.inference_mode()
    def _classify(self, pixels: Tensor) -> Answer:
        """Return the answers for images, BATCH at a time."""
        classifier = self.classifier
        assert classifier is not None
        p, model = classifier.info.preprocessing, classifier.model
        scores, maps = [], []
        for part in pixels.split(BATCH):
            x = data.to_float(part.to(classifier.device), p.mean, p.std)
            if isinstance(model, models.NiN):
                maps.append(model.maps(x))
                scores.append(model.head(maps[-1]).float().cpu())
            else:
                scores.append(model(x).float().cpu())
        return Answer(torch.cat(scores), torch.cat(maps).float().cpu() if maps else None)


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - as above
        future.set_exception(error)
