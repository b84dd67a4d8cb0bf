"""Using a trained network: load a run folder, predict, and see which places of a picture speak for which class."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nin import checkpoint, data, fusion, models
from nin.checkpoint import RunInfo
from nin.data.arrays import to_pillow, unstack
from nin.errors import UserError
from nin.runtime.formatting import format_percent
from nin.runtime.tables import html_table

INFERENCE_BATCH_SIZE = 64

# A notebook shows so many classes of a prediction.
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the network says of one image.

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
        best = sorted(named, reverse=True)[:SHOWN]
        return html_table([("class", "probability"), *((name, format_percent(p)) for p, name in best)])


class Classifier:
    """A trained network with all that it takes to use it: class names and preprocessing.

    Args:
        model: scores (N, classes) from images (N, C, H, W); standardised convolutions are folded.
        info: what the run folder says.
        device: where to compute.
    """

    def __init__(self, model: nn.Module, info: RunInfo, *, device: str | torch.device = "cpu") -> None:
        model = model.fold() if isinstance(model, models.NiN) else model
        self.model = model.eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.info, self.device = info, torch.device(device)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the scores."""
        return self.info.classes

    @functools.cached_property
    def fastest(self) -> nn.Module:
        """The model in the form that computes fastest, with the same tensors.

        A narrowed network is plain PyTorch: on a CPU its chains become nin's operator here. It is made when it is
        first asked for, of what `model` is then.
        """
        if self.device.type != "cpu" or self.info.model["kind"] != "narrowed":
            return self.model
        fused = fusion.fuse(self.model).model
        for name, module in self.model.named_modules():  # the tensors themselves, not copies
            twin = fused.get_submodule(name)
            twin._parameters.update(module._parameters)
            twin._buffers.update(module._buffers)
        return fused

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again: pickle does not know the classes of fused modules."""
        return {name: value for name, value in vars(self).items() if name != "fastest"}

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
        probabilities = self.scores(images).softmax(1)
        return [self._prediction(row) for row in probabilities]

    def _prediction(self, probabilities: Tensor) -> Prediction:
        best = int(probabilities.argmax())
        values = tuple(probabilities.tolist())
        return Prediction(self.classes[best], values[best], values, self.classes)

    @torch.inference_mode()
    def scores(self, images: Any) -> Tensor:
        """Return the scores before the softmax, (N, classes), float32. The arguments are those of `predict`."""
        results = [self.fastest(x).float().cpu() for x in self._batches(images)]
        return torch.cat(results) if results else torch.empty(0, len(self.classes))

    @torch.inference_mode()
    def confidence_maps(self, images: Any, *, size: int | None = None) -> Tensor:
        """Return what each place of an image adds to each class: the last layer's maps.

        The score of a class is the mean of its map (global average pooling), so the map is the explanation. A
        GoogLeNet has a dense layer after the mean; it is linear, so its maps are made in the other order.

        Args:
            images: as for `predict`.
            size: height and width of the maps, interpolated; None gives them as the network makes them.

        Returns:
            (N, classes, h, w), float32, in units of the scores.

        Raises:
            UserError: the network has no such maps: it is neither a `nin.models.NiN` nor a `nin.models.GoogLeNet`.

        Source:
            Lin, Chen, Yan: Network in Network, 2013, arXiv 1312.4400, section 4.6.
        """
        if not isinstance(self.model, models.Network):
            raise UserError(f"confidence maps need a NiN or a GoogLeNet, got {type(self.model).__name__}")
        batches = [self.model.maps(x).float().cpu() for x in self._batches(images)]
        maps = torch.cat(batches) if batches else torch.empty(0, len(self.classes), 1, 1)
        if size is not None:
            maps = F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)
        return maps

    @torch.inference_mode()
    def score_pixels(self, pixels: Tensor) -> Tensor:
        """Return the scores, (N, classes), of decoded images: uint8 (N, channels, size, size) of the preprocessing."""
        return self.fastest(self.inputs(pixels)).float().cpu()

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return the network's input, float32 on its device, for decoded images, uint8 (N, channels, size, size)."""
        p = self.info.preprocessing
        return data.to_float(pixels.to(self.device), p.mean, p.std)

    def _batches(self, images: Any) -> Iterator[Tensor]:
        """Yield batches of the network's input."""
        p = self.info.preprocessing
        for batch in _batches_of_pixels(images, size=p.size, channels=p.channels):
            yield self.inputs(batch)


def load(run: str | Path, *, device: str = "cpu") -> Classifier:
    """Load a run folder.

    Args:
        run: the folder that `nin.train` or ``nin train`` made.
        device: where to compute.

    Returns:
        The classifier.

    Raises:
        UserError: the folder or a file in it is missing, damaged, of a newer version, or does not fit the other.
    """
    model, info = checkpoint.load_model(Path(run))
    return Classifier(model, info, device=device)


def _batches_of_pixels(images: Any, *, size: int, channels: int) -> Iterator[Tensor]:
    """Yield uint8 batches (B, channels, size, size)."""
    items: Sequence[Any]
    if isinstance(images, np.ndarray | Tensor):
        items = unstack(torch.as_tensor(images), channels)
    elif isinstance(images, list | tuple):
        items = images
    else:
        items = [images]
    for start in range(0, len(items), INFERENCE_BATCH_SIZE):
        yield torch.stack(
            [_pixels(item, size=size, channels=channels) for item in items[start : start + INFERENCE_BATCH_SIZE]]
        )


def _pixels(image: Any, *, size: int, channels: int) -> Tensor:
    if isinstance(image, np.ndarray | Tensor):
        image = to_pillow(torch.as_tensor(image))
    if not isinstance(image, str | os.PathLike | bytes | Image.Image):
        raise TypeError(
            f"an image must be a path, bytes, a Pillow image, an array or a tensor, got {type(image).__name__}"
        )
    return data.decode(image, size=size, channels=channels)
