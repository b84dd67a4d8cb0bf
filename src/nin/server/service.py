"""The served runs, and the threads that decode and compute for all routes."""

import asyncio
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

from fastapi import HTTPException, Request
from torch import Tensor

from nin import checkpoint, epoch_metrics, models
from nin.errors import UserError
from nin.inference.classifier import Classifier, load
from nin.ops import ACTIVATIONS, freeze
from nin.profiling.cost import cost
from nin.runtime.device import choose_device
from nin.server import schemas, uploads
from nin.server.activations import all_layer_sums, find_layer, layers
from nin.server.batcher import Batcher, FullError
from nin.server.middleware import Limits, service_unavailable
from nin.server.pca import PrincipalComponents, principal_components
from nin.server.sample_images import SampleLoader
from nin.server.training_status import is_begun

T = TypeVar("T")

# whether the one who asked is still there; nginx's status for it, which nobody receives
SECONDS_BETWEEN_LOOKS, CLIENT_CLOSED_REQUEST = 0.1, 499


class ServedRun:
    """A run folder with its network and its test images.

    Args:
        folder: that `nin.train` or ``nin narrow`` made.
        device: where to compute.
        before: the same run as it was served before its training went on; its images are those of this one.

    Attributes:
        classifier: its network with classes and preprocessing.
        network: the network itself.
        samples: its test images, which are loaded in the background.
        metadata: what the page shows of it.
        right_before: how many test images looked at are right with all directions of a layer, by its index.
    """

    def __init__(self, folder: Path, device: str, before: "ServedRun | None" = None) -> None:
        self.written = time_written(folder)  # before it is read: what is written meanwhile is read later
        self.classifier = load(folder, device=device)
        self.classifier.compile()  # nothing here writes to the network
        self.network = cast(models.Network, freeze(self.classifier.model))
        self.samples: SampleLoader = SampleLoader(self.classifier.info) if before is None else before.samples
        self.metadata = model_metadata(self.classifier, folder)
        self.right_before: dict[int, int] = {}
        self._outputs: dict[bytes, list[Tensor]] = {}
        self._components: dict[int, PrincipalComponents] = {}

    def has_gone_on(self, folder: Path) -> bool:
        """Return whether the run's training had not ended, and has written another network since."""
        return not self.classifier.info.result and time_written(folder) != self.written

    def calibration_images(self) -> tuple[Tensor, Tensor]:
        """Return the test images that statistics are computed on, uint8 (N, C, H, W), and their labels.

        Raises:
            HTTPException: they are not on this machine, or not loaded yet.
        """
        pixels, labels = self.samples.pixels, self.samples.labels
        if pixels is None or labels is None:
            raise HTTPException(404, "the run's test images are not here, or not read yet")
        return pixels, labels

    def calibration_batch(self) -> tuple[Tensor, Tensor]:
        """Return the network's input for `calibration_images`, and their labels."""
        pixels, labels = self.calibration_images()
        return self.classifier.inputs(pixels), labels

    def outputs(self, pixels: Tensor, index: int, *, sums: bool) -> Tensor:
        """Return the output of a layer, or its sums before the activation, for one image, (1, C, h, w).

        The page asks for all layers of a block, one after the other: those of the last two images are kept.

        Args:
            pixels: uint8 (1, C, H, W).
            index: of the layer.
            sums: whether before its activation.

        Raises:
            LookupError: there is no such layer.
        """
        key = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if key not in self._outputs:
            self._outputs = dict([*self._outputs.items()][-1:])  # two are compared
            self._outputs[key] = all_layer_sums(self.network, self.classifier.inputs(pixels))
        layer, values = find_layer(self.network, index).layer, self._outputs[key][index]
        return (values if sums else ACTIVATIONS[layer.activation](values)).float().cpu()

    def principal_components(self, index: int) -> PrincipalComponents:
        """Return the principal components of a layer over the test images, computed once."""
        if index not in self._components:
            self._components[index] = principal_components(self.network, self.calibration_batch()[0], index)
        return self._components[index]


