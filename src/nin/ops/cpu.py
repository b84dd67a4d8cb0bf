"""Loads the compiled CPU library and says what it is; the kernels in it register over the reference."""

from __future__ import annotations

import ctypes
import sys
from importlib.metadata import version
from pathlib import Path

LIBRARY_NAME = "libnin_cpu.so"


def find_library() -> Path | None:
    """Return the compiled library's path, or None where the package was installed without a compiler."""
    # An editable installation has two folders: the sources, and the one that the build installed into.
    folders = [Path(folder) for folder in sys.modules[__package__].__path__]
    return next((folder / LIBRARY_NAME for folder in folders if (folder / LIBRARY_NAME).exists()), None)


def load_library() -> ctypes.CDLL | None:
    """Load the compiled library.

    Returns:
        The library, or None where there is none.

    Raises:
        ImportError: the library is there and cannot be loaded, or belongs to another version of the package.
    """
    path = find_library()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"nin's compiled CPU library {path} cannot be loaded: {error}") from error
    library.nin_version.restype = ctypes.c_char_p
    built, expected = library.nin_version().decode(), version("nin")
    if built != expected:
        raise ImportError(f"{path} must be of version {expected}, got {built}: install nin again")
    return library


def describe() -> str:
    """Return one line for ``nin.backends()``."""
    if LIBRARY is None:
        return "reference (PyTorch): installed without a C++ compiler, there is no compiled library"
    return f"reference (PyTorch): the compiled library {LIBRARY.nin_version().decode()} holds no kernel yet"


LIBRARY = load_library()
