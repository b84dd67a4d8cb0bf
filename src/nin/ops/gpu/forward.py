"""Launches the forward kernels: the tensors' strides and widths become a kernel's arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments
from nin.ops.gpu import autotune, forward_kernels, tiling
from nin.ops.gpu import plan as choosing
from nin.ops.gpu.strides import needs_64_bits, places, strided

# Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU and without a compiler.
INTERPRETED = not isinstance(forward_kernels.layer_forward, triton.JITFunction)


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel, in a way that torch.compile can see."""
    (kernel if INTERPRETED else torch.library.wrap_triton(kernel))[grid](*arguments, **constants)


def number_constants(x: Tensor) -> dict[str, Any]:
    """Return the constants that say how numbers of that dtype are multiplied."""
    precision = choosing.float32_precision() if x.dtype == torch.float32 else "ieee"
    return {"PRECISION": precision, "UPCAST": INTERPRETED and x.dtype == torch.bfloat16}


def device_of(x: Tensor) -> tiling.Device:
    """Return what is known of the tensor's device."""
    return tiling.describe_device(x.device.index if x.is_cuda else None)


def describe(x: Tensor, layers: ChainArguments) -> choosing.Shape:
    """Return what the choice of an engine depends on."""
    images, _, height, width = layers.output_shape(x)
    weights = layers.weights
    return choosing.Shape(
        pixels=images * height * width,
        channels=x.shape[1],
        widths=tuple(weight.shape[0] for weight in weights),
        taps=weights[0].shape[2] * weights[0].shape[3],
        plain=layers.is_pointwise(),
        itemsize=x.dtype.itemsize,
        precision=choosing.float32_precision(),
        activations=tuple(layers.activations),
    )


def mlpconv(x: Tensor, layers: ChainArguments) -> Tensor:
    """Compute a chain step by step, each step by the engine that `choosing.plan_forward` chose."""
    plan = choosing.plan_forward(describe(x, layers), device_of(x), choosing.read_variable())
    layout = reference.memory_format_of(x)
    for step in plan:
        part = layers.subchain(step.first, step.count)
        x = run_step(x, layout, part) if step.fused else reference.mlpconv(x, part)
    return x


def run_step(x: Tensor, layout: torch.memory_format, layers: ChainArguments) -> Tensor:
    """Compute one to three layers by one kernel."""
    y = torch.empty(layers.output_shape(x), dtype=x.dtype, device=x.device, memory_format=layout)
    run = run_layer if len(layers.weights) == 1 else run_chain
    run(Geometry(x, y, layers), layers)
    return y


class Geometry:
    """Where a first layer reads and its result is written, as the kernels take it.

    Attributes:
        inner: the input and the result, of equal (N, H', W') where the layer is 1×1 and unpadded.
        arguments: pixels, sizes and strides, in the kernels' order.
        constants: channels, kernel, stride, padding and dilation, and whether offsets need 64 bits.
        weight: the first layer's, dense; ``weight_strides`` its steps from channel to channel and tap to tap.
    """

    def __init__(self, x: Tensor, y: Tensor, layers: ChainArguments) -> None:
        stride, dilation = layers.stride, layers.dilation
        self.x, self.y = x, y
        self.weight, self.weight_strides = dense(layers.weights[0])
        if layers.is_pointwise():
            self.x = strided(x, stride)
            both = places(self.x, y)
            sizes: tuple[Any, ...] = (both.height, both.width) * 2
            self.arguments = (both.pixels, *sizes, *both.strides[0])
            self.result_strides: tuple[Any, ...] = both.strides[1]
            wide = both.wide
            stride = dilation = (1, 1)
        else:
            sizes = (x.shape[2], x.shape[3], y.shape[2], y.shape[3])
            self.arguments = (y.shape[0] * y.shape[2] * y.shape[3], *sizes, *x.stride())
            self.result_strides, wide = y.stride(), needs_64_bits(x, y)
        self.pixels = self.arguments[0]
        names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
        numbers = (*layers.weights[0].shape[2:], *stride, *layers.padding, *dilation)
        self.constants = {"C": x.shape[1], **dict(zip(names, numbers, strict=True)), "WIDE": wide}


