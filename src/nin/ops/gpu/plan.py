"""Which engine runs a layer: a Triton kernel or cuDNN. A roofline decides, from bytes, arithmetic and launches.

``NIN_GPU=triton`` or ``NIN_GPU=reference`` takes one of them for everything (for tests and comparisons).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import Any

import torch

from nin.errors import UserError
from nin.ops.gpu import tiling

VARIABLE = "NIN_GPU"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What one H200 is assumed to reach: ESTIMATED from its data sheet's roofline (4.8 TB/s, 989 TFLOP/s dense in 16 bits,
# half of that in TF32, 67 in plain float32), NOT MEASURED. A run of benchmarks/gpu/kernels.py says what they are.
BYTES_PER_S = 4.0e12
CACHE_BYTES_PER_S = 8.0e12  # between L2 and the SMs
CACHE_BYTES = 40e6  # of 50 MB of L2, what a layer's result may take to be read from there by the next
LAUNCH_S = 4e-6
LIBRARY_SHARE, KERNEL_SHARE = 0.65, 0.5  # of the arithmetic's peak that cuDNN and the Triton kernels reach
PEAK_FLOPS = {"half": 989e12, "tf32": 494e12, "ieee": 67e12}


@dataclasses.dataclass(frozen=True)
class Step:
    """Some layers of a chain that run together.

    Attributes:
        first: the first of them.
        count: how many, 1 to 3.
        fused: by a Triton kernel; else by PyTorch (cuDNN), which takes them one by one.
    """

    first: int
    count: int
    fused: bool


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the choice depends on.

    Attributes:
        pixels: of the result.
        channels: of the input.
        widths: of the layers.
        taps: of the first layer's kernel.
        plain: the first layer is 1×1 without padding.
        itemsize: bytes of a value.
        precision: a key of `PEAK_FLOPS`.
        activations: of the layers.
    """

    pixels: int
    channels: int
    widths: tuple[int, ...]
    taps: int
    plain: bool
    itemsize: int
    precision: str
    activations: tuple[str, ...]


def read_variable() -> str:
    """Return what the environment asks for.

    Raises:
        UserError: no such engine.
    """
    engine = os.environ.get(VARIABLE, "auto")
    if engine not in ("auto", "triton", "reference"):
        raise UserError(f"{VARIABLE} must be auto, triton or reference, got {engine!r}")
    return engine


def float32_precision() -> str:
    """Return "tf32" where PyTorch's convolutions may round float32 factors to TF32, else "ieee"."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made at import time
    return "tf32" if convolutions.fp32_precision == "tf32" else "ieee"


def plan_forward(shape: Shape, device: tiling.Device, engine: str = "auto") -> list[Step]:
    """Return the steps of a forward pass: each as long as fits on the chip, and by the engine that is faster."""
    steps, first, count = [], 0, len(shape.widths)
    while first < count:
        length = next((n for n in (3, 2) if first + n <= count and _fits(shape, first, n, device)), 1)
        step = Step(first, length, True)
        steps.append(dataclasses.replace(step, fused=_is_faster(shape, step, engine, backward=False)))
        first += length
    return steps


def plan_backward(shape: Shape, device: tiling.Device, engine: str = "auto") -> list[Step]:
    """Return the steps of a backward pass, in forward order: pairs of 1×1 layers where they fit, else single ones."""
    steps, first, count = [], 0, len(shape.widths)
    while first < count:
        plain = first > 0 or shape.plain
        # an odd layer goes first: pairs at the end spare its input's gradient from being written twice
        pair = plain and first + 2 <= count and _pair_fits(shape, first, device) and (count - first) % 2 == 0
        step = Step(first, 2 if pair else 1, True)
        steps.append(dataclasses.replace(step, fused=_is_faster(shape, step, engine, backward=True)))
        first += step.count
    return steps


def matrix_widths(shape: Shape, first: int, count: int) -> tuple[int, ...]:
    """Return the columns of a step's input matrix, then its layers' widths."""
    columns = shape.channels * shape.taps if first == 0 else shape.widths[first - 1]
    return (columns, *shape.widths[first : first + count])


def _fits(shape: Shape, first: int, count: int, device: tiling.Device) -> bool:
    return bool(tiling.chain_tiles(matrix_widths(shape, first, count), shape.itemsize, device))


def _pair_fits(shape: Shape, first: int, device: tiling.Device) -> bool:
    widths = matrix_widths(shape, first, 2)
    return bool(
        tiling.pair_input_tiles(widths, shape.itemsize, device)
        and tiling.pair_weight_tiles(widths, shape.itemsize, device)
    )


def _is_faster(shape: Shape, step: Step, engine: str, *, backward: bool) -> bool:
    """Return whether a Triton kernel takes less time for the step than cuDNN, both by the roofline."""
    if engine != "auto":
        return engine == "triton"
    return estimate_s(shape, step, backward=backward) < estimate_s(
        shape, dataclasses.replace(step, fused=False), backward=backward
    )


def estimate_s(shape: Shape, step: Step, *, backward: bool) -> float:
    """Return the time of a step in seconds, from constants that are estimates themselves.

    cuDNN reads and writes every layer, and its bias and activation once more; a fused step reads its input and
    writes its result. Where a layer's result fits the L2 cache, the next one reads it from there.
    """
    columns = matrix_widths(shape, step.first, step.count)
    plain = (shape.channels if step.first == 0 else columns[0], *columns[1:])
    macs = shape.pixels * sum(a * b for a, b in itertools.pairwise(columns))
    peak = 2 / PEAK_FLOPS[shape.precision if shape.itemsize == 4 else "half"]  # seconds for each multiply-add
    value_bytes = shape.pixels * shape.itemsize
    if step.fused:
        # backward: the hidden layer is computed twice, and the gradient that reaches it
        work = macs * (3.5 if backward and step.count > 1 else 2 if backward else 1) * peak / KERNEL_SHARE
        values = (3 * plain[0] + 4 * plain[-1]) if backward else plain[0] + plain[-1]
        return max(work, values * value_bytes / BYTES_PER_S) + LAUNCH_S * (4 if backward else 1)
    seconds, last = 0.0, step.first + step.count - 1
    for i, (before, after) in enumerate(itertools.pairwise(plain), start=step.first):
        layer_macs = shape.pixels * before * after * (shape.taps if i == 0 else 1)
        passes = (2 if shape.activations[i] == "none" else 4) * after + before
        values = passes + (2 * before + 3 * after if backward else 0)
        cached = value_bytes * max(before, after) <= CACHE_BYTES and not (i == step.first and step.count == 1)
        speed = CACHE_BYTES_PER_S if cached else BYTES_PER_S
        recomputed = 1 if backward and i < last else 0
        work = layer_macs * ((2 + recomputed) if backward else 1) * peak / LIBRARY_SHARE
        seconds += max(work, values * value_bytes / speed) + LAUNCH_S * (6 if backward else 3)
    return seconds
