"""Forward pass on a GPU: launch the planned kernels, with strides and widths as their arguments."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments
from nin.ops.gpu import autotune, forward_kernels, matrix_products, tile_sizes
from nin.ops.gpu.engine_plan import LayerGroup
from nin.ops.gpu.launch import INTERPRETED
from nin.ops.gpu.launch import launch as launch  # of the backward pass too
from nin.ops.gpu.problem import float32_precision
from nin.ops.gpu.strides import coalesce_pixels, needs_64_bit_offsets, subsample


def precision_constants(x: Tensor) -> dict[str, Any]:
    """Return the kernels' constants for products of that dtype."""
    precision = float32_precision() if x.dtype == torch.float32 else "ieee"
    return {"PRECISION": precision, "UPCAST": INTERPRETED and x.dtype == torch.bfloat16}


def geometry_constants(chain: ChainArguments) -> dict[str, int]:
    """Return the kernels' constants for the first layer: channels, kernel size, stride, padding and dilation."""
    names = ("C", "KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    return dict(zip(names, (*chain.weights[0].shape[1:], *chain.stride, *chain.padding, *chain.dilation), strict=True))


def mlpconv(x: Tensor, chain: ChainArguments, plan: Sequence[LayerGroup]) -> Tensor:
    """Compute a chain group by group, each by the engine that the plan names."""
    layout = reference.memory_format_of(x)
    for group in plan:
        x = run_engine(group.choice.engine, x, layout, chain.subchain(group.first, group.count), group)
    return x


def run_engine(engine: str, x: Tensor, layout: torch.memory_format, chain: ChainArguments, group: LayerGroup) -> Tensor:
    """Compute a group's layers by one of the engines of `engine_choice`."""
    if engine == "triton":
        with autotune.running(group):
            return run_group(x, layout, chain, group.tiles)
    return (matrix_products if engine == "cublas" else reference).mlpconv(x, chain)


def run_group(x: Tensor, layout: torch.memory_format, chain: ChainArguments, tiles: Sequence[Any]) -> Tensor:
    """Compute one to three layers in one kernel."""
    y = torch.empty(chain.output_shape(x), dtype=x.dtype, device=x.device, memory_format=layout)
    launch_group = launch_layer if len(chain.weights) == 1 else launch_chain
    launch_group(ForwardArguments(x, y, chain), chain, tiles)
    return y


class ForwardArguments:
    """What the two forward kernels take alike: the first layer's geometry, and where to read and to write.

    Attributes:
        x: the input; of a strided 1×1 layer, a view of the pixels that it reads.
        y: the output.
        weight: of the first layer, see `dense_filters`.
        numbers: pixels, heights and widths, strides of input, output and weight, in the kernels' order.
        pixels: of the output, over all images.
        input_strides: of the input's images, channels, rows and columns.
        constants: those of geometry and precision, and whether offsets need 64 bits.
    """

    def __init__(self, x: Tensor, y: Tensor, chain: ChainArguments) -> None:
        self.weight, weight_strides = dense_filters(chain.weights[0])
        if chain.is_pointwise():
            x = subsample(x, chain.stride)
            both = coalesce_pixels(x, y)
            sizes: tuple[Any, ...] = (both.pixels, *(both.height, both.width) * 2)
            strides: tuple[Any, ...] = (*both.strides[0], *both.strides[1])
            wide = both.needs_64_bits
            # of the view, every pixel is read
            chain = chain._replace(stride=(1, 1), dilation=(1, 1))
        else:
            sizes = (y.shape[0] * y.shape[2] * y.shape[3], *x.shape[2:], *y.shape[2:])
            strides, wide = (*x.stride(), *y.stride()), needs_64_bit_offsets(x, y)
        self.x, self.y = x, y
        self.numbers = (*sizes, *strides, *weight_strides)
        self.pixels, self.input_strides = sizes[0], strides[:4]
        self.constants = {**geometry_constants(chain), **precision_constants(x), "WIDE": wide}


def dense_filters(weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return a weight whose filters are each contiguous, and its strides (channel, tap) within a filter.

    Where several taps of many channels are read, channels are innermost: an iteration's summands are then neighbours.
    """
    taps = weight.shape[2] * weight.shape[3]
    if taps == 1:
        return weight.reshape(weight.shape[0], weight.shape[1]).contiguous(), (1, 0)
    if weight.shape[1] >= 16 or weight.is_contiguous(memory_format=torch.channels_last):
        return weight.permute(0, 2, 3, 1).contiguous(), (1, weight.shape[1])
    return weight.contiguous(), (taps, 1)


def launch_chain(
    arguments: ForwardArguments, chain: ChainArguments, candidates: Sequence[tile_sizes.ChainTiles]
) -> None:
    """Compute two or three layers in one pass."""
    weights, biases, x = chain.weights, chain.biases, arguments.x
    matrices = [arguments.weight, *(dense_filters(weight)[0] for weight in weights[1:])]
    widths = [weights[0][0].numel(), *(weight.shape[0] for weight in weights)]
    order = (0, 1, len(weights) - 1)  # the kernel has arguments for three layers: of two, the last is given twice
    tensors = [t for layer in order for t in (matrices[layer], bias_or_placeholder(biases[layer], x))]
    constants = {"LAYERS": len(weights), **arguments.constants}
    for i, layer in enumerate(order, start=1):
        constants |= {f"C{i}": widths[layer + 1], f"A{i}": chain.activations[layer]}
        constants[f"BIAS{i}"] = biases[layer] is not None

    def launch_tiles(tiles: tile_sizes.ChainTiles) -> None:
        grid = (count_persistent_programs(arguments.pixels, tiles, widths, x),)
        tile_constants = {"B3": 16, **tiles.constants(), "RESIDENT": tiles.resident}  # two layers use no B3
        numbers, kernel = arguments.numbers, forward_kernels.chain_forward
        launch(kernel, grid, x, *tensors, arguments.y, *numbers, **constants, **tile_constants)

    shape = (*widths, arguments.pixels, *arguments.input_strides)
    autotune.launch_tuned("chain_forward", shape, x, candidates, launch_tiles)


def launch_layer(
    arguments: ForwardArguments, chain: ChainArguments, candidates: Sequence[tile_sizes.LayerTiles]
) -> None:
    """Compute one layer of any size."""
    weight, bias, x = chain.weights[0], chain.biases[0], arguments.x
    tensors = x, arguments.weight, bias_or_placeholder(bias, x), arguments.y
    filters, channels, kernel_height, kernel_width = weight.shape
    constants = {"N": filters, "ACTIVATION": chain.activations[0], "BIAS": bias is not None, **arguments.constants}

    def launch_tiles(tiles: tile_sizes.LayerTiles) -> None:
        grid = (triton.cdiv(arguments.pixels, tiles.pixels) * triton.cdiv(filters, tiles.columns),)
        kernel = forward_kernels.layer_forward
        launch(kernel, grid, *tensors, *arguments.numbers, **constants, **tiles.constants())

    shape = (filters, channels, kernel_height * kernel_width, arguments.pixels, *arguments.input_strides)
    autotune.launch_tuned("layer_forward", shape, x, candidates, launch_tiles)


def count_persistent_programs(pixels: Any, tiles: tile_sizes.ChainTiles, widths: Sequence[int], x: Tensor) -> Any:
    """Return how many programs loop over the tiles: as many as the GPU holds at once, and no more than tiles."""
    device = tile_sizes.device_limits(x)
    shared_bytes = tile_sizes.chain_shared_bytes(widths, tiles, x.dtype.itemsize)
    # sums and factors take most of the registers: no more than four programs, or sixteen warps, find room on an SM
    at_once = device.shared_bytes // shared_bytes if tiles.resident else 16 // tiles.warps
    most = device.multiprocessors * min(4, max(1, at_once))
    count = triton.cdiv(pixels, tiles.pixels)
    return torch.sym_min(count, most) if isinstance(count, torch.SymInt) else min(count, most)


def bias_or_placeholder(bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the bias, contiguous; any tensor where there is none, as the kernels do not read it then."""
    return x if bias is None else bias.contiguous()