def dense(weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return a weight whose filters lie each in one piece, and its steps (channel, tap).

    Where several taps of many channels are read, channels lie side by side: a step of the product then reads rows.
    """
    taps = weight.shape[2] * weight.shape[3]
    if taps == 1:
        return weight.reshape(weight.shape[0], weight.shape[1]).contiguous(), (1, 0)
    if weight.shape[1] >= 16 or weight.is_contiguous(memory_format=torch.channels_last):
        turned = weight.permute(0, 2, 3, 1).contiguous()
        return turned, (1, weight.shape[1])
    return weight.contiguous(), (taps, 1)


def run_chain(step: Geometry, layers: ChainArguments) -> None:
    """Compute two or three layers in one pass."""
    weights, biases, *_, activations = layers
    count, x = len(weights), step.x
    widths = [step.constants["C"] * step.constants["KH"] * step.constants["KW"], *(w.shape[0] for w in weights)]
    matrices = [step.weight, *(dense(weight)[0] for weight in weights[1:])]
    vectors = [None if bias is None else bias.contiguous() for bias in biases]
    device = device_of(x)

    def call(cut: tiling.ChainTiles) -> None:
        programs = count_programs(step.pixels, cut, widths, x.dtype.itemsize, device)
        chunks = [*cut.chunks, 16][:4]
        launch(
            forward_kernels.chain_forward,
            (programs,),
            x,
            *(t for i in range(3) for t in (matrices[min(i, count - 1)], _given(vectors[min(i, count - 1)], x))),
            step.y,
            *step.arguments,
            *step.result_strides,
            *step.weight_strides,
            LAYERS=count,
            **{f"C{i + 1}": widths[min(i + 1, count)] for i in range(3)},
            **{f"A{i + 1}": activations[min(i, count - 1)] for i in range(3)},
            **{f"BIAS{i + 1}": vectors[min(i, count - 1)] is not None for i in range(3)},
            BM=cut.pixels,
            **dict(zip(("BK", "B1", "B2", "B3"), chunks, strict=True)),
            RESIDENT=cut.resident,
            **step.constants,
            **number_constants(x),
            num_warps=cut.warps,
            num_stages=cut.stages,
        )

    candidates = tiling.chain_tiles(widths, x.dtype.itemsize, device)
    call(autotune.choose("chain_forward", (*widths, step.pixels, *step.arguments[5:]), x, candidates, call))


def run_layer(step: Geometry, layers: ChainArguments) -> None:
    """Compute one layer of any size."""
    x, columns, bias = step.x, layers.weights[0].shape[0], layers.biases[0]
    taps, channels = step.constants["KH"] * step.constants["KW"], step.constants["C"]

    def call(cut: tiling.LayerTiles) -> None:
        launch(
            forward_kernels.layer_forward,
            (triton.cdiv(step.pixels, cut.pixels) * triton.cdiv(columns, cut.columns),),
            x,
            step.weight,
            _given(None if bias is None else bias.contiguous(), x),
            step.y,
            *step.arguments,
            *step.result_strides,
            *step.weight_strides,
            N=columns,
            ACTIVATION=layers.activations[0],
            BIAS=bias is not None,
            **layer_constants(cut),
            **step.constants,
            **number_constants(x),
        )

    candidates = tiling.layer_tiles(columns, channels, taps, x.dtype.itemsize)
    call(
        autotune.choose(
            "layer_forward", (columns, channels, taps, step.pixels, *step.arguments[5:]), x, candidates, call
        )
    )


def layer_constants(cut: tiling.LayerTiles) -> dict[str, int]:
    """Return how one layer is cut, as its kernels take it."""
    blocks = {"BM": cut.pixels, "BK": cut.summands, "BN": cut.columns}
    return {**blocks, "num_warps": cut.warps, "num_stages": cut.stages}


def count_programs(
    pixels: Any, cut: tiling.ChainTiles, widths: Sequence[int], itemsize: int, device: tiling.Device
) -> Any:
    """Return how many programs walk over the tiles: as many as the GPU holds at once, and no more than tiles."""
    at_once = device.shared_bytes // tiling.chain_shared_bytes(widths, cut, itemsize) if cut.resident else 2
    # sums and factors take most of the registers, so more than four programs find no room on an SM
    most = device.processors * min(4, max(1, at_once))
    count = triton.cdiv(pixels, cut.pixels)
    return torch.sym_min(count, most) if isinstance(count, torch.SymInt) else min(count, most)


def _given(bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the bias, or any tensor in its place: the kernels do not look at it."""
    return x if bias is None else bias


Call = Callable[[Any], None]
