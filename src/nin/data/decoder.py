"""Decode an image file to a uint8 tensor: EXIF orientation, alpha over white, grey or RGB, centre crop, resize."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nin.errors import UserError

# The extensions of image files, and the format of Pillow's that each names.
IMAGE_EXTENSIONS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}

# Only these are tried, whatever a file is called: Pillow would run Ghostscript on a PostScript file.
FORMATS = tuple(dict.fromkeys(IMAGE_EXTENSIONS.values()))

# What Pillow raises on damaged or hostile bytes. DecompressionBombError guards memory; warnings come as
# exceptions where the caller made them so.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# Not ImageOps.exif_transpose: it writes the EXIF block anew, which can fail where only that block is damaged.
_ORIENTATION_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource = str | os.PathLike[str] | bytes | io.BufferedReader | Image.Image
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageHeader:
    """The header of an image file, read without its pixels.

    Attributes:
        width: in pixels.
        height: in pixels.
        grey: it has no colours.
        format: one of `FORMATS`, or "MPO", a JPEG with more pictures behind the first.
        frames: whether there are more than one; the first is read.
    """

    width: int
    height: int
    grey: bool
    format: str
    frames: bool


class DecodeError(UserError):
    """An image that cannot be read.

    Args:
        name: the path of its file, or what stands for it.
        reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


def decode(source: ImageSource, *, size: int | None, channels: int) -> Tensor:
    """Decode one image.

    EXIF orientation is applied. Transparent pixels are composited over white, the background that viewers
    show; what colour a file stores under full transparency is arbitrary. 16-bit values are divided by 257,
    so that 65535 becomes 255. CMYK and palettes become RGB. Of an animation the first frame is read. The
    centre square is resized to `size` with an antialiased bicubic filter, which is the same as resizing the
    shorter side and cropping.

    Args:
        source: a path, the bytes of an image file, a file that is open, or a Pillow image.
        size: height and width of the result in pixels; None keeps the whole image as it is.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 (channels, size, size), or (channels, H, W) with size=None.

    Raises:
        DecodeError: the file cannot be read; the message names it and says why.
        ValueError: channels is neither 1 nor 3, or size is below 1.
    """
    return torch.from_numpy(decode_pixels(source, size=size, channels=channels))


def decode_pixels(source: ImageSource, *, size: int | None, channels: int) -> Pixels:
    """Decode one image in NumPy, for `decode`: small tensor copies would start a thread pool in each worker."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    with _open_image(source) as image:
        if size is not None and not isinstance(source, Image.Image):
            # Lets libjpeg decode at a fraction of the size, with twice what is needed left to the filter.
            image.draft(None, (2 * size, 2 * size))
        image.load()
        # after load(): for TIFF that has turned the image itself
        transpose = _ORIENTATION_TRANSPOSE.get(_orientation(image))
        flat = _flatten(image).convert("L" if channels == 1 else "RGB")
        if transpose is not None:
            flat = flat.transpose(transpose)
        if size is not None:
            flat = ImageOps.fit(flat, (size, size), Image.Resampling.BICUBIC)
        pixels = np.array(flat, dtype=np.uint8).reshape(flat.height, flat.width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_header(source: ImageSource) -> ImageHeader:
    """Read the size and kind of an image file, not its pixels.

    Raises:
        DecodeError: the file is missing, empty or not an image.
    """
    with _open_image(source) as image:
        grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
        return ImageHeader(image.width, image.height, grey, image.format or "", _has_frames(image))


def _has_frames(image: Image.Image) -> bool:
    """Return whether a second frame follows. What is damaged behind the first does not concern us."""
    with contextlib.suppress(*_DECODING_ERRORS):
        return bool(getattr(image, "is_animated", False))
    return False


@contextlib.contextmanager
def _open_image(source: ImageSource) -> Iterator[Image.Image]:
    """Open the source, and make an error of Pillow's inside the block a DecodeError that names the file."""
    file: io.BytesIO | io.BufferedReader | str
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "image")
    elif isinstance(source, bytes):
        name, file = "image bytes", io.BytesIO(source)
    elif isinstance(source, io.BufferedReader):
        name, file = source.name, source
    else:
        # no Path: the names of 250,000 paths and Python makes its table of interned strings anew, 7 MB of it
        name = file = os.fspath(source)
    try:
        if isinstance(source, Image.Image):
            yield source
        else:
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except _DECODING_ERRORS as error:
        raise DecodeError(name, failure_reason(error)) from error


def failure_reason(error: BaseException) -> str:
    """Return in a few words why an image cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "empty, not an image, or damaged at its start"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened ({error.strerror})"
    words = " ".join(str(error).split()) or type(error).__name__
    return f"damaged or not supported ({words})"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none or the EXIF block is damaged."""
    with contextlib.suppress(*_DECODING_ERRORS):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image without alpha, palette and wide integers: a mode that converts to L or RGB."""
    if image.mode.startswith("I") or image.mode == "F":  # Image.convert would clip them at 255 and not scale
        values = np.asarray(image)
        top = 1 if values.dtype.kind == "f" else 65535
        error = f"pixel values must be in 0..{top} for {values.dtype}"
        return Image.fromarray(scale_to_uint8(values, top=top, error=error))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image


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
