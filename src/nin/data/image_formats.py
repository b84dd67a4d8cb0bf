"""Image formats: those that Pillow reads here, the one that a file's name promises, and whether a file is an image."""

import importlib.util
import inspect
import os

from PIL import Image, ImageFile

# Pillow knows these and reads no pixels of them by itself: EPS would run Ghostscript on a file of somebody else's,
# MPEG has no decoder.
_EXCLUDED = {"EPS", "MPEG"}

# The photos of iPhones, which Pillow reads with the package pillow_heif.
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def _readable_formats() -> dict[str, bool]:
    """Return the formats that this Pillow decodes by itself, and whether their first bytes tell them."""
    Image.preinit()  # the usual formats come first, and are tried first
    Image.init()
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    formats = {}
    for name, (factory, accept) in Image.OPEN.items():
        # a stub knows the header only and hands the pixels to what another package registers
        is_stub = inspect.isclass(factory) and issubclass(factory, ImageFile.StubImageFile)
        if not is_stub and name not in _EXCLUDED:
            formats[name] = accept is not None
    return formats


_READABLE = _readable_formats()

# The formats that are tried on every file, whatever it is called. Those without a signature (TGA, …) would take other
# files for theirs, so they are tried where the name promises them.
SIGNED_FORMATS = tuple(name for name, is_signed in _READABLE.items() if is_signed)

# All formats; "MPO" is a JPEG with more pictures behind the first, as phones write it.
FORMATS = (*_READABLE, "MPO")

# The extensions of image files, and the format that each names.
IMAGE_EXTENSIONS = {
    **{extension: name for extension, name in Image.registered_extensions().items() if name in _READABLE},
    ".mpo": "JPEG",
    # without the package too: then they are listed with what to install
    **dict.fromkeys(HEIF_EXTENSIONS, "HEIF"),
}

# For messages: the list of all extensions is too long to be read.
FORMAT_EXAMPLES = "JPEG, PNG, WebP, AVIF, TIFF, BMP, GIF, PPM, TGA and what else Pillow reads"


def named_format(name: str) -> str | None:
    """Return the format that the extension of a file names, or None."""
    return IMAGE_EXTENSIONS.get(os.path.splitext(name)[1].lower())


def formats_to_try(name: str) -> tuple[str, ...]:
    """Return the formats that a file of this name may have: any with a signature, and the one that it names."""
    named = named_format(name)
    return SIGNED_FORMATS if named is None or _READABLE.get(named, True) else (*SIGNED_FORMATS, named)


def is_heif(start: bytes) -> bool:
    """Return whether a file that begins so is a HEIF image, whatever it is called."""
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS


def file_extension(name: str, file_format: str) -> str:
    """Return the extension for a copy of a file: its own where that names an image, else one of its format."""
    own = os.path.splitext(name)[1].lower()
    if own in IMAGE_EXTENSIONS:
        return own
    usual = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}
    return usual.get(file_format) or next(e for e, named in IMAGE_EXTENSIONS.items() if named == file_format)
