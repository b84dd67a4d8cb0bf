"""Augmentation of single images: random crops, mirroring, TrivialAugment, colour jitter and erasing.

Not torchvision's transform classes: they draw from PyTorch's one generator, which the threads that decode would share
with each other and with dropout. Here an image's draws are a function of (seed, epoch, index); what is done to the
pixels are torchvision's functions, on Pillow images, which need no threads of PyTorch's.
"""

import dataclasses
import functools
import importlib
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from nin.data.dataset import DecodedSet, ImageSet, PathList
from nin.data.resizing import FILTERS
from nin.data.sampler import hash_indices, stream_key
from nin.data.value_range import Pixels

# The part of a photo's area that a random crop keeps, at least, and its proportions beside those of a square. ImageNet
# is trained from 0.08 upwards (Szegedy et al. 2014, arXiv 1409.4842), for hundreds of epochs; in a few, and with
# objects that need not fill the photo, crops that miss the object do more harm than good.
SMALLEST_CROP = 0.35
LARGEST_ASPECT = 4 / 3

# Brightness, contrast and saturation are multiplied by 1 ± this.
COLOUR_JITTER = 0.2

# How often a part is erased, and what part of the area. Zhong et al. 2017, arXiv 1708.04896.
ERASING_PROBABILITY = 0.25
ERASED_AREA = (0.02, 0.2)
ERASED_ASPECT = 10 / 3


@dataclasses.dataclass(frozen=True)
class ImageAugmentation:
    """What is done to a training image: a function of (seed, epoch, index) and of its pixels.

    Attributes:
        level: "light" or "strong".
        crops: whether the image is a whole photo, of which a random part is cut out and resized, and mirrored.
        flip: whether a mirrored image keeps its label. Where it does not, it is neither turned nor sheared.
        size: height and width of the result, in pixels.
        interpolation: the filter of the crops, see `nin.data.ResizeOptions`.
        fill: the value of each channel of what is uncovered or erased, 0 to 255.
        seed: of the run.
        epoch: from 0.
    """

    level: str
    crops: bool
    flip: bool
    size: int
    interpolation: str
    fill: tuple[int, ...]
    seed: int
    epoch: int

    def __call__(self, pixels: Pixels, index: int) -> Pixels:
        """Return the augmented image, uint8 (C, size, size).

        Args:
            pixels: uint8 (H, W, C); a square of `size` pixels where nothing is cropped.
            index: of the image in its set, see `nin.data.batches`.
        """
        draw = random.Random(stream_key("augment", self.seed, self.epoch, index)).random
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        if self.crops:
            box = random_box(image.width, image.height, SMALLEST_CROP, draw)
            image = image.resize((self.size, self.size), FILTERS[self.interpolation], box)
            if self.flip and self._is_mirrored(index):
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.level == "strong":
            image = _jitter_colours(image, draw)
            image = trivial_augment(image, draw, turns=self.flip, fill=self.fill)
        result = np.array(image, dtype=np.uint8).reshape(self.size, self.size, -1)
        if self.level == "strong":
            _erase(result, self.fill, draw)
        return np.ascontiguousarray(result.transpose(2, 0, 1))

    def _is_mirrored(self, index: int) -> bool:
        """Return whether it is mirrored in this epoch: in every second one, as `nin.data.augment` does."""
        hashed = int(hash_indices(torch.tensor(index), stream_key("flip", self.seed)))
        return (hashed + self.epoch) % 2 == 1


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AugmentedSet(DecodedSet):
    """A training set whose images are augmented each time they are fetched, in the threads that decode.

    Attributes:
        source: the images.
        augmentation: what is done to them.
    """

    source: ImageSet | DecodedSet
    augmentation: ImageAugmentation

    @classmethod
    def of(cls, source: ImageSet | DecodedSet, augmentation: ImageAugmentation) -> "AugmentedSet":
        """Return the set of a source's images, augmented."""
        names = source.names if isinstance(source.names, PathList) else PathList(source.names or ())
        return cls(
            source=source,
            augmentation=augmentation,
            labels=source.labels,
            names=names,
            channels=source.channels,
            size=augmentation.size,
        )

    def __len__(self) -> int:
        return len(self.source)

    def photo(self, index: int) -> Pixels:
        """Return one whole photo, as it is."""
        return self.source.photo(index)

    def decode(self, index: int) -> Pixels:
        """Return one image, decoded and augmented: (channels, size, size)."""
        return self.load(index)

    def load(self, number: int) -> Pixels:
        """Return one image, augmented in another way each time that it comes up in an epoch."""
        index = number % len(self)
        pixels = self.source.photo(index) if self.augmentation.crops else self.source.pixels(index).transpose(1, 2, 0)
        return self.augmentation(pixels, number)


