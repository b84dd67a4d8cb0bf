"""Plan a call on a GPU: which layers run together, in a Triton kernel or in cuDNN, and in which tiles.

A roofline model chooses the engine, from bytes, arithmetic and launches. ``NIN_GPU=triton`` or ``NIN_GPU=reference``
takes one of them for everything (for tests and comparisons).
"""

import dataclasses
import itertools
import os
from typing import Any

import torch
from torch import Tensor

from nin.errors import UserError
from nin.ops.arguments import ChainArguments
from nin.ops.gpu import tile_sizes

ENGINE_VARIABLE = "NIN_GPU"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What one H200 is assumed to reach: ESTIMATED from its data sheet's roofline (4.8 TB/s, 989 TFLOP/s dense in 16 bits,
# half of that in TF32, 67 in plain float32), NOT MEASURED. A run of benchmarks/gpu/kernels.py says what they are.
DRAM_BYTES_PER_S = 4.0e12
L2_BYTES_PER_S = 8.0e12
L2_BYTES = 40e6  # of 50 MB: how large a layer's output may be for the next layer to read it from there
LAUNCH_S = 4e-6
CUDNN_EFFICIENCY, KERNEL_EFFICIENCY = 0.65, 0.5  # fraction of the peak that cuDNN and the Triton kernels reach
PEAK_FLOPS = {"half": 989e12, "tf32": 494e12, "ieee": 67e12}


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
        engine: "auto" for the roofline's choice, "triton" to take the kernels wherever they can.
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

    @classmethod
    def of(cls, x: Tensor, chain: ChainArguments, engine: str) -> "ChainProblem":
        """Return the problem of a call."""
        images, _, height, width = chain.output_shape(x)
        return cls(
            pixels=images * height * width,
            in_channels=x.shape[1],
            widths=tuple(weight.shape[0] for weight in chain.weights),
            activations=tuple(chain.activations),
            taps=chain.weights[0].shape[2] * chain.weights[0].shape[3],
            pointwise=chain.is_pointwise(),
            itemsize=x.dtype.itemsize,
            precision=float32_precision(),
            device=tile_sizes.device_limits(x),
            engine=engine,
        )

    def subchain(self, first: int, count: int) -> "ChainProblem":
        """Return the problem of ``count`` layers from ``first`` on, as `ChainArguments.subchain` does the layers."""
        which = slice(first, first + count)
        part = dataclasses.replace(self, widths=self.widths[which], activations=self.activations[which])
        if first == 0:
            return part
        return dataclasses.replace(part, in_channels=self.widths[first - 1], taps=1, pointwise=True)

    def matrix_widths(self) -> tuple[int, ...]:
        """Return the columns of the input's im2col matrix, then the layers' widths."""
        return (self.in_channels * self.taps, *self.widths)


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers of a chain that run together.

    Attributes:
        first: index of the first of them.
        count: how many, 1 to 3.
        fused: in a Triton kernel; else in PyTorch (cuDNN), layer by layer.
        tiles: candidates for the kernel, the default first; `autotune` chooses among them when it launches.
    """

    first: int
    count: int
    fused: bool
    tiles: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class BackwardGroup(LayerGroup):
    """Consecutive layers, one or two, whose gradients are computed together.

    Where `fused`, a kernel computes what travels from pixel to pixel and the library the weights' gradients, see
    `nin.ops.gpu.backward`; else PyTorch (cuDNN) all of it, layer by layer.

    Attributes:
        output_plan: how the group's output is computed again, where a group follows that takes it as input.
    """

    output_plan: tuple[LayerGroup, ...] = ()


def requested_engine() -> str:
    """Return the engine that ``NIN_GPU`` asks for: auto, triton or reference.

    Raises:
        UserError: no such engine.
    """
    engine = os.environ.get(ENGINE_VARIABLE, "auto")
    if engine not in ("auto", "triton", "reference"):
        raise UserError(f"{ENGINE_VARIABLE} must be auto, triton or reference, got {engine!r}")
    return engine


def float32_precision() -> str:
    """Return "tf32" where PyTorch's convolutions may round float32 factors to TF32, else "ieee"."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made at import time
    return "tf32" if convolutions.fp32_precision == "tf32" else "ieee"


def plan_forward(problem: ChainProblem) -> tuple[LayerGroup, ...]:
    """Return the groups of a forward pass: each as long as fits on the chip, and by the engine that is faster."""
    groups: list[LayerGroup] = []
    first = 0
    while first < len(problem.widths):
        count, tiles = _longest_fused_group(problem, first)
        fused = _is_faster_fused(problem.subchain(first, count), backward=False)
        groups.append(LayerGroup(first, count, fused, tuple(tiles)))
        first += count
    return tuple(groups)


