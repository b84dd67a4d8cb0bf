"""Backward pass on a GPU: compute the groups' inputs again, then launch the kernels of each group's gradients."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments, Gradients
from nin.ops.gpu import backward_kernels, forward, tiling
from nin.ops.gpu.autotune import launch_tuned
from nin.ops.gpu.plan import BackwardGroup
from nin.ops.gpu.strides import coalesce_pixels, needs_64_bit_offsets, subsample


@dataclasses.dataclass(frozen=True)
class NeededGradients:
    """Which gradients of a group are needed: the input's, then its layers' weights' and biases'."""

    input: bool
    weights: Sequence[bool]
    biases: Sequence[bool]


def mlpconv_backward(
    grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, needs: Sequence[bool], plan: Sequence[BackwardGroup]
) -> Gradients:
    """Compute the gradients group by group, the last first; see `reference.mlpconv_backward` for the arguments."""
    count = len(layers.weights)
    chains = [layers.subchain(group.first, group.count) for group in plan]
    inputs = [x]
    # only what passes from group to group is written; a pair's hidden layer is computed again in its kernels
    for group, chain in zip(plan[:-1], chains, strict=False):
        inputs.append(forward.mlpconv(inputs[-1], chain, group.output_plan))
    outputs = [*inputs[1:], y]
    grad_weights, grad_biases = [x.new_empty(0) for _ in range(count)], [x.new_empty(0) for _ in range(count)]
    for k, group in reversed(list(enumerate(plan))):
        where = slice(group.first, group.first + group.count)
        below = needs[0] or any(needs[1 : 1 + group.first]) or any(needs[1 + count : 1 + count + group.first])
        biases = [
            need and bias is not None
            for need, bias in zip(needs[1 + count :][where], layers.biases[where], strict=True)
        ]
        needed = NeededGradients(below, needs[1 : 1 + count][where], biases)
        grad, grad_weights[where], grad_biases[where] = group_backward(
            grad, inputs[k], outputs[k], chains[k], needed, group
        )
        if not below:
            break
    return grad if needs[0] else x.new_empty(0), grad_weights, grad_biases


def group_backward(
    grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, needed: NeededGradients, group: BackwardGroup
) -> Gradients:
    """Compute a group's gradients by the engine that the plan names."""
    if not group.fused:
        return reference.mlpconv_backward(grad, x, y, layers, [needed.input, *needed.weights, *needed.biases])
    source = y
    if group.preactivation_plan:
        linear = layers._replace(activations=[*layers.activations[:-1], "none"])
        source = forward.mlpconv(x, linear, group.preactivation_plan)
    kernels = pair_backward if group.count == 2 else layer_backward
    return kernels(grad, x, source, layers, needed, group)


def pair_backward(
    grad: Tensor, x: Tensor, source: Tensor, layers: ChainArguments, needed: NeededGradients, group: BackwardGroup
) -> Gradients:
    """Compute the gradients of two 1×1 layers without storing their hidden layer.

    ``source`` is what the derivative of the last activation is taken from: its result, or its argument.
    """
    (w1, w2), (b1, _) = [forward.dense_filters(weight)[0] for weight in layers.weights], layers.biases
    tensors = subsample(x, layers.stride), grad, source, w1, forward.bias_or_placeholder(b1, x), w2
    constants = {
        **dict(zip(("C", "C1", "C2"), (x.shape[1], w1.shape[0], w2.shape[0]), strict=True)),
        **dict(zip(("A1", "A2"), layers.activations, strict=True)),
        "BIAS1": b1 is not None,
        **forward.precision_constants(x),
    }
    grad_input = x.new_empty(0)
    if needed.input:
        grad_input = empty_input_gradient(x, layers.stride)
        target = subsample(grad_input, layers.stride)
        launch_pair_input_gradient(tensors, target, constants, group.tiles)
    if not any((*needed.weights, *needed.biases)):
        return grad_input, [x.new_empty(0) for _ in range(2)], [x.new_empty(0) for _ in range(2)]
    parts = pair_weight_gradient_parts(tensors, constants, group.weight_tiles)
    weights = list(map(sum_parts, parts[::2], layers.weights, needed.weights))
    return grad_input, weights, list(map(sum_parts, parts[1::2], layers.biases, needed.biases))


