"""Decode an image file to a uint8 tensor: EXIF orientation, alpha over white, value range, resize."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from nin.data.image_formats import formats_to_try, is_heif
from nin.data.resizing import CENTRE_SQUARE, ResizeOptions, draft_size, resize_photo, resize_to_square
from nin.data.value_range import (
    BYTES,
    Extent,
    Pixels,
    ValueRange,
    extent,
    is_wide,
    read_lower_bytes,
    scale_range,
    wide_rawmode,
)
from nin.errors import UserError
from nin.version import install_command

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
    AssertionError,
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


@dataclass(frozen=True)
class ImageHeader:
    """The header of an image file, read without its pixels.

    Attributes:
        width: in pixels.
        height: in pixels.
        grey: it has no colours.
        format: one of `nin.data.image_formats.FORMATS`.
        frames: whether there are more than one; the first is read.
        wide: its values are 16-bit or longer integers, or floats.
    """

    width: int
    height: int
    grey: bool
    format: str
    frames: bool
    wide: bool = False


class DecodeError(UserError):
    """An image that cannot be read.

    Args:
        name: the path of its file, or what stands for it.
        reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


def decode(
    source: ImageSource,
    *,
    size: int | None,
    channels: int,
    value_range: ValueRange | None = None,
    resize: ResizeOptions = CENTRE_SQUARE,
) -> Tensor:
    """Decode one image.

    EXIF orientation is applied. Transparent pixels are composited over white, the background that viewers
    show; what colour a file stores under full transparency is arbitrary. CMYK and palettes become RGB. Of an animation
    the first frame is read. Unless `resize` says otherwise, the centre square is resized to `size` with an antialiased
    bicubic filter, which is the same as resizing the shorter side and cropping.

    Args:
        source: a path, the bytes of an image file, a file that is open, or a Pillow image.
        size: height and width of the result in pixels; None keeps the whole image as it is.
        channels: 1 for grey, 3 for RGB.
        value_range: the values that become 0 and 255 in images of 16-bit or longer integers and of floats; others lie
            beyond black and white. None takes 0 and 65535 for integers, 0 and 1 for floats.
        resize: how the image becomes a square; nothing where size is None.

    Returns:
        uint8 (channels, size, size), or (channels, H, W) with size=None.

    Raises:
        DecodeError: the file cannot be read; the message names it and says why.
        ValueError: channels is neither 1 nor 3, or size is below 1.
    """
    if size is None:
        with _flat_image(source, None, size=None, channels=channels, value_range=value_range) as flat:
            return torch.from_numpy(_planes(flat))
    options: DecodeOptions = {"size": size, "channels": channels, "value_range": value_range, "resize": resize}
    return torch.from_numpy(decode_pixels(source, **options))


class DecodeOptions(TypedDict):
    """The arguments of `decode` that say what an image becomes."""

    size: int
    channels: int
    value_range: NotRequired[ValueRange | None]
    resize: NotRequired[ResizeOptions]


class DecodedTo(Protocol):
    """What says so by its attributes: a set of images, or the preprocessing of a network."""

    @property
    def size(self) -> int:
        """Height and width, in pixels."""

    @property
    def channels(self) -> int:
        """1 or 3."""

    @property
    def value_range(self) -> ValueRange | None:
        """What becomes black and white in images with more than 8 bits."""

    @property
    def resize(self) -> ResizeOptions:
        """How an image becomes a square."""


def decode_options(wanted: DecodedTo) -> DecodeOptions:
    """Return what an image becomes as arguments of `decode`."""
    return {
        "size": wanted.size,
        "channels": wanted.channels,
        "value_range": wanted.value_range,
        "resize": wanted.resize,
    }


def decode_pixels(source: ImageSource, *, name: str | None = None, **options: Unpack[DecodeOptions]) -> Pixels:
    """Decode one image in NumPy, for `decode`: small tensor copies would start a thread pool in each worker.

    Args:
        source: see `decode`.
        name: of the file that bytes come from; its extension tells formats that have no signature.
        **options: see `decode`.
    """
    with _flat_image(source, name, **options) as flat:
        return _square(flat, **options)


def decode_photo(source: ImageSource, *, name: str | None = None, **options: Unpack[DecodeOptions]) -> Pixels:
    """Decode one whole image, from which random crops of `size` are taken: (H, W, channels), see `resize_photo`.

    Args:
        source: see `decode`.
        name: see `decode_pixels`.
        **options: see `decode`.
    """
    with _flat_image(source, name, **options) as flat:
        return _photo(flat, **options)


def decode_both(
    source: ImageSource, *, name: str | None = None, **options: Unpack[DecodeOptions]
) -> tuple[Pixels, Pixels]:
    """Decode one image once and return what `decode_pixels` and `decode_photo` do."""
    with _flat_image(source, name, **options) as flat:
        return _square(flat, **options), _photo(flat, **options)


def _square(image: Image.Image, **options: Unpack[DecodeOptions]) -> Pixels:
    return _planes(resize_to_square(image, options["size"], options.get("resize", CENTRE_SQUARE)))


def _photo(image: Image.Image, **options: Unpack[DecodeOptions]) -> Pixels:
    return _rows(resize_photo(image, options["size"], options.get("resize", CENTRE_SQUARE)))


