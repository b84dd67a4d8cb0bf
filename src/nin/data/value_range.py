"""Value ranges of images with more than 8 bits: what they hold, what becomes black and white, numbers to bytes."""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from nin.errors import UserError

Pixels = NDArray[np.uint8]

# The values that become 0 and 255.
ValueRange = tuple[float, float]

# How a set is read: with a range, with that of the type of its values, or with one that is chosen from its images.
RangeOption = ValueRange | Literal["auto"] | None

# What is recorded of an image: 8 bits and less; integers; floats; floats of which some are NaN or infinite.
BYTES, INTEGERS, FLOATS, NOT_FINITE = range(4)

# The value that is white where nothing else is known.
_TOPS = {INTEGERS: 65535.0, FLOATS: 1.0, NOT_FINITE: 1.0}

# The range holds this part of all images: a single hot pixel in one of a hundred must not make the others dark.
_COVERED = 0.99


class Extent(NamedTuple):
    """The values of an image.

    Attributes:
        depth: BYTES, INTEGERS, FLOATS or NOT_FINITE.
        low: the smallest finite value.
        high: the largest.
    """

    depth: int
    low: float
    high: float


def is_wide(image: Image.Image) -> bool:
    """Return whether an image, of which only the header may be read, has more than 8 bits a channel."""
    return image.mode.startswith("I") or image.mode == "F" or wide_rawmode(image) is not None


def wide_rawmode(image: Image.Image) -> str | None:
    """Return how the 16-bit colours of an image that was not loaded lie in its file, None for other images.

    Pillow keeps the upper byte of each. The raw mode of the other byte order is the lower one.
    """
    for tile in getattr(image, "tile", None) or ():
        arguments: Any = tile[3]
        rawmode = arguments[0] if isinstance(arguments, tuple) else arguments
        if image.mode in ("RGB", "RGBA") and rawmode in (f"{image.mode};16{order}" for order in "BL"):
            return str(rawmode)
    return None


def read_lower_bytes(image: ImageFile.ImageFile) -> None:
    """Make an image that was not loaded read the lower bytes of its 16-bit colours, by taking the other byte order."""
    swapped = []
    for tile in image.tile:
        arguments: Any = tile.args
        rawmode = arguments[0] if isinstance(arguments, tuple) else arguments
        other = rawmode[:-1] + ("L" if rawmode.endswith("B") else "B")
        swapped.append(tile._replace(args=(other, *arguments[1:]) if isinstance(arguments, tuple) else other))
    image.tile = swapped


def extent(values: NDArray[Any]) -> Extent:
    """Return the extent of the values of an image.

    Raises:
        ValueError: none of them is finite.
    """
    if values.dtype.kind != "f":
        return Extent(INTEGERS, float(values.min()), float(values.max()))
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ValueError("no pixel is a finite number")
    return Extent(FLOATS if finite.size == values.size else NOT_FINITE, float(finite.min()), float(finite.max()))


def choose_range(depths: NDArray[Any], lows: NDArray[Any], highs: NDArray[Any]) -> ValueRange | None:
    """Return what becomes black and white in a set of images, or None where that is the whole range of their type.

    12 bits stored in 16 would keep 16 of 256 grey levels, floats beyond 0 to 1 none.

    Args:
        depths: of each image, (N,).
        lows: the smallest value of each image.
        highs: the largest.
    """
    is_wide = depths != BYTES
    if not is_wide.any():
        return None
    low = float(np.quantile(lows[is_wide], 1 - _COVERED, method="lower"))
    high = float(np.quantile(highs[is_wide], _COVERED, method="higher"))
    top = max(_TOPS[int(depth)] for depth in np.unique(depths[is_wide]))
    is_whole = low >= 0 and high <= top and high - low > top / 2
    if (is_whole or low == high == 0) and not (depths == NOT_FINITE).any():
        return None
    return low, high


def scale_range(values: NDArray[Any], value_range: ValueRange | None) -> Pixels:
    """Return the values of an image as bytes.

    Args:
        values: integers or floats, any shape, not empty.
        value_range: what becomes 0 and 255; what is no number becomes 0. None takes the range of the type.

    Raises:
        UserError: the range is None and a value lies outside that of the type.
    """
    if value_range is None:
        top = _TOPS[FLOATS if values.dtype.kind == "f" else INTEGERS]
        return scale_to_uint8(values, top=top, error=f"pixel values must be in 0..{top:g} for {values.dtype}")
    low, high = value_range
    floats = values.astype(np.float64)
    if values.dtype.kind == "f":
        floats = np.nan_to_num(floats, nan=low, posinf=high, neginf=low)
    scaled: Pixels = np.rint((floats - low) * (255 / (high - low or 1))).clip(0, 255).astype(np.uint8)
    return scaled


def scale_to_uint8(values: NDArray[Any], *, top: float, error: str) -> Pixels:
    """Return numbers from 0 to `top` scaled to 0..255 and rounded, ties to even.

    Args:
        values: any shape, not empty.
        top: the value that becomes 255.
        error: the message for values outside, with {low} and {high} in it where it names them.

    Raises:
        UserError: a value is outside, or NaN.
    """
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise UserError(error.format(low=low, high=high))
    scaled: Pixels = np.rint(values * (255 / top)).astype(np.uint8)
    return scaled


def describe_range(depths: NDArray[Any], value_range: ValueRange | None) -> list[str]:
    """Return sentences for the user about the range of wide images."""
    notes = []
    if value_range is not None:
        top = max((_TOPS[int(depth)] for depth in np.unique(depths) if depth != BYTES), default=255)
        low, high = value_range
        notes.append(
            f"The values of the images with more than 8 bits are {low:,g} to {high:,g}, of 0 to {top:,g}: "
            "these two become black and white"
        )
    if damaged := int((depths == NOT_FINITE).sum()):
        notes.append(f"{damaged:,} images hold NaN or infinity, which become black and white")
    return notes
