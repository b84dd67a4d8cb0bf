"""Backward pass on a GPU: compute the groups' inputs again, then launch the kernels of each group's gradients."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments, Gradients, needs_input_gradient
from nin.ops.gpu import backward_kernels, forward, tile_sizes
from nin.ops.gpu.autotune import launch_tuned
from nin.ops.gpu.engine_plan import BackwardGroup
from nin.ops.gpu.strides import coalesce_pixels, needs_64_bit_offsets, subsample


def mlpconv_backward(
    grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool], plan: Sequence[BackwardGroup]
) -> Gradients:
    """Compute the gradients group by group, the last first; see `reference.mlpconv_backward` for the arguments."""
    count = len(chain.weights)
    subchains = [chain.subchain(group.first, group.count) for group in plan]
    inputs = [x]
    # only what passes from group to group is written; a pair's hidden layer is computed again in its kernels
    for group, subchain in zip(plan[:-1], subchains, strict=False):
        inputs.append(forward.mlpconv(inputs[-1], subchain, group.output_plan))
    outputs = [*inputs[1:], y]
    grad_weights, grad_biases = [x.new_empty(0) for _ in range(count)], [x.new_empty(0) for _ in range(count)]
    for k, group in reversed(list(enumerate(plan))):
        where = slice(group.first, group.first + group.count)
        go_on = needs_input_gradient(needs, group.first)
        group_needs = [go_on, *needs[1 : 1 + count][where], *needs[1 + count :][where]]
        grad, grad_weights[where], grad_biases[where] = group_backward(
            grad, inputs[k], outputs[k], subchains[k], group_needs, group
        )
        if not go_on:
            break
    return grad if needs[0] else x.new_empty(0), grad_weights, grad_biases


def group_backward(
    grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool], group: BackwardGroup
) -> Gradients:
    """Compute a group's gradients by the engine that the plan names."""
    if not group.fused:
        return reference.mlpconv_backward(grad, x, y, chain, needs)
    source = y
    if group.preactivation_plan:
        linear = chain._replace(activations=[*chain.activations[:-1], "none"])
        source = forward.mlpconv(x, linear, group.preactivation_plan)
    gradients = reference.empty_gradients(x, chain, needs)
    kernels = pair_backward if group.count == 2 else layer_backward
    parts = kernels(grad, x, source, chain, needs, group, gradients[0])
    if parts:
        # the parts are in the kernels' order: weight and bias of each layer
        in_order = [t for layer in zip(*gradients[1:], strict=True) for t in layer]
        for part, gradient in zip(parts, in_order, strict=True):
            sum_parts(part, gradient)
    return gradients


def pair_backward(
    grad: Tensor,
    x: Tensor,
    source: Tensor,
    chain: ChainArguments,
    needs: Sequence[bool],
    group: BackwardGroup,
    grad_x: Tensor,
) -> list[Tensor]:
    """Compute the gradients of two 1×1 layers without storing their hidden layer.

    Args:
        grad: gradient of the output.
        x: input of the pair.
        source: what the derivative of the last activation is taken from: its result, or its argument.
        chain: the two layers.
        needs: which gradients are needed, see `reference.mlpconv_backward`.
        group: the pair's plan.
        grad_x: uninitialised, for the input's gradient.

    Returns:
        The parts of the parameters' gradients, (parts, size) each: first weight and bias, second weight and bias; none
        where no parameter needs one.
    """
    (w1, w2), (b1, _) = [forward.dense_filters(weight)[0] for weight in chain.weights], chain.biases
    tensors = subsample(x, chain.stride), grad, source, w1, forward.bias_or_placeholder(b1, x), w2
    widths = {"C": x.shape[1], "C1": w1.shape[0], "C2": w2.shape[0]}
    activations = {"A1": chain.activations[0], "A2": chain.activations[1]}
    constants = {**widths, **activations, "BIAS1": b1 is not None, **forward.precision_constants(x)}
    if needs[0]:
        if tuple(chain.stride) != (1, 1):  # the kernel writes only the pixels that the stride visits
            grad_x.zero_()
        launch_pair_input_gradient(tensors, subsample(grad_x, chain.stride), constants, group.tiles)
    return pair_weight_gradient_parts(tensors, constants, group.weight_tiles) if any(needs[1:]) else []


