"""The compiled CPU library, loaded with ctypes: its functions, instruction sets, thread pool and errors."""

import ctypes
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from nin.version import installed_version

LIBRARY_NAME = "libnin_cpu.so"
ISA_VARIABLE = "NIN_CPU_ISA"
# the best first
INSTRUCTION_SETS = ("avx512_amx", "avx512_bf16", "avx512", "avx2", "portable")
# with their codes in the C interface
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# nin_weights_changed of nin_status
WEIGHTS_CHANGED = 3

# nin_interface of the library that this package calls
INTERFACE = 10


def find_library() -> Path | None:
    """Return the path of the compiled library; None if the package was installed without a compiler."""
    # an editable installation has two folders: the sources, and the one that the build installed into
    folders = [Path(folder) for folder in sys.modules[__package__].__path__]
    return next((folder / LIBRARY_NAME for folder in folders if (folder / LIBRARY_NAME).exists()), None)


def load_library(path: Path | None) -> ctypes.CDLL | None:
    """Load the compiled library and declare its functions.

    Args:
        path: of the library, or None.

    Returns:
        The library; None without a path.

    Raises:
        ImportError: the library cannot be loaded, or belongs to another version of the package.
    """
    if path is None:
        return None
    try:
        # a CDLL's functions release the interpreter's lock, so that threads which read images go on meanwhile
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"nin's compiled CPU library {path} cannot be loaded: {error}") from error
    library.nin_version.restype = ctypes.c_char_p
    built, expected = library.nin_version().decode(), installed_version()
    if built != expected:
        raise ImportError(f"{path} must be of version {expected}, got {built}: install nin again")
    if not hasattr(library, "nin_interface") or library.nin_interface() != INTERFACE:
        raise ImportError(f"{path} was built from other sources than these: install nin again")
    # blob: the bytes of a struct; status: nin_status, see `check`
    pointer, blob, size, real = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_double
    status = ctypes.c_int32
    for name, result, arguments in (
        ("nin_find_kernels", pointer, [blob, size]),
        ("nin_packed_bytes", size, [pointer, blob]),
        ("nin_hash", status, [pointer, blob, size, pointer, blob]),
        ("nin_pack", None, [pointer, blob, pointer, pointer]),
        ("nin_winograd_size", size, [pointer, blob, size]),
        ("nin_winograd_weights", None, [size, size, pointer]),
        ("nin_winograd_packed_bytes", size, [pointer, blob, size]),
        ("nin_winograd_pack", status, [pointer, blob, size, pointer, pointer, blob]),
        ("nin_winograd_gradient", status, [pointer, blob, size, pointer, pointer, pointer, blob]),
        ("nin_tap_gradient", status, [pointer, blob, blob, size, pointer, pointer, pointer, pointer, size, blob]),
        ("nin_forward_scratch_bytes", size, [pointer, blob, blob, size]),
        ("nin_forward", status, [pointer, blob, blob, pointer, pointer, blob, blob, blob, size]),
        ("nin_inverted_bottleneck", status, [pointer, blob, blob, size, pointer, pointer, blob, blob, blob, size]),
        ("nin_run_steps", status, [blob, pointer, size, blob, blob]),
        ("nin_backward", status, [pointer, blob, blob, blob, blob, pointer, pointer, pointer, pointer, blob]),
        ("nin_peak_flops", real, [pointer, blob, real]),
        ("nin_copy_bytes_per_second", real, [blob, pointer, pointer, size]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@dataclass(frozen=True)
class Kernels:
    """The kernels of one instruction set.

    Attributes:
        name: of the instruction set.
        handles: for each dtype the address of the library's table of kernels.
    """

    name: str
    handles: dict[torch.dtype, int]


def find_kernels(library: ctypes.CDLL, wanted: str | None = None) -> Kernels:
    """Return the kernels of the best instruction set that the machine has, at most ``wanted``."""
    start = INSTRUCTION_SETS.index(wanted) if wanted else 0
    for name in INSTRUCTION_SETS[start:]:
        handles = {dtype: library.nin_find_kernels(name.encode(), code) for dtype, code in DTYPES.items()}
        if all(handles.values()):
            return Kernels(name, handles)
    raise ImportError("nin's compiled CPU library holds no kernels: install nin again")


def _find_parallel_for() -> int:
    """Return the address of PyTorch's ``torch_parallel_for``; 0 if it has none and the library starts threads."""
    # the same threads for both, so that torch.set_num_threads holds and no two pools share the cores
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except AttributeError:
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def thread_pool() -> bytes:
    """Return the struct ``nin_thread_pool``: PyTorch's threads, as many as PyTorch uses now."""
    return struct.pack("2q", PARALLEL_FOR, torch.get_num_threads())


def check(status: int) -> None:
    """Raise the exception for a ``nin_status``.

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
    """Return the library, which must be there."""
    assert LIBRARY is not None
    return LIBRARY