def random_box(
    width: int, height: int, smallest: float, draw: Callable[[], float]
) -> tuple[float, float, float, float]:
    """Return a random part of an image: left, top, right, bottom, in pixels.

    Args:
        width: of the image.
        height: of the image.
        smallest: the part of the area that it keeps, at least.
        draw: returns a random number from 0 to 1.

    Source:
        torchvision's RandomResizedCrop, with corners that need not lie on whole pixels.
    """
    for _ in range(10):
        area = width * height * (smallest + (1 - smallest) * draw())
        aspect = LARGEST_ASPECT ** (2 * draw() - 1)
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = (width - w) * draw(), (height - h) * draw()
            return left, top, left + w, top + h
    # a panorama: as much of its middle as the proportions allow
    w, h = min(width, height * LARGEST_ASPECT), min(height, width * LARGEST_ASPECT)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


@functools.cache
def _torchvision() -> Any:
    """Return torchvision's functions; importing them takes a second or more, which only strong augmentation needs."""
    return importlib.import_module("torchvision.transforms.v2.functional")


def _jitter_colours(image: Image.Image, draw: Callable[[], float]) -> Image.Image:
    """Return the image with another brightness, contrast and saturation."""
    functions = _torchvision()
    for adjust in (functions.adjust_brightness, functions.adjust_contrast, functions.adjust_saturation):
        image = adjust(image, 1 + COLOUR_JITTER * (2 * draw() - 1))
    return image


def trivial_augment(image: Image.Image, draw: Callable[[], float], *, turns: bool, fill: Sequence[int]) -> Image.Image:
    """Return the image after one operation of `OPERATIONS`, drawn with its strength.

    Args:
        image: "L" or "RGB".
        draw: returns a random number from 0 to 1.
        turns: whether it may be turned and sheared.
        fill: the value of each channel of what is uncovered.

    Source:
        Müller, Hutter: TrivialAugment, ICCV 2021, arXiv 2103.10158; the operations and strengths of RandAugment.
    """
    operations = [operation for name, operation in OPERATIONS.items() if turns or name not in TURNS]
    operation = operations[int(draw() * len(operations))]
    return operation(_torchvision(), image, 2 * draw() - 1, list(fill))


Operation = Callable[[Any, Image.Image, float, list[int]], Image.Image]


def _affine(
    functions: Any, image: Image.Image, fill: list[int], *, translate: tuple[float, float], shear: tuple[float, float]
) -> Image.Image:
    """Return the image moved by parts of its size and sheared by slopes."""
    offset = [round(part * side) for part, side in zip(translate, image.size, strict=True)]
    degrees = [math.degrees(math.atan(slope)) for slope in shear]
    bilinear = functions.InterpolationMode.BILINEAR
    return functions.affine(image, 0.0, offset, 1.0, degrees, interpolation=bilinear, fill=fill)


# Each takes torchvision's functions, the image, the strength from -1 to 1 and the fill.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda f, image, s, fill: image,
    "rotate": lambda f, image, s, fill: f.rotate(image, 30 * s, f.InterpolationMode.BILINEAR, fill=fill),
    "shear_x": lambda f, image, s, fill: _affine(f, image, fill, translate=(0, 0), shear=(0.3 * s, 0)),
    "shear_y": lambda f, image, s, fill: _affine(f, image, fill, translate=(0, 0), shear=(0, 0.3 * s)),
    "translate_x": lambda f, image, s, fill: _affine(f, image, fill, translate=(s / 7, 0), shear=(0, 0)),
    "translate_y": lambda f, image, s, fill: _affine(f, image, fill, translate=(0, s / 7), shear=(0, 0)),
    "brightness": lambda f, image, s, fill: f.adjust_brightness(image, 1 + 0.9 * s),
    "contrast": lambda f, image, s, fill: f.adjust_contrast(image, 1 + 0.9 * s),
    "saturation": lambda f, image, s, fill: f.adjust_saturation(image, 1 + 0.9 * s),
    "sharpness": lambda f, image, s, fill: f.adjust_sharpness(image, 1 + 0.9 * s),
    "posterize": lambda f, image, s, fill: f.posterize(image, 8 - round(4 * abs(s))),
    "solarize": lambda f, image, s, fill: f.solarize(image, 255 * (1 - abs(s))),
    "autocontrast": lambda f, image, s, fill: f.autocontrast(image),
    "equalize": lambda f, image, s, fill: f.equalize(image),
}
TURNS = {"rotate", "shear_x", "shear_y"}


def _erase(pixels: Pixels, fill: Sequence[int], draw: Callable[[], float]) -> None:
    """Overwrite a random box of an image (H, W, C) by the fill, in place, as often as `ERASING_PROBABILITY` says."""
    if draw() >= ERASING_PROBABILITY:
        return
    height, width = pixels.shape[:2]
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * draw())
    aspect = ERASED_ASPECT ** (2 * draw() - 1)
    h, w = min(height, round(math.sqrt(area / aspect))), min(width, round(math.sqrt(area * aspect)))
    top, left = int(draw() * (height - h + 1)), int(draw() * (width - w + 1))
    pixels[top : top + h, left : left + w] = fill
