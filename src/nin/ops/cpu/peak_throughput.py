"""The CPU's measured roofline: peak multiply-adds on registers, and memory bandwidth of copies."""

import torch

from nin.ops.cpu import dispatch, library


def measure_peak_flops(dtype: torch.dtype, seconds: float = 0.05, rounds: int = 8) -> float | None:
    """Return the peak FLOP/s of multiply-adds on all threads; None without the compiled library.

    One multiply-add is two FLOP. For bfloat16 it is the peak of the kernels' own instruction: dot products of bfloat16
    pairs where the machine has them, else float32.

    Args:
        dtype: float32 or bfloat16.
        seconds: duration of a round.
        rounds: of which the fastest counts, as other work on the machine only slows a round down.
    """
    if dispatch.KERNELS is None:
        return None
    arguments = (dispatch.KERNELS.handles[dtype], library.thread_pool(), seconds)
    return max(float(library.loaded().nin_peak_flops(*arguments)) for _ in range(rounds))


def measure_copy_bandwidth(copied_bytes: int = 256 << 20, rounds: int = 5) -> float | None:
    """Return the bytes/s, read and written, of the fastest copy on all threads; None without the compiled library."""
    if dispatch.KERNELS is None:
        return None
    source, target = torch.ones(copied_bytes, dtype=torch.uint8), torch.ones(copied_bytes, dtype=torch.uint8)
    arguments = (library.thread_pool(), target.data_ptr(), source.data_ptr(), copied_bytes)
    return max(float(library.loaded().nin_copy_bytes_per_second(*arguments)) for _ in range(rounds))
