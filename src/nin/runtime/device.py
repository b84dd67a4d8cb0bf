"""Choose device, dtype and number of threads; the processor's name; and how glibc's malloc keeps memory."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from nin.errors import UserError


def choose_device(name: str, *, gpu: int | None = None) -> torch.device:
    """Return the device of that name; "auto" is a GPU where there is one.

    Args:
        name: auto, cpu, cuda, cuda:1, mps.
        gpu: index of the GPU that "auto" and "cuda" mean, where each process of a job has its own.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and gpu is not None:
        name = f"cuda:{gpu}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device must be auto, cpu or a GPU of this machine, got {name!r}") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a precision; "auto" is bf16 where the device has instructions for it, else fp32."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu_has_bf16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cpu_has_bf16() -> bool:
    """Return whether this processor multiplies bf16 (AVX-512 BF16, which every processor with AMX has too)."""
    return bool(torch.cpu._is_avx512_bf16_supported())


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use that many threads within the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor_name() -> str:
    """Return the processor's name from /proc/cpuinfo, or what Python knows on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def keep_freed_memory() -> bool:
    """Set glibc's malloc to keep freed memory for the next step instead of returning it to the system.

    Without it page faults of the activations take a third to a half of every step. It holds for the whole process and
    cannot be undone.

    Returns:
        Whether it was done: not on other systems and C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is None or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX of <malloc.h>
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 * 2**20))
    return all(mallopt(name, value) == 1 for name, value in settings)
