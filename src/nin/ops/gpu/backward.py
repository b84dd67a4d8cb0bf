"""Launches the backward kernels: what lies between the steps is computed again, then each step's gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments, Gradients
from nin.ops.gpu import autotune, backward_kernels, forward, tiling
from nin.ops.gpu import plan as choosing
from nin.ops.gpu.strides import needs_64_bits, places, strided


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients of a step are wanted: the input's, then the weights' and biases' of its layers."""

    input: bool
    weights: Sequence[bool]
    biases: Sequence[bool]

    def parameters(self) -> bool:
        """Return whether any parameter's is."""
        return any(self.weights) or any(self.biases)


def mlpconv_backward(grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, needs: Sequence[bool]) -> Gradients:
    """Compute the gradients step by step, last step first; see `reference.mlpconv_backward` for the arguments."""
    weights, biases, count = layers.weights, layers.biases, len(layers.weights)
    shape = forward.describe(x, layers)
    plan = choosing.plan_backward(shape, forward.device_of(x), choosing.read_variable())
    groups = [layers.subchain(step.first, step.count) for step in plan]
    inputs, results = compute_again(x, y, groups, plan)
    grad_weights, grad_biases = [x.new_empty(0) for _ in weights], [x.new_empty(0) for _ in weights]
    for k in reversed(range(len(plan))):
        part = slice(plan[k].first, plan[k].first + plan[k].count)
        below = needs[0] or any(needs[1 : 1 + part.start]) or any(needs[1 + count : 1 + count + part.start])
        has_bias = [bias is not None for bias in biases[part]]
        wanted_biases = [n and has for n, has in zip(needs[1 + count :][part], has_bias, strict=True)]
        wanted = Wanted(below, needs[1 : 1 + count][part], wanted_biases)
        run = differentiate if plan[k].fused else differentiate_by_library
        grad, grad_weights[part], grad_biases[part] = run(grad, inputs[k], results[k], groups[k], wanted)
        if not below:
            break
    return grad if needs[0] else x.new_empty(0), grad_weights, grad_biases


