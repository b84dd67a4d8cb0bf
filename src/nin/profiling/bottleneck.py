"""The bottleneck, timed on this machine: 256 → 1×1 → r → 4×4 → 256 beside 256 → 4×4 → 256."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from nin.layers import Bottleneck, MLPConv
from nin.runtime import device as machine
from nin.runtime.timer import Timing, compare

CHANNELS, KERNEL_SIZE, PIXELS = 256, 4, 28

# What may be asked for, so that no request costs more than the page's own.
NARROWEST, WIDEST = 8, 256


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Both forms, measured in turn in one run, with what a time has to carry.

    Attributes:
        r: channels of the bottleneck.
        narrow: the bottleneck.
        wide: the k×k convolution alone.
        shape: of the input.
        dtype: of the numbers.
        memory_format: their order in memory.
        threads: that PyTorch uses.
        torch: its version.
        device: where it ran.
        processor: its name.
    """

    r: int
    narrow: Timing
    wide: Timing
    shape: tuple[int, ...]
    dtype: str
    memory_format: str
    threads: int
    torch: str
    device: str
    processor: str


def forms(r: int) -> tuple[nn.Module, nn.Module]:
    """Return the bottleneck with ``r`` channels and what it stands for, in evaluation mode and channels_last."""
    narrow = Bottleneck(CHANNELS, r, CHANNELS, kernel_size=KERNEL_SIZE)
    wide = nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), MLPConv(CHANNELS, (CHANNELS,), kernel_size=KERNEL_SIZE))
    for network in (narrow, wide):
        network.eval().to(memory_format=torch.channels_last)
    return narrow, wide


@torch.inference_mode()
def measure(r: int, *, images: int = 1) -> Measurement:
    """Time the bottleneck and what it stands for.

    Args:
        r: channels that the 1×1 convolution leaves, from 8 to 256.
        images: in one call.

    Raises:
        ValueError: ``r`` is outside that range.
    """
    if not NARROWEST <= r <= WIDEST:
        raise ValueError(f"r must be from {NARROWEST} to {WIDEST}, got {r}")
    shape = (images, CHANNELS, PIXELS, PIXELS)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    narrow, wide = forms(r)
    timings = compare({"narrow": lambda: narrow(x), "wide": lambda: wide(x)})
    return Measurement(
        r=r,
        narrow=timings["narrow"],
        wide=timings["wide"],
        shape=shape,
        dtype="float32",
        memory_format="channels_last",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        device="cpu",
        processor=machine.processor_name(),
    )
