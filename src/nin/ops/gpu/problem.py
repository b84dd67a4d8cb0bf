"""What the speed of a chain on a GPU depends on: its sizes, layout and dtype."""

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from nin.ops.arguments import ChainArguments
from nin.ops.gpu import tile_sizes

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class ChainProblem:
    """All that a plan depends on. It holds no tensor, so equal problems have equal plans.

    Attributes:
        pixels: of the output, over all images; may be symbolic.
        in_channels: of the input.
        widths: output channels of each layer.
        activations: of each layer.
        taps: kernel height times kernel width of the first layer.
        pointwise: whether the first layer is 1×1 without padding.
        itemsize: bytes of a value.
        precision: of float32 products, "tf32" or "ieee".
        device: what the GPU offers a program.
        engine: "auto" for the fastest, "triton" to take the kernels wherever they can.
        geometry: of the first layer: kernel size, stride, padding and dilation, (height, width) each.
        layout: of the images, "channels_last", "NCHW", or "view" for any other strides.
    """

    pixels: Any
    in_channels: int
    widths: tuple[int, ...]
    activations: tuple[str, ...]
    taps: int = 1
    pointwise: bool = True
    itemsize: int = 2
    precision: str = "tf32"
    device: tile_sizes.DeviceLimits = tile_sizes.H200
    engine: str = "auto"
    geometry: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1), (0, 0), (1, 1))
    layout: str = "channels_last"

    @classmethod
    def of(cls, x: Tensor, chain: ChainArguments, engine: str) -> "ChainProblem":
        """Return the problem of a call."""
        images, _, height, width = chain.output_shape(x)
        kernel_size = tuple(chain.weights[0].shape[2:])
        return cls(
            pixels=images * height * width,
            in_channels=x.shape[1],
            widths=tuple(weight.shape[0] for weight in chain.weights),
            activations=tuple(chain.activations),
            taps=kernel_size[0] * kernel_size[1],
            pointwise=chain.is_pointwise(),
            itemsize=x.dtype.itemsize,
            precision=float32_precision(),
            device=tile_sizes.device_limits(x),
            engine=engine,
            geometry=(kernel_size, tuple(chain.stride), tuple(chain.padding), tuple(chain.dilation)),
            layout=layout_name(x),
        )

    def subchain(self, first: int, count: int) -> "ChainProblem":
        """Return the problem of ``count`` layers from ``first`` on, as `ChainArguments.subchain` does the layers."""
        which = slice(first, first + count)
        part = dataclasses.replace(self, widths=self.widths[which], activations=self.activations[which])
        if first == 0:
            return part
        channels = self.widths[first - 1]
        geometry = ((1, 1), (1, 1), (0, 0), (1, 1))
        return dataclasses.replace(part, in_channels=channels, taps=1, pointwise=True, geometry=geometry)

    def matrix_widths(self) -> tuple[int, ...]:
        """Return the columns of the input's im2col matrix, then the layers' widths."""
        return (self.in_channels * self.taps, *self.widths)

    @property
    def uses_matrix_units(self) -> bool:
        """Whether the products are computed by matrix units, which plain float32 has none of."""
        return self.itemsize == 2 or self.precision == "tf32"

    def macs(self) -> Any:
        """Return the multiply-accumulates of the forward pass."""
        return self.pixels * sum(a * b for a, b in itertools.pairwise(self.matrix_widths()))

    def name(self) -> str:
        """Return the problem in words, for the cache of timings; it stays the same for close numbers of pixels.

        Two in each doubling have a name of their own, so images of many sizes are not measured one by one.

        Example:
            >>> from nin.ops.gpu.problem import ChainProblem
            >>> ChainProblem(512 * 32 * 32, 192, (160, 96), ("relu", "relu")).name()
            '192-160-96 relu,relu, 2^19 pixels, channels_last, 16 bits'
        """
        (height, width), stride, padding, dilation = self.geometry
        words = ["-".join(map(str, (self.in_channels, *self.widths))), ",".join(self.activations) + ","]
        if self.geometry != ((1, 1), (1, 1), (0, 0), (1, 1)):
            words += [f"{height}x{width}", *(f"{n[0]}x{n[1]}" for n in (stride, padding, dilation))]
            words[-1] += ","
        words.append(f"2^{round(2 * math.log2(self.pixels)) / 2:g} pixels, {self.layout},")
        words.append("16 bits" if self.itemsize == 2 else f"32 bits, {self.precision}")
        return " ".join(words)


def layout_name(x: Tensor) -> str:
    """Return how a tensor's values lie: "channels_last", "NCHW", or "view" for any other strides."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return "NCHW" if x.is_contiguous() else "view"


def float32_precision() -> str:
    """Return "tf32" where PyTorch's convolutions may round float32 factors to TF32, else "ieee"."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made at import time
    return "tf32" if convolutions.fp32_precision == "tf32" else "ieee"