class Service:
    """The served runs, a batcher, and threads that decode.

    The network of a training that has not ended is loaded again when another one lies in its folder.

    Args:
        folders: the run, and the one beside it; none serves the lesson alone. Of a single run, a training in its first
            epoch has no network yet: it is served when there is one.
        limits: on requests.
        device: where to compute.

    Raises:
        UserError: a folder cannot be read, the runs do not know the same classes, or there is no such device here.
    """

    def __init__(self, folders: Sequence[Path], limits: Limits, device: str) -> None:
        choose_device(device)  # also where no run uses it
        self.limits, self.folders, self.device = limits, tuple(folders), device
        waits = len(folders) == 1 and is_begun(folders[0])
        self.runs = [] if waits else [ServedRun(folder, device) for folder in folders]
        self._loading = asyncio.Lock()
        if len({run.classifier.classes for run in self.runs}) > 1:
            raise UserError(
                f"runs beside each other must know the same classes: {' and '.join(map(str, folders))} do not"
            )
        self.batcher = Batcher(max_queued=limits.requests)
        # no more at once than cores: a decoded picture can be a hundred times its file
        self.decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="nin-decoder")

    def close(self) -> None:
        """End the threads."""
        self.batcher.stop()
        self.decoders.shutdown(wait=False, cancel_futures=True)

    async def refresh(self) -> None:
        """Load the networks that trainings have written since they were loaded, in a thread.

        What cannot be read, as its training writes it or is begun again, is served as it was.
        """
        if not self._changed():
            return
        async with self._loading:
            for number in self._changed():  # another request may have loaded them meanwhile
                before = self.runs[number] if number < len(self.runs) else None
                with contextlib.suppress(UserError, FileNotFoundError):
                    served = await asyncio.to_thread(ServedRun, self.folders[number], self.device, before)
                    self.runs[number : number + 1] = [served]

    def _changed(self) -> list[int]:
        """Return the numbers of the runs whose folder holds another network than the one that is served."""
        if not self.runs:
            return [number for number, folder in enumerate(self.folders) if not is_begun(folder)]
        return [number for number, run in enumerate(self.runs) if run.has_gone_on(self.folders[number])]

    async def run(self, number: int = 0) -> ServedRun:
        """Return the run of that number, as its training has left it by now; raises 404 where there is none."""
        await self.refresh()
        return self.loaded(number)

    def loaded(self, number: int = 0) -> ServedRun:
        """Return the run of that number, as it was loaded; raises 404 where there is none."""
        if not self.runs and self.folders:
            raise HTTPException(404, "the run has no network yet: it has one after the first epoch of its training")
        if not self.runs:
            raise HTTPException(404, "no run was given: start with nin serve RUN")
        if number >= len(self.runs):
            raise HTTPException(404, "no run beside it was given: start with nin serve RUN --beside RUN")
        return self.runs[number]

    async def pixels(self, request: Request, run: ServedRun) -> tuple[Tensor, dict[int, str]]:
        """Return the decoded images of a request for a run's network, see `nin.server.uploads.decode_images`."""
        files = await uploads.read_files(request, self.limits)
        loop = asyncio.get_running_loop()
        p = run.classifier.info.preprocessing
        return await loop.run_in_executor(self.decoders, uploads.decode_images, files, p, self.limits)

    async def wait_for(self, submit: Callable[[], Future[T]], request: Request | None = None) -> T:
        """Submit a call to the batcher and return its result.

        Args:
            submit: submits it.
            request: that asks; where it is broken off, as by another click on the page, the call loses its turn.

        Raises:
            HTTPException: the queue is full, or there is no such layer.
        """
        try:
            call = asyncio.wrap_future(submit())
            while request is not None and not (await asyncio.wait([call], timeout=SECONDS_BETWEEN_LOOKS))[0]:
                if await request.is_disconnected():
                    call.cancel()
                    raise HTTPException(CLIENT_CLOSED_REQUEST, "the request was broken off")
            return await call
        except FullError:
            raise service_unavailable(self.limits) from None
        except LookupError as error:
            raise HTTPException(404, str(error.args[0])) from error

    async def compute(self, function: Callable[[], T], request: Request | None = None) -> T:
        """Call a function in the batcher's thread; raises as `wait_for`."""
        return await self.wait_for(lambda: self.batcher.compute(function), request)


def time_written(folder: Path) -> tuple[int | None, ...]:
    """Return when the network and the figures of a run folder were written, in nanoseconds; None where they are not."""
    paths = (folder / name for name in (checkpoint.CONFIG_FILE, epoch_metrics.METRICS_FILE))
    return tuple(path.stat().st_mtime_ns if path.is_file() else None for path in paths)


def trained_text(info: checkpoint.RunInfo, folder: Path) -> str:
    """Return which epoch the network of an unfinished run is of; "" where it has ended."""
    if info.result:
        return ""
    path = folder / epoch_metrics.METRICS_FILE
    done, all_epochs = len(epoch_metrics.read_csv(path)) if path.is_file() else 0, info.recipe.get("epochs", "?")
    is_best = info.recipe.get("patience") is not None
    return f"the best of {done} epochs, of {all_epochs}" if is_best else f"epoch {done} of {all_epochs}"


def model_metadata(classifier: Classifier, folder: Path) -> schemas.Model:
    """Return name, input, costs, accuracy and layers of a network."""
    info = classifier.info
    p = info.preprocessing
    network_cost = cost(classifier.model, (1, p.channels, p.size, p.size))
    return schemas.Model(
        name=models.model_name(info.model),
        run=folder.resolve().name,
        classes=list(classifier.classes),
        size=p.size,
        channels=p.channels,
        mean=list(p.mean),
        std=list(p.std),
        parameters=network_cost.parameters,
        macs=network_cost.macs,
        test_accuracy=info.result.get("test_accuracy"),
        no_maps_reason=classifier.no_maps_reason,
        unfinished=trained_text(info, folder),
        layers=[schemas.LayerShape(**dataclasses.asdict(layer)) for layer in layers(classifier.model)],
    )
