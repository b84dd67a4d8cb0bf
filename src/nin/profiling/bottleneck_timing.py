"""Time a bottleneck, 256 → 1×1 → r → 4×4 → 256, beside the convolution that it replaces, 256 → 4×4 → 256."""

import dataclasses

import torch
from torch import nn

from nin.layers import Bottleneck, MLPConv
from nin.runtime.device import processor_name
from nin.runtime.timer import Timing, time_until_steady

CHANNELS, KERNEL_SIZE, PIXELS = 256, 4, 28

# of the bottleneck's channels: the server times any of them on request, and none takes longer than the page's own
MIN_R, MAX_R = 8, 256


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The times of both networks, measured in turn in one run, and the conditions under which they are valid.

    Attributes:
        r: channels of the bottleneck.
        narrow: time of the bottleneck.
        wide: time of the 4×4 convolution alone.
        is_steady: whether both scatter so little that their ratio means something; else the machine was busy.
        shape: of the input, (N, C, H, W).
        dtype: of the input and the weights.
        memory_format: of the input and the weights.
        threads: of PyTorch.
        torch: version of PyTorch.
        device: that computed.
        processor: its name.
    """

    r: int
    narrow: Timing
    wide: Timing
    is_steady: bool
    shape: tuple[int, ...]
    dtype: str
    memory_format: str
    threads: int
    torch: str
    device: str
    processor: str


def build_networks(r: int) -> tuple[nn.Module, nn.Module]:
    """Return the bottleneck of ``r`` channels and the 4×4 convolution alone, in evaluation mode and channels_last."""
    narrow = Bottleneck(CHANNELS, r, CHANNELS, kernel_size=KERNEL_SIZE)
    # an even kernel that keeps the size needs one pixel more on two sides
    wide = nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), MLPConv(CHANNELS, (CHANNELS,), kernel_size=KERNEL_SIZE))
    for network in (narrow, wide):
        network.eval().to(memory_format=torch.channels_last)
    return narrow, wide


@torch.inference_mode()
def measure(r: int, *, images: int = 1) -> Measurement:
    """Time the bottleneck and the 4×4 convolution alone, in float32, channels_last, on the CPU.

    On a busy machine it is tried again for some seconds, see `nin.runtime.timer.time_until_steady`.

    Args:
        r: channels that the 1×1 convolution leaves, from 8 to 256.
        images: in one call.

    Raises:
        ValueError: ``r`` is outside that range.
    """
    if not MIN_R <= r <= MAX_R:
        raise ValueError(f"r must be from {MIN_R} to {MAX_R}, got {r}")
    shape = (images, CHANNELS, PIXELS, PIXELS)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    narrow, wide = build_networks(r)
    timings, is_steady = time_until_steady({"narrow": lambda: narrow(x), "wide": lambda: wide(x)})
    return Measurement(
        r=r,
        narrow=timings["narrow"],
        wide=timings["wide"],
        is_steady=is_steady,
        shape=shape,
        dtype="float32",
        memory_format="channels_last",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        device="cpu",
        processor=processor_name(),
    )
