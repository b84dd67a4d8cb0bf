"""What the machine can do at most: multiply-adds on registers, and copies."""

from __future__ import annotations

import torch

from nin.ops.cpu import dispatch, library


def measure_peak_flops(dtype: torch.dtype, seconds: float = 0.05, rounds: int = 8) -> float | None:
    """Return the FLOP/s of multiply-adds on registers with all threads; None where there is no compiled kernel.

    That of the fastest of several rounds of so many seconds: what else the machine does makes them slower only.

    One multiply-add is two FLOP. For bfloat16 it is the peak of what the kernels multiply with: pairs of bfloat16
    where the machine has them, else float32.
    """
    if dispatch.KERNELS is None:
        return None
    arguments = (dispatch.KERNELS.handles[dtype], library.pool(), seconds)
    return max(float(library.loaded().nin_peak_flops(*arguments)) for _ in range(rounds))


def measure_copy_bandwidth(copied_bytes: int = 256 << 20, rounds: int = 5) -> float | None:
    """Return the bytes/s, read and written, of the fastest of several copies with all threads; None as above."""
    if dispatch.KERNELS is None:
        return None
    source, target = torch.ones(copied_bytes, dtype=torch.uint8), torch.ones(copied_bytes, dtype=torch.uint8)
    arguments = (library.pool(), target.data_ptr(), source.data_ptr(), copied_bytes)
    return max(float(library.loaded().nin_copy_bytes_per_second(*arguments)) for _ in range(rounds))