def empty_input_gradient(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Return an uninitialised gradient in the input's layout; zeros where the stride skips pixels."""
    layout = reference.memory_format_of(x)
    make = torch.empty if tuple(stride) == (1, 1) else torch.zeros
    return reference.to_memory_format(make(x.shape, dtype=x.dtype, device=x.device).to(memory_format=layout), layout)


def launch_pair_input_gradient(
    tensors: Sequence[Tensor],
    target: Tensor,
    constants: dict[str, Any],
    candidates: Sequence[tiling.ChainTiles],
) -> None:
    """Compute the input's gradient of two 1×1 layers into the target.

    Args:
        tensors: input, gradient and source (see `pair_backward`), first weight and bias, second weight.
        target: for the gradient.
        constants: the kernel's compile-time arguments, tiles not included.
        candidates: tiles, the default first.
    """
    widths = [constants[name] for name in ("C", "C1", "C2")]
    walk = coalesce_pixels(*tensors[:3], target)

    def launch(tiles: tiling.ChainTiles) -> None:
        forward.launch(
            backward_kernels.pair_input_gradient,
            (forward.count_persistent_programs(walk.pixels, tiles, widths, target),),
            *(*tensors, target, *walk.numbers()),
            **constants,
            **tiles.constants(),
            RESIDENT=tiles.resident,
            WIDE=walk.needs_64_bits,
        )

    launch_tuned("pair_input_gradient", (*widths, *walk.numbers()), target, candidates, launch)


def pair_weight_gradient_parts(
    tensors: Sequence[Tensor],
    constants: dict[str, Any],
    candidates: Sequence[tiling.ChainTiles],
) -> list[Tensor]:
    """Return the parts of a pair's gradients, (parts, size) each: first weight and bias, second weight and bias."""
    walk = coalesce_pixels(*tensors[:3])
    channels, hidden, filters = widths = [constants[name] for name in ("C", "C1", "C2")]
    parts: list[Tensor] = []

    def launch(tiles: tiling.ChainTiles) -> None:
        blocks = triton.cdiv(hidden, tiles.chunks[1])
        device, weights = tiling.device_limits(tensors[0]), hidden * (channels + filters)
        count = tiling.count_parts(walk.pixels, tiles.pixels, weights, blocks, device)
        sizes = (hidden * channels, hidden, filters * hidden, filters)
        parts[:] = [torch.empty((count, size), dtype=torch.float32, device=tensors[0].device) for size in sizes]
        forward.launch(
            backward_kernels.pair_weight_gradient,
            (count, blocks),
            *(*tensors, *parts, *walk.numbers()),
            **constants,
            **tiles.constants(),
            WIDE=walk.needs_64_bits,
        )

    launch_tuned("pair_weight_gradient", (*widths, *walk.numbers()), tensors[0], candidates, launch)
    return parts


def layer_backward(
    grad: Tensor, x: Tensor, source: Tensor, layers: ChainArguments, needed: NeededGradients, group: BackwardGroup
) -> Gradients:
    """Compute the gradients of one layer, of any kernel, stride, padding and dilation; see `pair_backward`."""
    names = ("N", "C", "KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW", "ACTIVATION")
    geometry = (*layers.weights[0].shape, *layers.stride, *layers.padding, *layers.dilation, layers.activations[0])
    constants = {**dict(zip(names, geometry, strict=True)), **forward.precision_constants(x)}
    grad_input = x.new_empty(0)
    if needed.input:
        grad_input = empty_input_gradient(x, (1, 1))
        launch_layer_input_gradient(grad, source, grad_input, layers, constants, group.tiles)
    if not any((*needed.weights, *needed.biases)):
        return grad_input, [x.new_empty(0)], [x.new_empty(0)]
    weight, bias = layer_weight_gradient_parts(x, grad, source, layers.weights[0], constants, group.weight_tiles[0])
    return (
        grad_input,
        [sum_parts(weight, layers.weights[0], needed.weights[0])],
        [sum_parts(bias, layers.biases[0], needed.biases[0])],
    )


def launch_layer_input_gradient(
    grad: Tensor,
    source: Tensor,
    target: Tensor,
    layers: ChainArguments,
    constants: dict[str, Any],
    candidates: Sequence[tiling.LayerTiles],
) -> None:
    """Compute one layer's input gradient into the target."""
    (weight,) = layers.weights
    matrix, weight_strides = forward.dense_filters(weight)
    pixels = target.shape[0] * target.shape[2] * target.shape[3]

    def launch(tiles: tiling.LayerTiles) -> None:
        forward.launch(
            backward_kernels.layer_input_gradient,
            (triton.cdiv(pixels, tiles.pixels) * triton.cdiv(weight.shape[1], tiles.columns),),
            *(grad, source, matrix, target, pixels, *target.shape[2:], *grad.shape[2:]),
            *(*grad.stride(), *source.stride(), *target.stride(), *weight_strides),
            **constants,
            **tiles.constants(),
            WIDE=needs_64_bit_offsets(grad, source, target),
        )

    shape = (*weight.shape, *layers.stride, *layers.padding, *layers.dilation, *target.shape, *target.stride())
    launch_tuned("layer_input_gradient", shape, target, candidates, launch)


def layer_weight_gradient_parts(
    x: Tensor, grad: Tensor, source: Tensor, weight: Tensor, constants: dict[str, Any], tiles: tiling.LayerTiles
) -> list[Tensor]:
    """Return the parts of one layer's gradients: the weight's (parts, N C taps) and the bias's (parts, N)."""
    filters, columns = weight.shape[0], weight[0].numel()
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    blocks = triton.cdiv(filters, tiles.columns), triton.cdiv(columns, tiles.summands)
    device = tiling.device_limits(x)
    count = tiling.count_parts(pixels, tiles.pixels, filters * (columns + 1), blocks[0] * blocks[1], device)
    parts = [torch.empty((count, size), dtype=torch.float32, device=x.device) for size in (filters * columns, filters)]
    forward.launch(
        backward_kernels.layer_weight_gradient,
        (count, *blocks),
        *(x, grad, source, *parts, pixels, *x.shape[2:], *grad.shape[2:]),
        *(*x.stride(), *grad.stride(), *source.stride()),
        **constants,
        **tiles.constants(),
        WIDE=needs_64_bit_offsets(x, grad, source),
    )
    return parts


def sum_parts(parts: Tensor, parameter: Tensor | None, needed: bool) -> Tensor:
    """Return a gradient from its parts, in the parameter's shape and dtype; empty where it is not needed."""
    if parameter is None or not needed:
        return parts.new_empty(0) if parameter is None else parameter.new_empty(0)
    gradient = parameter.new_empty(parameter.shape)
    size = parameter.numel()
    grid = (triton.cdiv(size, 256),)
    forward.launch(backward_kernels.add_parts, grid, parts, gradient, parts.shape[0], size, BLOCK=256)
    return gradient
