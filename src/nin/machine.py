"""The machine: which device and number type to compute with, how many threads, and how glibc keeps memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch

from nin.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device must be auto, cpu or a GPU of this machine, got {name!r}") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that convolutions multiply in: bf16 where the processor has instructions for it, else fp32."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu_multiplies_bf16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Return whether this processor has matrix instructions for bf16 (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported())


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Compute on that many threads, and on as many as before afterwards; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for the next step instead of giving them back to the system.

    Without it every step pays for the page faults of its activations again, a third to a half of the time. It
    holds for the whole process; on other systems there is nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a C library other than glibc
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 * 2**20)
