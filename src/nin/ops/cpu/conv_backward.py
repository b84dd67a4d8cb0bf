"""The gradients of a k×k convolution on the CPU, where the compiled kernels are faster than PyTorch's."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments, Gradients
from nin.ops.cpu import abi, library, weight_cache


def convolution_backward(
    kernels: library.Kernels, grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, needs: Sequence[bool]
) -> Gradients:
    """Compute a k×k convolution's gradients; its activation is none or ReLU. See ``reference.mlpconv_backward``."""
    weight, bias = layers.weights[0], layers.biases[0]
    need_x, need_weight, need_bias = needs[0], needs[1], needs[2] and bias is not None
    if need_weight and not need_x and _sums_few_channels(x, layers):
        of_weight, of_bias = tap_gradient(kernels, grad, x, y, layers)
        return x.new_empty(0), [of_weight], [of_bias if need_bias else x.new_empty(0)]
    g = reference.activation_backward(grad, y, layers.activations[0])
    nothing = x.new_empty(0)
    grad_x: Tensor | None = input_gradient(kernels, g, x, layers) if need_x else nothing
    grad_weight: Tensor | None = weight_gradient(kernels, g, x, layers) if need_weight else nothing
    if grad_x is None or grad_weight is None:
        mask, geometry = [grad_x is None, grad_weight is None, False], (layers.stride, layers.padding, layers.dilation)
        rest = torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, False, (0, 0), 1, mask)
        grad_x = reference.to_memory_format(rest[0], reference.memory_format_of(x)) if grad_x is None else grad_x
        grad_weight = rest[1].contiguous() if grad_weight is None else grad_weight
    return grad_x, [grad_weight], [g.sum((0, 2, 3)) if need_bias else nothing]


# The first layer of a network, whose input wants no gradient: PyTorch's backward takes 1.1 to 2.3 times as long for 3
# to 8 channels in float32 (docs/kernels.md). With fewer numbers in a run, and in bfloat16, it is the faster one.
FEWEST_IN_A_RUN, MOST_CHANNELS = 8, 8


def _sums_few_channels(x: Tensor, layers: ChainArguments) -> bool:
    _, channels, _, width = layers.weights[0].shape
    dense = tuple(layers.dilation) == (1, 1) and x.dtype == torch.float32
    return dense and channels <= MOST_CHANNELS and width * channels >= FEWEST_IN_A_RUN


def tap_gradient(
    kernels: library.Kernels, grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight and of the bias, tap by tap; ReLU's gate is applied on the way."""
    columns, channels, height, width = layers.weights[0].shape
    row = (columns + 15) // 16 * 16
    sums = torch.empty(height * width * channels + 1, row, dtype=torch.float32)
    row_of_strides = struct.pack("8q", *grad.stride(), 0, 0, 0, 0)
    gate = y.data_ptr() if layers.activations[0] == "relu" else 0
    addresses = x.data_ptr(), grad.data_ptr(), gate, sums.data_ptr()
    run, handle = library.loaded().nin_tap_gradient, kernels.handles[x.dtype]
    library.check(run(handle, abi.pack(x, y, layers), row_of_strides, columns, *addresses, row, library.pool()))
    sums = sums[:, :columns].to(x.dtype)
    return sums[:-1].view(height, width, channels, columns).permute(3, 2, 0, 1).contiguous(), sums[-1].clone()


def input_gradient(kernels: library.Kernels, g: Tensor, x: Tensor, layers: ChainArguments) -> Tensor | None:
    """Return the convolution of ``g`` with the taps turned over; None where Winograd's transforms are not faster."""
    weight = layers.weights[0]
    padding = [size - 1 - border for size, border in zip(weight.shape[2:], layers.padding, strict=True)]
    if tuple(layers.stride) != (1, 1) or tuple(layers.dilation) != (1, 1) or min(padding) < 0:
        return None
    turned = ChainArguments([weight.transpose(0, 1)], [None], (1, 1), padding, (1, 1), ["none"])
    grad_x = torch.empty(x.shape, dtype=x.dtype, memory_format=reference.memory_format_of(x))
    given, winograd = abi.choose_algorithm(kernels, abi.pack(g, grad_x, turned), turned)
    if not winograd:
        return None
    floats = kernels.handles[torch.float32]
    packed = weight_cache.packed_weight(floats, weight, for_input_gradient=True, winograd=winograd)
    abi.run_forward(kernels, given, [packed], turned, g, grad_x)
    return grad_x


# Floats that a weight's gradient sums up at its frequencies (64 MB), and results that it sums over. With more sums, or
# fewer results, it is reading and writing the sums that takes the time.
MOST_SUMS, FEWEST_RESULTS = 1 << 24, 1024


def weight_gradient(kernels: library.Kernels, g: Tensor, x: Tensor, layers: ChainArguments) -> Tensor | None:
    """Return Gᵀ (Bᵀ x B ⊙ A g Aᵀ) G, summed over all squares; None where Winograd's transforms are not faster."""
    weight = layers.weights[0]
    given, size = abi.choose_algorithm(kernels, abi.pack(x, g, layers), layers)
    results = g.shape[0] * g.shape[2] * g.shape[3]
    if not size or size**2 * weight.shape[0] * weight.shape[1] > MOST_SUMS or results < FEWEST_RESULTS:
        return None
    grad_weight = torch.empty(weight.shape, dtype=torch.float32)
    handle, addresses = kernels.handles[x.dtype], (x.data_ptr(), g.data_ptr(), grad_weight.data_ptr())
    gradient = library.loaded().nin_winograd_gradient
    library.check(gradient(handle, given, weight.shape[0], *addresses, library.pool()))
    return grad_weight.to(x.dtype)
