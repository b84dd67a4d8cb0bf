"""The compiled CPU library: found, loaded, which instruction sets this machine has, PyTorch's threads for it."""

from __future__ import annotations

import ctypes
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from nin import distribution

LIBRARY_NAME = "libnin_cpu.so"
ISA_VARIABLE = "NIN_CPU_ISA"
INSTRUCTION_SETS = ("avx512_amx", "avx512_bf16", "avx512", "avx2", "portable")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def find_library() -> Path | None:
    """Return the compiled library's path, or None where the package was installed without a compiler."""
    # An editable installation has two folders: the sources, and the one that the build installed into.
    folders = [Path(folder) for folder in sys.modules[__package__].__path__]
    return next((folder / LIBRARY_NAME for folder in folders if (folder / LIBRARY_NAME).exists()), None)


def load_library(path: Path | None) -> ctypes.CDLL | None:
    """Load the compiled library.

    Args:
        path: of the library, or None where there is none.

    Returns:
        The library, or None.

    Raises:
        ImportError: the library is there and cannot be loaded, or belongs to another version of the package.
    """
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"nin's compiled CPU library {path} cannot be loaded: {error}") from error
    library.nin_version.restype = ctypes.c_char_p
    built, expected = library.nin_version().decode(), distribution.version()
    if built != expected:
        raise ImportError(f"{path} must be of version {expected}, got {built}: install nin again")
    pointer, row, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    real = ctypes.c_double
    for name, result, arguments in (
        ("nin_find_kernels", pointer, [row, size]),
        ("nin_packed_bytes", size, [pointer, row]),
        ("nin_sample", ctypes.c_uint64, [pointer, size]),
        ("nin_hash", ctypes.c_uint64, [pointer, size]),
        ("nin_pack", None, [pointer, row, pointer, pointer]),
        ("nin_winograd_size", size, [pointer, row, size]),
        ("nin_winograd_weights", None, [size, size, pointer]),
        ("nin_winograd_pack", ctypes.c_int32, [pointer, row, size, pointer, pointer, row]),
        ("nin_winograd_gradient", ctypes.c_int32, [pointer, row, size, pointer, pointer, pointer, row]),
        ("nin_tap_gradient", ctypes.c_int32, [pointer, row, row, size, pointer, pointer, pointer, pointer, size, row]),
        ("nin_forward_scratch_bytes", size, [pointer, row, row, size]),
        ("nin_forward", ctypes.c_int32, [pointer, row, row, pointer, pointer, row]),
        ("nin_backward_scratch_bytes", size, [pointer, row, row, row, row]),
        ("nin_backward", ctypes.c_int32, [pointer, row, row, row, row, pointer, pointer, pointer, pointer, row]),
        ("nin_peak_flops", real, [pointer, row, real]),
        ("nin_copy_bytes_per_second", real, [row, pointer, pointer, size]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@dataclass(frozen=True)
class Kernels:
    """The kernels of one instruction set: the library's handle for each dtype."""

    name: str
    handles: dict[torch.dtype, int]


def find_kernels(library: ctypes.CDLL, wanted: str | None = None) -> Kernels:
    """Return the kernels of ``wanted``, or of the best instruction set below it that the machine has."""
    start = INSTRUCTION_SETS.index(wanted) if wanted else 0
    for name in INSTRUCTION_SETS[start:]:
        handles = {dtype: library.nin_find_kernels(name.encode(), code) for dtype, code in DTYPES.items()}
        if all(handles.values()):
            return Kernels(name, handles)
    raise ImportError("nin's compiled CPU library holds no kernels: install nin again")


def _find_parallel_for() -> int:
    """Return the address of PyTorch's ``torch_parallel_for``; 0 where it has none (the library starts threads)."""
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except AttributeError:
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def pool() -> bytes:
    """Return the library's ``nin_pool``: PyTorch's threads, as many as PyTorch uses now."""
    return struct.pack("2q", PARALLEL_FOR, torch.get_num_threads())


def check(status: int) -> None:
    """Raise what a status of the library stands for.

    Raises:
        MemoryError: the scratch could not be allocated.
        RuntimeError: PyTorch's thread pool failed.
    """
    if status == 1:
        raise MemoryError("nin's CPU kernel: not enough memory for its scratch")
    if status != 0:
        raise RuntimeError("nin's CPU kernel: PyTorch's thread pool failed")


LIBRARY = load_library(find_library())
PARALLEL_FOR = _find_parallel_for()


def loaded() -> ctypes.CDLL:
    """Return the library, for those who have kernels of it."""
    assert LIBRARY is not None
    return LIBRARY
