"""What the routes share: the runs that are served, the thread that computes, and those that decode."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

from fastapi import Request
from torch import Tensor

from nin import models
from nin.errors import UserError
from nin.inference import classifier as prediction
from nin.profiling import cost
from nin.server import activations, pca, schemas, uploads
from nin.server.batcher import Batcher, FullError
from nin.server.middleware import Limits, RefusedError, busy
from nin.server.sample_images import Samples

T = TypeVar("T")


class ServedRun:
    """One run folder.

    Args:
        folder: that `nin.train` or ``nin narrow`` made.
        device: where to compute.

    Attributes:
        classifier: its network in use.
        network: its network.
        samples: its test images, which are read in the background.
        description: what the page says of it.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.classifier = prediction.load(folder, device=device)
        self.network = cast(models.Network, self.classifier.model)
        self.samples = Samples(self.classifier.info)
        self.description = describe(self.classifier, folder)
        self._spectra: dict[int, pca.Spectrum] = {}

    def looked_at(self) -> tuple[Tensor, Tensor]:
        """Return the network's input for many test images, and their labels.

        Raises:
            RefusedError: they are not here.
        """
        pixels, labels = self.samples.pixels, self.samples.labels
        if pixels is None or labels is None:
            raise RefusedError(404, "the run's test images are not here, or not read yet")
        return self.classifier.inputs(pixels), labels

    def spectrum(self, index: int) -> pca.Spectrum:
        """Return a layer's spectrum over the test images, computed once."""
        if index not in self._spectra:
            self._spectra[index] = pca.spectrum(self.network, self.looked_at()[0], index)
        return self._spectra[index]


class Service:
    """What the routes share.

    Args:
        folders: the run, and the one beside it; none serves the lesson alone.
        limits: see there.
        device: where to compute.

    Raises:
        UserError: a folder cannot be read, or the runs do not know the same classes.
    """

    def __init__(self, folders: Sequence[Path], limits: Limits, device: str) -> None:
        self.limits = limits
        self.runs = [ServedRun(folder, device) for folder in folders]
        if len({run.classifier.classes for run in self.runs}) > 1:
            raise UserError(
                f"runs beside each other must know the same classes: {' and '.join(map(str, folders))} do not"
            )
        self.batcher = Batcher(most_waiting=limits.requests)
        # no more at once than cores: a decoded picture can be a hundred times its file
        self.decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="nin-decoder")

    def close(self) -> None:
        """End the threads."""
        self.batcher.stop()
        self.decoders.shutdown(wait=False, cancel_futures=True)

    def run(self, number: int = 0) -> ServedRun:
        """Return the run of that number, or refuse: there is none."""
        if not self.runs:
            raise RefusedError(404, "no run was given: start with nin serve RUN")
        if number >= len(self.runs):
            raise RefusedError(404, "no run beside it was given: start with nin serve RUN --beside RUN")
        return self.runs[number]

    async def pixels(self, request: Request, run: ServedRun) -> Tensor:
        """Return the images of a request as a run's network takes them, uint8 (N, C, size, size)."""
        files = await uploads.read_files(request, self.limits)
        loop = asyncio.get_running_loop()
        p = run.classifier.info.preprocessing
        return await loop.run_in_executor(self.decoders, uploads.decode, files, p, self.limits)

    async def in_turn(self, submit: Callable[[], Future[T]]) -> T:
        """Wait for something that the computing thread does.

        Raises:
            RefusedError: too much is waiting, or there is no such layer.
        """
        try:
            return await asyncio.wrap_future(submit())
        except FullError:
            raise busy(self.limits) from None
        except LookupError as error:
            raise RefusedError(404, str(error.args[0])) from error

    async def compute(self, work: Callable[[], T]) -> T:
        """Let the computing thread call a function; see `in_turn`."""
        return await self.in_turn(lambda: self.batcher.compute(work))


def describe(classifier: prediction.Classifier, folder: Path) -> schemas.Model:
    """Return what the page says of a network."""
    info = classifier.info
    p = info.preprocessing
    counted = cost.cost(classifier.model, (1, p.channels, p.size, p.size))
    layers = activations.layers(cast(models.Network, classifier.model))
    return schemas.Model(
        name=name_of(info.model),
        run=folder.resolve().name,
        classes=list(classifier.classes),
        size=p.size,
        channels=p.channels,
        mean=list(p.mean),
        std=list(p.std),
        parameters=counted.parameters,
        macs=counted.macs,
        test_accuracy=info.result.get("test_accuracy"),
        layers=[schemas.LayerShape(**dataclasses.asdict(layer)) for layer in layers],
    )


def name_of(model: dict[str, object]) -> str:
    """Return what people call a network, by its description in ``config.json``."""
    if model["kind"] == "narrowed":
        return f"{name_of(cast(dict[str, object], model['base']))}, narrowed"
    return str(cast(dict[str, object], model.get("config", {})).get("name", model["kind"]))
