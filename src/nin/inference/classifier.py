"""The classifier of a run folder: predictions, scores and confidence maps of images."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nin import checkpoint, data, fusion, models
from nin.checkpoint import RunInfo
from nin.data.arrays import to_pillow, unstack
from nin.display.numbers import format_percent
from nin.display.tables import html_table
from nin.errors import UserError
from nin.inference.grad_cam import grad_cam
from nin.runtime.device import choose_device

INFERENCE_BATCH_SIZE = 64

# The most probable classes that a notebook shows of a prediction.
HTML_TOP_CLASSES = 5


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The class of one image, and the probability of every class.

    Attributes:
        label: the most probable class.
        confidence: its probability.
        probabilities: of every class, in the order of the network's classes; they add up to 1.
        classes: the names of the classes, in that order.
    """

    label: str
    confidence: float
    probabilities: tuple[float, ...]
    classes: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def _repr_html_(self) -> str:
        named = zip(self.probabilities, self.classes, strict=True) if self.classes else [(self.confidence, self.label)]
        best = sorted(named, reverse=True)[:HTML_TOP_CLASSES]
        return html_table([("class", "probability"), *((name, format_percent(p)) for p, name in best)])


class Classifier:
    """A trained network with its class names and preprocessing.

    Args:
        model: scores (N, classes) from images (N, C, H, W); standardised convolutions are folded.
        info: the contents of the run folder's ``config.json``.
        device: where to compute: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps".
        calibrated: divide the scores by the temperature that the training fitted on its validation images, before
            they become probabilities. It changes no answer, only how sure it is.

    Attributes:
        temperature: that the scores are divided by, for probabilities only; 1 without ``calibrated``.
        compiled: whether it answers by snapshots, see `compile`.

    Raises:
        UserError: there is no such device here, or the run has no temperature.
    """

    def __init__(
        self, model: nn.Module, info: RunInfo, *, device: str | torch.device = "cpu", calibrated: bool = False
    ) -> None:
        self.info, self.device = info, choose_device(device)
        temperature = fitted_temperature(info) if calibrated else 1.0
        if temperature is None:
            raise UserError(
                "calibrated probabilities need a temperature, which a training fits on its validation images: train "
                "with --validation 0.15"
            )
        self.temperature, self.compiled = temperature, False
        model = model.fold() if isinstance(model, models.NiN) else model
        self.model = model.eval().to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __repr__(self) -> str:
        names = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
        p, name = self.info.preprocessing, self.info.recipe.get("model", type(self.model).__name__)
        shape = f"{p.channels}×{p.size}×{p.size}"
        return f"{type(self).__name__}({name}, images {shape}, {len(self.classes)} classes: {names}; on {self.device})"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the scores."""
        return self.info.classes

    @functools.cached_property
    def fastest(self) -> Callable[[Tensor], Tensor]:
        """The model, or on a CPU a fused one that shares its tensors; after `compile` a snapshot of that.

        Its scores are the model's to rounding, see `nin.fuse`. It is fused as it is at the first access.
        """
        return self._fastest(self.model)

    @functools.cached_property
    def fastest_maps(self) -> Callable[[Tensor], Tensor]:
        """What returns the model's class maps, fused as `fastest` is; only for networks of `nin.models`."""
        return self._fastest(_ClassMaps(cast(models.Network, self.model)).eval())

    def compile(self) -> None:
        """Answer by snapshots from now on, see `nin.fusion.CompiledNetwork`: for a network that only answers.

        What is written to ``model`` afterwards need not reach the answers; on other devices than a CPU it does.
        """
        self.compiled = True
        for name in ("fastest", "fastest_maps"):
            vars(self).pop(name, None)

    def _fastest(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        if self.device.type != "cpu":
            return model
        fused = _fuse_sharing(model)
        return fusion.CompiledNetwork(fused, copies=False) if self.compiled else fused

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the fused models, which are the model once more."""
        return {name: value for name, value in vars(self).items() if name not in ("fastest", "fastest_maps")}

    def predict(self, images: Any) -> list[Prediction]:
        """Classify images.

        Args:
            images: one image or a list or tuple of them. An image is a path, the bytes of a file, a Pillow image, or
                an array or tensor (H, W), (H, W, C) or (C, H, W) of uint8, or of floats from 0 to 1. An array or
                tensor of four dimensions holds several. One of three is one image where its last axis is of 1 to 4
                or its first axis is 1 or the network's number of channels, and several grey images (N, H, W) where
                its first axis is longer than 4; what lies between could be both and is refused.

        Returns:
            One prediction for each image, in their order.

        Raises:
            UserError: a file is no image or cannot be read; it is named.
            ValueError: an array's shape, dtype or range is none of the above.
            TypeError: an image is of none of these kinds.
        """
        predictions = []
        for probabilities in self.probabilities(self.scores(images)):
            best, values = int(probabilities.argmax()), tuple(probabilities.tolist())
            predictions.append(Prediction(self.classes[best], values[best], values, self.classes))
        return predictions

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities (N, classes) of scores (N, classes), calibrated where that was asked for."""
        return (scores / self.temperature).softmax(1) if self.temperature != 1 else scores.softmax(1)

    @torch.inference_mode()
    def scores(self, images: Any) -> Tensor:
        """Return the scores before the softmax, (N, classes), float32; the arguments are those of `predict`."""
        results = [self.fastest(x).float().cpu() for x in self._batches(images)]
        return torch.cat(results) if results else torch.empty(0, len(self.classes))

    @torch.inference_mode()
    def confidence_maps(self, images: Any, *, size: int | None = None) -> Tensor:
        """Return the last layer's maps, whose means are the scores: how much each pixel adds to each class.

        A GoogLeNet, and most networks of timm and torchvision, have a fully connected layer after the global average
        pooling. It is linear, so the maps are made by computing it before the pooling.

        Args:
            images: as for `predict`.
            size: height and width to interpolate the maps to; those of the last layer if not given.

        Returns:
            (N, classes, h, w), float32, in units of the scores.

        Raises:
            UserError: the network's last layers do not commute with the pooling; `approximate_maps` makes others.

        Source:
            Lin, Chen, Yan: Network in Network, 2013, arXiv 1312.4400, section 4.6.
        """
        if not isinstance(self.model, models.Network):
            raise UserError(f"confidence maps need a network of nin.models, got {type(self.model).__name__}")
        batches = [self.fastest_maps(x).float().cpu() for x in self._batches(images)]
        maps = torch.cat(batches) if batches else torch.empty(0, len(self.classes), 1, 1)
        if size is not None:
            maps = F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)
        return maps

    @property
    def no_maps_reason(self) -> str:
        """Why there are no exact confidence maps; empty where there are."""
        return models.no_maps_reason(self.model)

    def approximate_maps(self, images: Any, labels: Sequence[str]) -> Tensor:
        """Return Grad-CAM's maps, for networks without exact ones: (N, size, size), from 0 to 1.

        Args:
            images: as for `predict`.
            labels: the class that is asked about, for each image.

        Raises:
            UserError: the package grad-cam is missing, or the network has no feature maps at its end.
        """
        numbers, rows = [self.classes.index(label) for label in labels], list[Tensor]()
        for x in self._batches(images):
            rows.append(grad_cam(self.model, x, numbers[len(rows) * INFERENCE_BATCH_SIZE :][: len(x)]))
        return torch.cat(rows)

    @torch.inference_mode()
    def score_pixels(self, pixels: Tensor) -> Tensor:
        """Return the scores (N, classes), float32, of decoded images: uint8 (N, channels, size, size)."""
        return self.fastest(self.inputs(pixels)).float().cpu()

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return the network's input, float32 on its device, for decoded images, uint8 (N, channels, size, size)."""
        p = self.info.preprocessing
        return data.to_float(pixels.to(self.device), p.mean, p.std)

    def _batches(self, images: Any) -> Iterator[Tensor]:
        """Yield batches of the network's input for what `predict` takes."""
        p = self.info.preprocessing
        items: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        if isinstance(images, np.ndarray | Tensor):
            items = unstack(torch.as_tensor(images), p.channels)
        for start in range(0, len(items), INFERENCE_BATCH_SIZE):
            batch = items[start : start + INFERENCE_BATCH_SIZE]
            yield self.inputs(torch.stack([_decode(item, p) for item in batch]))


