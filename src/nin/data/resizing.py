"""ResizeOptions: how an image of any shape becomes a square of pixels: cropped, squashed or letterboxed."""

import dataclasses
import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nin.errors import UserError

ResizeMode = Literal["crop", "squash", "letterbox"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "hamming", "box", "nearest"]

FILTERS = {name: Image.Resampling[name.upper()] for name in get_args(Interpolation)}

# The part of a photo's shorter side that a crop at full resolution has.
PHOTO_CROP = 0.875

# The bars beside a letterboxed image: the mean grey of ImageNet's photos, so that they are near zero once normalised.
BAR_GREY = 114


@dataclasses.dataclass(frozen=True)
class ResizeOptions:
    """How an image becomes a square. The defaults cut the centre square out, and are those of runs that record none.

    Attributes:
        mode: "crop" keeps the centre square; "squash" keeps the whole image and not its proportions; "letterbox" keeps
            both, with grey bars at two sides.
        interpolation: the filter, antialiased where it shrinks: "bicubic", "bilinear", "lanczos", "hamming", "box" or
            "nearest".
        crop_fraction: the part of width and height that is kept, around the centre, above 0 and at most 1. It is what
            timm calls crop_pct, and 224/256 where torchvision resizes to 256 pixels and crops 224.

    Raises:
        UserError: a value is none of these.
    """

    mode: ResizeMode = "crop"
    interpolation: Interpolation = "bicubic"
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        """Check the values, which may come from a file."""
        for name, words in (("mode", get_args(ResizeMode)), ("interpolation", tuple(FILTERS))):
            if getattr(self, name) not in words:
                raise UserError(f"resize: {name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        fraction: Any = self.crop_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise UserError(f"resize: crop_fraction must be above 0 and at most 1, got {fraction!r}")
        object.__setattr__(self, "crop_fraction", float(fraction))

    @classmethod
    def of(cls, value: "ResizeOptions | ResizeMode") -> "ResizeOptions":
        """Return the options that a mode stands for, or the options as they are.

        Example:
            >>> ResizeOptions.of("squash")
            ResizeOptions(mode='squash', interpolation='bicubic', crop_fraction=1.0)
        """
        return value if isinstance(value, ResizeOptions) else cls(value)

    def with_mode(self, mode: ResizeMode) -> "ResizeOptions":
        """Return these options in another mode, with the whole image kept: in its own mode, the options as they are."""
        return self if mode == self.mode else dataclasses.replace(self, mode=mode, crop_fraction=1.0)

    def __str__(self) -> str:
        """Return the options in words for the user."""
        part = "" if self.crop_fraction == 1 else f", the middle {100 * self.crop_fraction:.3g} % of the sides"
        return f"{self.mode} ({self.interpolation}{part})"


# What `nin.data.decode` does where nothing else is said.
CENTRE_SQUARE = ResizeOptions()


def resize_to_square(image: Image.Image, size: int, options: ResizeOptions, *, bar: float = BAR_GREY) -> Image.Image:
    """Return an image as a square.

    Args:
        image: "L", "RGB" or "F".
        size: height and width of the result in pixels.
        options: how.
        bar: the value of each channel in the bars of a letterbox.
    """
    resample, cut = FILTERS[options.interpolation], (1 - options.crop_fraction) / 2
    if options.mode == "crop":
        return ImageOps.fit(image, (size, size), resample, bleed=cut)
    left, top = cut * image.width, cut * image.height
    box = (left, top, image.width - left, image.height - top)
    if options.mode == "squash":
        return image.resize((size, size), resample, box)
    width, height = letterboxed_size(image.width, image.height, size)
    square = Image.new(image.mode, (size, size), bar if image.mode == "F" else (bar,) * len(image.getbands()))
    square.paste(image.resize((width, height), resample, box), ((size - width) // 2, (size - height) // 2))
    return square


def resize_photo(image: Image.Image, size: int, options: ResizeOptions) -> Image.Image:
    """Return a whole image, from which random crops of `size` pixels are taken; it is never enlarged.

    Its shorter side becomes `photo_side`. Squashed and letterboxed images become squares of that side, so that the
    crops of a training show what the network is given later. The crop fraction does not matter.

    Args:
        image: "L" or "RGB".
        size: of the crops.
        options: how images become squares.
    """
    if options.mode != "crop":
        side = min(photo_side(size), max(image.size))
        return resize_to_square(image, side, dataclasses.replace(options, crop_fraction=1.0))
    scale = min(1.0, photo_side(size) / min(image.size))
    shape = (round(image.width * scale), round(image.height * scale))
    return image if scale == 1 else image.resize(shape, FILTERS[options.interpolation])


def photo_side(size: int) -> int:
    """Return the shorter side of a photo from which crops of `size` pixels are taken."""
    return math.ceil(size / PHOTO_CROP)


def photo_bytes(widths: NDArray[np.int64], heights: NDArray[np.int64], channels: int, size: int) -> int:
    """Return how many bytes the photos of images take at most, whatever the mode."""
    side = photo_side(size)
    scales = np.minimum(1.0, side / np.minimum(widths, heights))
    areas = (widths * scales + 1) * (heights * scales + 1)
    return channels * int(np.maximum(areas, side * side).sum())


def letterboxed_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Return width and height of an image in its letterbox of size × size pixels."""
    scale = size / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draft_size(width: int, height: int, size: int, options: ResizeOptions) -> tuple[int, int]:
    """Return the smallest width and height at which a decoder may deliver an image: twice what is needed of it.

    The other half is left to the filter, which antialiases better than decoders do.

    Args:
        width: of the image in its file, in pixels.
        height: likewise.
        size: of the square that it is resized to.
        options: how.
    """
    needed = math.ceil(2 * size / options.crop_fraction)
    return letterboxed_size(width, height, needed) if options.mode == "letterbox" else (needed, needed)