def _rows(image: Image.Image) -> Pixels:
    """Return an image as (H, W, C)."""
    return np.array(image, dtype=np.uint8).reshape(image.height, image.width, -1)


def _planes(image: Image.Image) -> Pixels:
    """Return an image as (C, H, W)."""
    return np.ascontiguousarray(_rows(image).transpose(2, 0, 1))


@contextlib.contextmanager
def _flat_image(
    source: ImageSource,
    name: str | None,
    *,
    size: int | None,
    channels: int,
    value_range: ValueRange | None = None,
    resize: ResizeOptions = CENTRE_SQUARE,
) -> Iterator[Image.Image]:
    """Decode an image to "L" or "RGB", upright; the arguments are those of `decode_pixels`."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    with _open_image(source, name) as image:
        if size is not None and not isinstance(source, Image.Image):
            # lets libjpeg decode at a fraction of the size
            image.draft(None, draft_size(image.width, image.height, size, resize))
        rawmode = wide_rawmode(image) if value_range is not None else None
        image.load()
        # after load(): for TIFF that has turned the image itself
        transpose = _ORIENTATION_TRANSPOSE.get(_orientation(image))
        if rawmode is not None and not isinstance(source, Image.Image):
            image = _narrow_colours(image, _wide_colours(image, source, name), value_range)
        flat = _flatten(image, value_range).convert("L" if channels == 1 else "RGB")
        if transpose is not None:
            flat = flat.transpose(transpose)
        yield flat


def read_header(source: ImageSource, name: str | None = None) -> ImageHeader:
    """Read the size and kind of an image file, not its pixels.

    Args:
        source: see `decode`.
        name: of the file that bytes come from, see `decode_pixels`.

    Raises:
        DecodeError: the file is missing, empty or not an image.
    """
    with _open_image(source, name) as image:
        wide = is_wide(image)
        grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
        return ImageHeader(image.width, image.height, grey, image.format or "", _has_frames(image), wide)


def read_extent(source: ImageSource, name: str | None = None) -> Extent:
    """Read the smallest and the largest value of an image that may have more than 8 bits a channel.

    Raises:
        DecodeError: it cannot be read, or no value is a finite number.
    """
    with _open_image(source, name) as image:
        if not is_wide(image):
            return Extent(BYTES, 0, 255)
        is_colour = wide_rawmode(image) is not None
        image.load()
        return extent(_wide_colours(image, source, name) if is_colour else np.asarray(image))


def _wide_colours(image: Image.Image, source: ImageSource, name: str | None) -> NDArray[np.uint16]:
    """Return the 16-bit colours of an image, uint16 (H, W, 3), from its upper bytes and those of a second reading."""
    with _open_image(source, name) as again:
        assert isinstance(again, ImageFile.ImageFile)  # it comes from a file
        read_lower_bytes(again)
        lower = np.asarray(again)[:, :, :3].astype(np.uint16)
    return np.asarray(image)[:, :, :3].astype(np.uint16) * 256 + lower


def _narrow_colours(image: Image.Image, values: NDArray[np.uint16], value_range: ValueRange | None) -> Image.Image:
    """Return the image with its colours scaled to bytes by the range; alpha stays."""
    narrow = Image.fromarray(scale_range(values, value_range))
    if image.mode == "RGBA":
        narrow.putalpha(image.getchannel("A"))
    return narrow


def _has_frames(image: Image.Image) -> bool:
    """Return whether a second frame follows. What is damaged behind the first does not concern us."""
    with contextlib.suppress(*_DECODING_ERRORS):
        return bool(getattr(image, "is_animated", False))
    return False


@contextlib.contextmanager
def _open_image(source: ImageSource, given_name: str | None = None) -> Iterator[Image.Image]:
    """Open the source, and make an error of Pillow's inside the block a DecodeError that names the file."""
    file: io.BytesIO | io.BufferedReader | str
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "image")
    elif isinstance(source, bytes):
        name, file = given_name or "image bytes", io.BytesIO(source)
    elif isinstance(source, io.BufferedReader):
        name, file = source.name, source
    else:
        # no Path: the names of 250,000 paths and Python makes its table of interned strings anew, 7 MB of it
        name = file = os.fspath(source)
    try:
        if isinstance(source, Image.Image):
            yield source
        else:
            with Image.open(file, formats=formats_to_try(str(name))) as image:
                yield image
    except UnidentifiedImageError as error:
        is_photo = not isinstance(source, Image.Image) and is_heif(_first_bytes(file))
        reason = f"a HEIC photo: {install_command('heic')}" if is_photo else failure_reason(error)
        raise DecodeError(name, reason) from error
    except _DECODING_ERRORS as error:
        raise DecodeError(name, failure_reason(error)) from error


def _first_bytes(file: io.BytesIO | io.BufferedReader | str) -> bytes:
    """Return the bytes that tell the format of a file; none where it cannot be read any more."""
    with contextlib.suppress(OSError):
        if isinstance(file, str):
            with open(file, "rb") as opened:
                return opened.read(12)
        file.seek(0)
        return file.read(12)
    return b""


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


def _flatten(image: Image.Image, value_range: ValueRange | None) -> Image.Image:
    """Return the image without alpha, palette and wide integers: a mode that converts to L or RGB."""
    if image.mode.startswith("I") or image.mode == "F":  # Image.convert would clip them at 255 and not scale
        return Image.fromarray(scale_range(np.asarray(image), value_range))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image