class _ClassMaps(nn.Module):
    """A network up to its class maps."""

    def __init__(self, network: models.Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps (N, classes, h, w)."""
        return self.network.maps(x)


def _fuse_sharing(model: nn.Module) -> nn.Module:
    """Return the fused model, with the tensors of the model: half the memory of a copy, and the model's changes."""
    found = fusion.fuse(model)
    if not found.chains:  # its layers are operators already
        return model
    fused = found.model
    for name, module in model.named_modules():
        fused_module = fused.get_submodule(name)
        fused_module._parameters.update(module._parameters)
        fused_module._buffers.update(module._buffers)
    return fused


def load(
    run: str | Path, *, device: str | torch.device = "cpu", calibrated: bool = False, trust: bool = False
) -> Classifier:
    """Load a run folder.

    Args:
        run: the folder that `nin.train` or ``nin train`` made.
        device: where to compute, see `Classifier`.
        calibrated: whether probabilities are calibrated, see `Classifier`.
        trust: import the module that the run says its network is made by, where that is somebody's own.

    Returns:
        The classifier.

    Raises:
        UserError: the folder or a file in it is missing, damaged, of a newer version, or does not fit the other; or
            there is no such device here, or no temperature.
    """
    device = choose_device(device)  # before the network, so that a mistake shows at once
    with models.trust() if trust else contextlib.nullcontext():
        model, info = checkpoint.load_model(Path(run))
    return Classifier(model, info, device=device, calibrated=calibrated)


def fitted_temperature(info: RunInfo) -> float | None:
    """Return the temperature that a training fitted on its validation images; None where it had none."""
    temperature = info.result.get("temperature")
    return float(temperature) if isinstance(temperature, int | float) and 0 < temperature < math.inf else None


def _decode(image: Any, p: checkpoint.Preprocessing) -> Tensor:
    """Return one image of any kind that `Classifier.predict` takes as uint8 (channels, size, size)."""
    if isinstance(image, np.ndarray | Tensor):
        image = to_pillow(torch.as_tensor(image))
    if not isinstance(image, str | os.PathLike | bytes | Image.Image):
        raise TypeError(
            f"an image must be a path, bytes, a Pillow image, an array or a tensor, got {type(image).__name__}"
        )
    return data.decode(image, **p.decoding)
