"""Choose device, dtype and number of threads; the processor's name; and how glibc's malloc keeps memory."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from nin.errors import UserError
from nin.runtime import torchrun


def choose_device(name: str | torch.device, *, gpu: int | None = None) -> torch.device:
    """Return the device of that name; "auto" is a GPU where there is one.

    Every verb and every public function that computes asks here, before it loads anything.

    Args:
        name: auto, cpu, cuda, cuda:1, mps.
        gpu: index of the GPU that "auto" and "cuda" mean; in a job of several processes each has its own.

    Raises:
        UserError: there is no such device here, or it has no memory left.
    """
    if not isinstance(name, str | torch.device):
        raise UserError(f"device must be a name such as 'cpu' or 'cuda:0', got {name!r}")
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torchrun.world_size() > 1 and gpu is None:
        # where each process is shown one GPU (CUDA_VISIBLE_DEVICES, a container each), it is its own, whatever its rank
        gpu = torchrun.local_rank() if torch.cuda.device_count() > 1 else 0
    if name == "cuda" and gpu is not None:
        name = f"cuda:{gpu}"
    refused = f"device must be auto or one of this machine ({', '.join(available_devices())}), got {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(refused) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "meta":
        raise UserError(f"{refused}: it computes no values")
    try:
        torch.zeros(1, device=device)
    # PyTorch has a class of error for each kind of missing backend; one that is a package of its own is imported
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = " ".join(str(error).split(". ")[0].split())[:160].rstrip(".")
        if "out of memory" in reason:
            raise UserError(f"device {name!r} has no memory left: end what fills it, or give another") from error
        raise UserError(f"{refused}: {reason}") from error
    return device


def available_devices() -> list[str]:
    """Return the names of this machine's devices."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


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