def compute_again(
    x: Tensor, y: Tensor, groups: Sequence[ChainArguments], plan: Sequence[choosing.Step]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each step's input, and its result, from which the gate of its last activation is taken.

    Only what passes from step to step is written; what lies within a step is computed again in its kernel.
    """
    inputs, results = [x], []
    for layers, step in zip(groups[:-1], plan, strict=False):
        if step.fused:
            layout = reference.memory_format_of(inputs[-1])
            results.append(forward.mlpconv(inputs[-1], layers))
            assert reference.memory_format_of(results[-1]) == layout
        else:
            results.append(reference.mlpconv(inputs[-1], layers))
        inputs.append(results[-1])
    return inputs, [*results, y]


def differentiate_by_library(grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, wanted: Wanted) -> Gradients:
    """Compute a step's gradients with PyTorch's own convolutions."""
    return reference.mlpconv_backward(grad, x, y, layers, [wanted.input, *wanted.weights, *wanted.biases])


def differentiate(grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, wanted: Wanted) -> Gradients:
    """Compute a step's gradients with the Triton kernels."""
    source = y
    if layers.activations[-1] in ("gelu", "silu"):  # cannot be undone from the result: its argument again
        source = forward.mlpconv(x, layers._replace(activations=[*layers.activations[:-1], "none"]))
    if len(layers.weights) == 2:
        return differentiate_pair(grad, x, source, layers, wanted)
    return differentiate_layer(grad, x, source, layers, wanted)


def empty_input_gradient(x: Tensor, stride: Sequence[int], wanted: bool) -> Tensor:
    """Return room for the input's gradient, in the input's layout; zero where a stride steps over pixels."""
    if not wanted:
        return x.new_empty(0)
    layout = reference.memory_format_of(x)
    make = torch.empty if tuple(stride) == (1, 1) else torch.zeros
    return reference.to_memory_format(make(x.shape, dtype=x.dtype, device=x.device).to(memory_format=layout), layout)


def differentiate_pair(grad: Tensor, x: Tensor, source: Tensor, layers: ChainArguments, wanted: Wanted) -> Gradients:
    """Compute the gradients of two 1×1 layers without their hidden layer."""
    grad_input = empty_input_gradient(x, layers.stride, wanted.input)
    seen = strided(x, layers.stride)
    (w1, w2), (b1, _) = [forward.dense(w)[0] for w in layers.weights], layers.biases
    widths = (x.shape[1], w1.shape[0], w2.shape[0])
    constants = {
        **dict(zip(("C", "C1", "C2"), widths, strict=True)),
        "A1": layers.activations[0],
        "A2": layers.activations[1],
        "BIAS1": b1 is not None,
        **forward.number_constants(x),
    }
    given = (x if b1 is None else b1.contiguous(), w2)
    if wanted.input:
        target = strided(grad_input, layers.stride)
        where = places(seen, grad, source, target)
        arguments = (where.pixels, where.height, where.width, *(n for strides in where.strides for n in strides))

        def call(cut: tiling.ChainTiles) -> None:
            device = forward.device_of(x)
            programs = forward.count_programs(where.pixels, cut, widths, x.dtype.itemsize, device)
            tensors = (seen, grad, source, w1, *given, target)
            options = {**chain_constants(cut), "RESIDENT": cut.resident, "WIDE": where.wide}
            forward.launch(
                backward_kernels.pair_input_gradient, (programs,), *tensors, *arguments, **constants, **options
            )

        candidates = tiling.pair_input_tiles(widths, x.dtype.itemsize, forward.device_of(x))
        call(autotune.choose("pair_input_gradient", (*widths, *arguments), x, candidates, call))
    if not wanted.parameters():
        return grad_input, [x.new_empty(0) for _ in range(2)], [x.new_empty(0) for _ in range(2)]
    parts = pair_parts(seen, grad, source, w1, given, constants)
    weights = [add(part, like, n) for part, like, n in zip(parts[::2], layers.weights, wanted.weights, strict=True)]
    biases = [add(part, like, n) for part, like, n in zip(parts[1::2], layers.biases, wanted.biases, strict=True)]
    return grad_input, weights, biases


def pair_parts(
    seen: Tensor, grad: Tensor, source: Tensor, w1: Tensor, given: tuple[Tensor, Tensor], constants: dict[str, Any]
) -> list[Tensor]:
    """Return the parts of a pair's gradients: first weight, first bias, second weight, second bias."""
    where = places(seen, grad, source)
    arguments = (where.pixels, where.height, where.width, *(n for strides in where.strides for n in strides))
    channels, hidden, columns = (constants[name] for name in ("C", "C1", "C2"))
    device = forward.device_of(seen)
    candidates = tiling.pair_weight_tiles((channels, hidden, columns), seen.dtype.itemsize, device)
    made: list[Tensor] = []

    def call(cut: tiling.ChainTiles) -> None:
        blocks = triton.cdiv(hidden, cut.chunks[1])
        count = tiling.count_parts(where.pixels, cut.pixels, hidden * (channels + columns), blocks, device)
        sizes = (hidden * channels, hidden, columns * hidden, columns)
        made[:] = [torch.empty((count, size), dtype=torch.float32, device=seen.device) for size in sizes]
        tensors = (seen, grad, source, w1, *given, *made)
        options = {**chain_constants(cut), "WIDE": where.wide}
        forward.launch(
            backward_kernels.pair_weight_gradient, (count, blocks), *tensors, *arguments, **constants, **options
        )

    call(autotune.choose("pair_weight_gradient", (channels, hidden, columns, *arguments), seen, candidates, call))
    return made


def chain_constants(cut: tiling.ChainTiles) -> dict[str, int]:
    """Return how a pair is cut, as its kernels take it."""
    blocks = dict(zip(("BK", "B1", "B2"), cut.chunks, strict=True))
    return {"BM": cut.pixels, **blocks, "num_warps": cut.warps, "num_stages": cut.stages}


def differentiate_layer(grad: Tensor, x: Tensor, source: Tensor, layers: ChainArguments, wanted: Wanted) -> Gradients:
    """Compute the gradients of one layer, of any kernel, stride, padding and dilation."""
    (weight,), (bias,) = layers.weights, layers.biases
    grad_input = x.new_empty(0)
    if wanted.input:
        grad_input = empty_input_gradient(x, (1, 1), wanted=True)
        layer_input_gradient(grad, source, weight, grad_input, layers)
    if not wanted.parameters():
        return grad_input, [x.new_empty(0)], [x.new_empty(0)]
    part_weight, part_bias = layer_parts(x, grad, source, weight, layers)
    return grad_input, [add(part_weight, weight, wanted.weights[0])], [add(part_bias, bias, wanted.biases[0])]


def layer_input_gradient(grad: Tensor, source: Tensor, weight: Tensor, target: Tensor, layers: ChainArguments) -> None:
    """Compute one layer's input gradient into the target."""
    matrix, steps = forward.dense(weight)
    sizes = (*target.shape[2:], *grad.shape[2:])
    pixels = target.shape[0] * target.shape[2] * target.shape[3]
    columns, channels = weight.shape[:2]
    device_tiles = tiling.layer_tiles(channels, columns, 1, target.dtype.itemsize)

    def call(cut: tiling.LayerTiles) -> None:
        forward.launch(
            backward_kernels.layer_input_gradient,
            (triton.cdiv(pixels, cut.pixels) * triton.cdiv(channels, cut.columns),),
            *(grad, source, matrix, target, pixels, *sizes),
            *(*grad.stride(), *source.stride(), *target.stride(), *steps),
            **layer_constants(weight, layers),
            **forward.layer_constants(cut),
            **forward.number_constants(target),
            WIDE=needs_64_bits(grad, source, target),
        )

    key = (*weight.shape, *layers.stride, *layers.padding, *layers.dilation, *target.shape, *target.stride())
    call(autotune.choose("layer_input_gradient", key, target, device_tiles, call))


def layer_parts(
    x: Tensor, grad: Tensor, source: Tensor, weight: Tensor, layers: ChainArguments
) -> tuple[Tensor, Tensor]:
    """Return the parts of one layer's gradients: the weight's (parts, N C taps) and the bias's (parts, N)."""
    columns, summands = weight.shape[0], weight[0].numel()
    cut = tiling.weight_gradient_tiles(columns, summands)
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    blocks = triton.cdiv(columns, cut.columns), triton.cdiv(summands, cut.summands)
    device = forward.device_of(x)
    count = tiling.count_parts(pixels, cut.pixels, columns * (summands + 1), blocks[0] * blocks[1], device)
    parts = [torch.empty((count, n), dtype=torch.float32, device=x.device) for n in (columns * summands, columns)]
    forward.launch(
        backward_kernels.layer_weight_gradient,
        (count, *blocks),
        *(x, grad, source, *parts, pixels, *x.shape[2:], *grad.shape[2:]),
        *(*x.stride(), *grad.stride(), *source.stride()),
        **layer_constants(weight, layers),
        **forward.layer_constants(cut),
        **forward.number_constants(x),
        WIDE=needs_64_bits(x, grad, source),
    )
    return parts[0], parts[1]


def layer_constants(weight: Tensor, layers: ChainArguments) -> dict[str, Any]:
    """Return one layer's shape as its backward kernels take it."""
    names = ("N", "C", "KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW", "ACTIVATION")
    values = (*weight.shape, *layers.stride, *layers.padding, *layers.dilation, layers.activations[0])
    return dict(zip(names, values, strict=True))


def add(parts: Tensor, like: Tensor | None, wanted: bool) -> Tensor:
    """Return a gradient from its parts, in the shape and dtype of its parameter; empty where it is not wanted."""
    if like is None or not wanted:
        return parts.new_empty(0) if like is None else like.new_empty(0)
    result = like.new_empty(like.shape)
    grid = (triton.cdiv(like.numel(), 256),)
    forward.launch(backward_kernels.add_parts, grid, parts, result, parts.shape[0], like.numel(), BLOCK=256)
    return result