def launch_pair_input_gradient(
    tensors: Sequence[Tensor], target: Tensor, constants: dict[str, Any], candidates: Sequence[tile_sizes.ChainTiles]
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

    def launch(tiles: tile_sizes.ChainTiles) -> None:
        grid = (forward.count_persistent_programs(walk.pixels, tiles, widths, target),)
        tile_constants = {**tiles.constants(), "RESIDENT": tiles.resident, "WIDE": walk.needs_64_bits}
        kernel = backward_kernels.pair_input_gradient
        forward.launch(kernel, grid, *tensors, target, *walk.numbers(), **constants, **tile_constants)

    launch_tuned("pair_input_gradient", (*widths, *walk.numbers()), target, candidates, launch)


def pair_weight_gradient_parts(
    tensors: Sequence[Tensor], constants: dict[str, Any], candidates: Sequence[tile_sizes.ChainTiles]
) -> list[Tensor]:
    """Return the parts of a pair's gradients, (parts, size) each: first weight and bias, second weight and bias."""
    walk = coalesce_pixels(*tensors[:3])
    channels, hidden, filters = widths = [constants[name] for name in ("C", "C1", "C2")]
    parts: list[Tensor] = []

    def launch(tiles: tile_sizes.ChainTiles) -> None:
        blocks = triton.cdiv(hidden, tiles.chunks[1])
        device, weights = tile_sizes.device_limits(tensors[0]), hidden * (channels + filters)
        count = tile_sizes.count_parts(walk.pixels, tiles.pixels, weights, blocks, device)
        sizes = (hidden * channels, hidden, filters * hidden, filters)
        # in place: tuning launches several times, and the tiles of the last launch are those that stay
        parts[:] = [torch.empty((count, size), dtype=torch.float32, device=tensors[0].device) for size in sizes]
        tile_constants = {**tiles.constants(), "WIDE": walk.needs_64_bits}
        kernel = backward_kernels.pair_weight_gradient
        forward.launch(kernel, (count, blocks), *tensors, *parts, *walk.numbers(), **constants, **tile_constants)

    launch_tuned("pair_weight_gradient", (*widths, *walk.numbers()), tensors[0], candidates, launch)
    return parts


def layer_backward(
    grad: Tensor,
    x: Tensor,
    source: Tensor,
    chain: ChainArguments,
    needs: Sequence[bool],
    group: BackwardGroup,
    grad_x: Tensor,
) -> list[Tensor]:
    """Compute the gradients of one layer, of any kernel, stride, padding and dilation; see `pair_backward`."""
    constants = {"N": chain.weights[0].shape[0], "ACTIVATION": chain.activations[0]}
    constants |= forward.geometry_constants(chain) | forward.precision_constants(x)
    if needs[0]:
        launch_layer_input_gradient(grad, source, grad_x, chain, constants, group.tiles)
    if not any(needs[1:]):
        return []
    return layer_weight_gradient_parts(x, grad, source, chain.weights[0], constants, group.weight_tiles[0])


def launch_layer_input_gradient(
    grad: Tensor,
    source: Tensor,
    target: Tensor,
    chain: ChainArguments,
    constants: dict[str, Any],
    candidates: Sequence[tile_sizes.LayerTiles],
) -> None:
    """Compute one layer's input gradient into the target."""
    (weight,) = chain.weights
    matrix, weight_strides = forward.dense_filters(weight)
    pixels = target.shape[0] * target.shape[2] * target.shape[3]
    wide = needs_64_bit_offsets(grad, source, target)
    numbers = pixels, *target.shape[2:], *grad.shape[2:], *grad.stride(), *source.stride(), *target.stride()

    def launch(tiles: tile_sizes.LayerTiles) -> None:
        grid = (triton.cdiv(pixels, tiles.pixels) * triton.cdiv(weight.shape[1], tiles.columns),)
        arguments = grad, source, matrix, target, *numbers, *weight_strides
        kernel = backward_kernels.layer_input_gradient
        forward.launch(kernel, grid, *arguments, **constants, **tiles.constants(), WIDE=wide)

    shape = (*weight.shape, *chain.stride, *chain.padding, *chain.dilation, *target.shape, *target.stride())
    launch_tuned("layer_input_gradient", shape, target, candidates, launch)


def layer_weight_gradient_parts(
    x: Tensor, grad: Tensor, source: Tensor, weight: Tensor, constants: dict[str, Any], tiles: tile_sizes.LayerTiles
) -> list[Tensor]:
    """Return the parts of one layer's gradients: the weight's (parts, N C taps) and the bias's (parts, N)."""
    filters, columns = weight.shape[0], weight[0].numel()
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    blocks = triton.cdiv(filters, tiles.columns), triton.cdiv(columns, tiles.summands)
    device = tile_sizes.device_limits(x)
    count = tile_sizes.count_parts(pixels, tiles.pixels, filters * (columns + 1), blocks[0] * blocks[1], device)
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


def sum_parts(parts: Tensor, gradient: Tensor) -> None:
    """Write the sum of a gradient's parts into it, if it is needed: not empty."""
    size = gradient.numel()
    if size:
        grid = (triton.cdiv(size, 256),)
        forward.launch(backward_kernels.add_parts, grid, parts, gradient, parts.shape[0], size, BLOCK=256)