def plan_backward(problem: ChainProblem) -> tuple[BackwardGroup, ...]:
    """Return the groups of a backward pass, in forward order: pairs of 1×1 layers where they fit, else single ones."""
    groups: list[BackwardGroup] = []
    first = 0
    while first < len(problem.widths):
        count, tiles = _backward_tiles(problem, first)
        chain = problem.subchain(first, count)
        fused = bool(tiles) and _is_faster_fused(chain, backward=True)
        # the last group's output is that of the call, which autograd has saved
        output_plan: tuple[LayerGroup, ...] = ()
        if first + count < len(problem.widths):
            output_plan = plan_forward(chain)
        groups.append(BackwardGroup(first, count, fused, tuple(tiles), output_plan))
        first += count
    return tuple(groups)


def _longest_fused_group(problem: ChainProblem, first: int) -> tuple[int, list[Any]]:
    """Return how many layers from ``first`` on one forward kernel holds, and its tiles."""
    for count in (3, 2):  # `chain_forward` has arguments for three layers
        if first + count <= len(problem.widths):
            widths = problem.subchain(first, count).matrix_widths()
            tiles = tile_sizes.chain_tiles(widths, problem.itemsize, problem.device)
            if tiles:
                return count, tiles
    layer = problem.subchain(first, 1)
    return 1, tile_sizes.layer_tiles(layer.widths[0], layer.in_channels, layer.taps, layer.itemsize)


def _backward_tiles(problem: ChainProblem, first: int) -> tuple[int, list[Any]]:
    """Return how many layers from ``first`` on go backward together, and their tiles; none where no kernel can."""
    # an odd layer goes first: pairs at the end spare its input's gradient from being written twice
    pair = problem.subchain(first, 2)
    if pair.pointwise and (len(problem.widths) - first) % 2 == 0:
        tiles = tile_sizes.pair_tiles(pair.matrix_widths(), pair.itemsize, pair.device)
        if tiles:
            return 2, tiles
    layer = problem.subchain(first, 1)
    if not layer.pointwise:
        return 1, []  # cuDNN was three times faster at both gradients of a k×k layer than kernels of ours
    return 1, tile_sizes.layer_gradient_tiles(layer.in_channels, layer.widths[0])


def _is_faster_fused(problem: ChainProblem, *, backward: bool) -> bool:
    """Return whether one Triton kernel is to take the chain: forced, or by the roofline less time than cuDNN."""
    if problem.engine != "auto":
        return problem.engine == "triton"
    return estimate_fused_s(problem, backward=backward) < estimate_cudnn_s(problem, backward=backward)


def estimate_fused_s(problem: ChainProblem, *, backward: bool) -> float:
    """Return the roofline time of one kernel for the chain, in seconds; it reads its input and writes its output."""
    macs = problem.pixels * sum(a * b for a, b in itertools.pairwise(problem.matrix_widths()))
    # backward, a pair computes its hidden layer twice, and so the gradient that reaches it
    passes = 1 if not backward else 3.5 if len(problem.widths) > 1 else 2
    work = macs * passes * _seconds_per_mac(problem) / KERNEL_EFFICIENCY
    channels, filters = problem.in_channels, problem.widths[-1]
    values = 3 * channels + 4 * filters if backward else channels + filters
    memory = values * (problem.pixels * problem.itemsize) / DRAM_BYTES_PER_S
    return max(work, memory) + LAUNCH_S * (4 if backward else 1)


def estimate_cudnn_s(problem: ChainProblem, *, backward: bool) -> float:
    """Return the roofline time of cuDNN for the chain, in seconds.

    It reads and writes every layer, and once more for its bias and activation. Where a layer's output fits the L2
    cache, the next one reads it from there.
    """
    value_bytes = problem.pixels * problem.itemsize
    widths, last = (problem.in_channels, *problem.widths), len(problem.widths) - 1
    seconds = 0.0
    for i, (channels, filters) in enumerate(itertools.pairwise(widths)):
        macs = problem.pixels * channels * filters * (problem.taps if i == 0 else 1)
        values = (2 if problem.activations[i] == "none" else 4) * filters + channels
        values += 2 * channels + 3 * filters if backward else 0
        cached = value_bytes * max(channels, filters) <= L2_BYTES and last > 0
        bytes_per_s = L2_BYTES_PER_S if cached else DRAM_BYTES_PER_S
        products = (3 if i < last else 2) if backward else 1  # backward: a hidden layer once more, and two gradients
        work = macs * products * _seconds_per_mac(problem) / CUDNN_EFFICIENCY
        seconds += max(work, values * value_bytes / bytes_per_s) + LAUNCH_S * (6 if backward else 3)
    return seconds


def _seconds_per_mac(problem: ChainProblem) -> float:
    return 2 / PEAK_FLOPS[problem.precision if problem.itemsize == 4 else "half"]
