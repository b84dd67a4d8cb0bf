"""Preprocessing: how an image becomes the input of the network of a run."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from nin.data.dataset import Data
from nin.data.decoder import DecodeOptions, decode_options
from nin.data.resizing import CENTRE_SQUARE, ResizeOptions

# Height and width of the largest input that a config.json may ask for: 800 MB of uint8.
LARGEST_SIZE = 16_384

# Mean and standard deviation of ImageNet's colours, with which most published networks were trained.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; what it does not say is what most published networks have.

    Attributes:
        size: height and width, in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: of each channel, for values from 0 to 1.
        std: of each channel, for values from 0 to 1.
        value_range: the values that become 0 and 1 in images with more than 8 bits; None for the range of their type.
        resize: how an image becomes a square.
    """

    size: int = 224
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    value_range: tuple[float, float] | None = None
    resize: ResizeOptions = CENTRE_SQUARE

    @classmethod
    def of(cls, images: Data) -> Self:
        """Return the preprocessing that made the images of a data set."""
        return cls(images.size, images.channels, images.mean, images.std, images.value_range, images.resize)

    @property
    def decoding(self) -> DecodeOptions:
        """The arguments of `nin.data.decode` that make the network's input of an image."""
        return decode_options(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the preprocessing that a ``config.json`` holds; version 0.1 wrote neither value range nor resizing.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        value_range = values.get("value_range") and tuple(values["value_range"])
        resize = ResizeOptions(**values.get("resize", {}))
        numbers = (int(values["size"]), int(values["channels"]), tuple(values["mean"]), tuple(values["std"]))
        preprocessing = cls(*numbers, value_range, resize)
        preprocessing.check()
        return preprocessing

    def check(self) -> None:
        """Check the ranges of values that came from a file.

        Raises:
            ValueError: a field is out of its range.
        """
        if not 1 <= self.size <= LARGEST_SIZE or self.channels not in (1, 3):
            raise ValueError(f"size must be 1 to {LARGEST_SIZE} and channels 1 or 3, got {self.size}, {self.channels}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std must have {self.channels} numbers, got {self.mean} and {self.std}")
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in self.mean + self.std) or min(self.std) <= 0:
            raise ValueError(f"mean and std must be finite and std positive, got {self.mean} and {self.std}")
        low, high = self.value_range or (0, 1)
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"value_range must be two finite numbers in order, got {self.value_range}")
