"""Data sets: Data (train and test set), images in memory or decoded on demand, and LoadOptions: how to read them."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nin.config import FEW_PHOTOS, PHOTO_SIZE
from nin.data.decoder import DecodeError, DecodeOptions, decode_options, decode_photo, decode_pixels
from nin.data.findings import Finding
from nin.data.mirroring import FlipChoice, choose_flip
from nin.data.resizing import CENTRE_SQUARE, ResizeOptions
from nin.data.value_range import Pixels, RangeOption, ValueRange
from nin.errors import UserError
from nin.runtime.progress import ProgressCallback

# Where images are not in memory, mean and std are those of this many, evenly spaced: the standard error of the mean
# is then about 1/60 of the spread between images.
_STATISTICS_SAMPLE = 4096


class PathList(Sequence[str]):
    """Many paths in one buffer: their bytes and 8 more each, where a list of str takes about 100 each."""

    def __init__(self, paths: Iterable[str]) -> None:
        buffer = bytearray()
        ends = [0]
        for path in paths:
            buffer += os.fsencode(path)
            ends.append(len(buffer))
        self._buffer = bytes(buffer)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "PathList": ...
    def __getitem__(self, index: int | slice) -> "str | PathList":
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        position = range(len(self))[index]  # counts from the end where negative, raises IndexError
        return os.fsdecode(self._buffer[self._ends[position] : self._ends[position + 1]])

    def select(self, indices: Iterable[int]) -> "PathList":
        """Return the paths at the indices, in their order."""
        return PathList(self[int(index)] for index in indices)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        names: the path of each image relative to its folder, or None where images have no names.
        photos: the whole photo that each image was cut from, uint8 (H, W, C) of its own shape, see
            `nin.data.resizing.resize_photo`; or the set that decodes it; or None where there is none.
    """

    images: Tensor
    labels: Tensor
    names: Sequence[str] | None = None
    photos: "list[Pixels] | DecodedSet | None" = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[-1]

    def fetch(self, numbers: Tensor) -> Tensor:
        """Return images by their numbers in an order, see `nin.data.batches`: uint8 (B, C, H, W)."""
        return self.images[numbers % max(1, len(self))]

    def pixels(self, index: int) -> Pixels:
        """Return one image: (C, H, W)."""
        return self.images[index].numpy()

    def photo(self, index: int) -> Pixels:
        """Return one image as a random crop takes it, (H, W, C): the whole photo where there is one."""
        if self.photos is None:
            return self.pixels(index).transpose(1, 2, 0)
        return self.photos.photo(index) if isinstance(self.photos, DecodedSet) else self.photos[index]

    def select(self, indices: Tensor) -> "ImageSet":
        """Return the images at the indices, int64 (K,), in their order."""
        rows, photos = indices.tolist(), self.photos
        return ImageSet(
            self.images[indices],
            self.labels[indices],
            None if self.names is None else PathList(self.names[row] for row in rows),
            photos.select(indices) if isinstance(photos, DecodedSet) else photos and [photos[row] for row in rows],
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodedSet(ABC):
    """Labelled images that are decoded each time they are fetched; a subclass says where their bytes lie.

    Attributes:
        labels: int64 (N,).
        names: of each image.
        channels: 1 or 3, of the decoded images.
        size: height and width of the decoded images in pixels.
        value_range: what becomes black and white in images with more than 8 bits, see `nin.data.decode`.
        resize: how images become squares.
    """

    labels: Tensor
    names: PathList
    channels: int
    size: int
    value_range: ValueRange | None = None
    resize: ResizeOptions = CENTRE_SQUARE

    @abstractmethod
    def decode(self, index: int) -> Pixels:
        """Decode one image: (channels, size, size).

        Raises:
            DecodeError: it cannot be read; the message begins with its path.
        """

    @abstractmethod
    def photo(self, index: int) -> Pixels:
        """Decode one image as a random crop takes it, (H, W, channels): see `nin.data.resizing.resize_photo`.

        Raises:
            DecodeError: it cannot be read; the message begins with its path.
        """

    @property
    def decoding(self) -> DecodeOptions:
        """The arguments of `nin.data.decoder.decode_pixels` and `decode_photo`."""
        return decode_options(self)

    def pixels(self, index: int) -> Pixels:
        """Decode one image: (channels, size, size)."""
        return self.decode(index)

    def select(self, indices: Tensor) -> Self:
        """Return the images at the indices, int64 (K,), in their order."""
        return replace(self, labels=self.labels[indices], names=self.names.select(indices.tolist()))

    def __len__(self) -> int:
        return len(self.names)

    def load(self, number: int) -> Pixels:
        """Decode one image by its number in an order, see `nin.data.batches`."""
        return self.decode(number % len(self))

    def fetch(self, numbers: Tensor) -> Tensor:
        """Decode images by their numbers in an order: uint8 (B, C, size, size).

        Raises:
            DecodeError: one cannot be read (it was readable when the set was made).
        """
        images = np.empty((len(numbers), self.channels, self.size, self.size), dtype=np.uint8)
        for image, number in zip(images, numbers.tolist(), strict=True):
            image[:] = self.load(number)
        return torch.from_numpy(images)

    def fetch_readable(self, numbers: Tensor) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        """Decode those of the images that can still be read.

        Returns:
            uint8 (K, C, size, size), K <= B; their numbers, int64 (K,); (path, reason) of the others.
        """
        images = np.empty((len(numbers), self.channels, self.size, self.size), dtype=np.uint8)
        kept: list[int] = []
        lost: list[tuple[str, str]] = []
        for number in numbers.tolist():
            try:
                images[len(kept)] = self.load(number)
                kept.append(number)
            except DecodeError as error:
                lost.append((self.names[number % len(self)], error.reason))
        return torch.from_numpy(images[: len(kept)]), torch.tensor(kept, dtype=torch.int64), lost


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSet(DecodedSet):
    """Labelled images in files.

    Attributes:
        root: the folder that the names are relative to.
    """

    root: Path

    def decode(self, index: int) -> Pixels:
        """Decode one image: (channels, size, size)."""
        return decode_pixels(self.path(index), **self.decoding)

    def photo(self, index: int) -> Pixels:
        """Decode one whole image: (H, W, channels)."""
        return decode_photo(self.path(index), **self.decoding)

    def path(self, index: int) -> str:
        """Return the path of the file of an image."""
        return os.path.join(self.root, self.names[index])


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, ready to train on.

    Attributes:
        name: what it is called: the name of the set, or of the folder.
        train: the images to train on.
        test: the images that measure the result.
        classes: the name of each label, in the order of the labels.
        channels: of every image.
        size: height and width of every image in pixels.
        mean: of each channel of train, in units of 0..1.
        std: of each channel of train, in units of 0..1, never 0.
        flip: whether a mirrored image keeps its label.
        shift: a sensible random translation, in pixels.
        skipped: (path, reason) of each file that could not be read.
        notes: what else was left out, in sentences for the user.
        findings: what a person should know about single files, the skipped ones among them.
        origin: the arguments of `load` that bring the same images again; empty for arrays.
        flip_reason: what `flip` was decided by, in words for the user.
        value_range: what became black and white in images with more than 8 bits; None where that is the range of their
            type, or there are none.
        resize: how images became squares.
        validation: the images to choose by, set apart from the training images; None where there are none.
    """

    name: str
    train: ImageSet | DecodedSet
    test: ImageSet | DecodedSet
    classes: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    shift: int
    skipped: tuple[tuple[str, str], ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    findings: tuple[Finding, ...] = field(default=())
    origin: Mapping[str, Any] = field(default_factory=dict)
    flip_reason: str = ""
    value_range: ValueRange | None = None
    resize: ResizeOptions = CENTRE_SQUARE
    validation: ImageSet | DecodedSet | None = None

    @classmethod
    def from_sets(
        cls,
        name: str,
        train: ImageSet | DecodedSet,
        test: ImageSet | DecodedSet,
        classes: tuple[str, ...],
        *,
        flip: FlipChoice | None = None,
        **details: Any,
    ) -> Self:
        """Return a data set with what follows from its images and classes: channels, size, mean, std, shift, flip.

        Args:
            name: of the data set.
            train: the images to train on.
            test: the images that measure the result.
            classes: the name of each label.
            flip: whether a mirrored image keeps its label; `choose_flip` decides if not given.
            details: the other attributes.
        """
        images, labels = sample_images(train)
        mean, std = channel_mean_std(train.images if isinstance(train, ImageSet) else images)
        flip = choose_flip(classes, images, labels) if flip is None else flip
        details = {"flip_reason": flip.reason, **details}
        return cls(
            name,
            train,
            test,
            classes,
            train.channels,
            train.size,
            mean,
            std,
            flip.flip,
            default_shift(train.size),
            **details,
        )


@dataclass(frozen=True)
class LoadOptions:
    """How to read images; `nin.data.load` documents each field.

    Raises:
        UserError: test_fraction or size is out of range.
    """

    size: int | None = None
    test_fraction: float | None = None
    seed: int = 0
    strict: bool = False
    workers: int | None = None
    memory_limit_bytes: int = 0
    on_progress: ProgressCallback | None = None
    value_range: RangeOption = "auto"
    resize: ResizeOptions = CENTRE_SQUARE
    photos: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UserError(f"test_fraction: expected a number between 0 and 1, got {self.test_fraction}")
        if self.size is not None and self.size < 1:
            raise UserError(f"size: expected at least 1 pixel, got {self.size}")


def sample_images(dataset: ImageSet | DecodedSet) -> tuple[Tensor, Tensor]:
    """Return up to `_STATISTICS_SAMPLE` images, evenly spaced, uint8 (B, C, H, W), and their labels."""
    indices = torch.arange(0, len(dataset), max(1, len(dataset) // _STATISTICS_SAMPLE))
    if isinstance(dataset, DecodedSet):
        images, indices, _ = dataset.fetch_readable(indices)  # the training lists the others when it gets there
    else:
        images = dataset.fetch(indices)
    return images, dataset.labels[indices]


def channel_mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images (B, C, H, W), in units of 0..1.

    They come from a histogram of the 256 values, so they are exact and the same on every machine. A channel
    that never changes gets the spread of one grey level, so that dividing by it is safe.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        frequency = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float((frequency * levels).sum())
        means.append(mean)
        stds.append(max(float((frequency * (levels - mean) ** 2).sum()) ** 0.5, 1 / 255))
    return tuple(means), tuple(stds)


def default_size(widths: NDArray[np.int64], heights: NDArray[np.int64], *, images: int) -> int:
    """Return the size to train at: that of small square images, else one by the median shorter side.

    Args:
        widths: of the images, or of some of them, in pixels.
        heights: of the same.
        images: how many there are in all; a few photos are learned better when they are small.
    """
    shorter = np.minimum(widths, heights)
    if shorter[0] <= 64 and (widths == shorter[0]).all() and (heights == shorter[0]).all():
        return int(shorter[0])
    middle = median(shorter.tolist())
    # up to 160 pixels the shorter side shrinks by a third at most; 224 is what networks for ImageNet take
    size = next((size for limit, size in ((48, 32), (96, 64), (160, 128)) if middle <= limit), 224)
    return min(size, PHOTO_SIZE) if images < FEW_PHOTOS else size


def default_shift(size: int) -> int:
    """Return how many pixels an image of this size may be moved without losing what it shows."""
    if size <= 32:  # 2 of 32 pixels, as the fastest trainings on CIFAR-10 do
        return 1 if size < 16 else 2
    return size // 16
