"""The gradients of a k×k convolution on the CPU, where the compiled kernels are faster than PyTorch's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments, Gradients
from nin.ops.cpu import abi, library
from nin.ops.cpu.library import Kernels
from nin.ops.cpu.weight_cache import packed_weight


def convolution_backward(
    kernels: Kernels, grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool]
) -> Gradients:
    """Compute the gradients of a k×k convolution with no activation or ReLU; see `reference.mlpconv_backward`."""
    weight, bias = chain.weights[0], chain.biases[0]
    need_x, need_weight, need_bias = needs[0], needs[1], needs[2] and bias is not None
    nothing = x.new_empty(0)
    if need_weight and not need_x and _is_direct_faster(x, chain):
        grad_weight, grad_bias = direct_weight_gradient(kernels, grad, x, y, chain)
        return nothing, [grad_weight], [grad_bias if need_bias else nothing]
    grad_z = reference.activation_backward(grad, y, chain.activations[0])
    grad_x = winograd_input_gradient(kernels, grad_z, x, chain) if need_x else nothing
    grad_w = winograd_weight_gradient(kernels, grad_z, x, chain) if need_weight else nothing
    if grad_x is None or grad_w is None:
        mask = [grad_x is None, grad_w is None, False]
        from_pytorch = torch.ops.aten.convolution_backward(
            grad_z, x, weight, None, *chain.geometry, False, (0, 0), 1, mask
        )
        if grad_x is None:
            grad_x = reference.to_memory_format(from_pytorch[0], reference.memory_format_of(x))
        if grad_w is None:
            grad_w = from_pytorch[1].contiguous()
    return grad_x, [grad_w], [grad_z.sum((0, 2, 3)) if need_bias else nothing]


# A network's first layer, whose input needs no gradient: PyTorch's backward takes 1.1 to 2.3 times as long for 3 to 8
# channels in float32 (docs/kernels.md). With shorter kernel lines, and in bfloat16, PyTorch is faster.
MAX_DIRECT_CHANNELS, MIN_DIRECT_LINE = 8, 8


def _is_direct_faster(x: Tensor, chain: ChainArguments) -> bool:
    _, channels, _, width = chain.weights[0].shape
    undilated = tuple(chain.dilation) == (1, 1)
    few_channels = channels <= MAX_DIRECT_CHANNELS and width * channels >= MIN_DIRECT_LINE
    return undilated and x.dtype == torch.float32 and few_channels


def direct_weight_gradient(
    kernels: Kernels, grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight and of the bias, with ReLU's derivative in the same pass."""
    columns, channels, height, width = chain.weights[0].shape
    row = (columns + 15) // 16 * 16  # whole vectors of 16 floats
    # a row for each tap and channel, and the bias's last
    sums = torch.empty(height * width * channels + 1, row, dtype=torch.float32)
    relu_output = y.data_ptr() if chain.activations[0] == "relu" else 0
    addresses = x.data_ptr(), grad.data_ptr(), relu_output, sums.data_ptr()
    structs = abi.pack_chain(x, y, chain), abi.pack_gradient_strides(grad)
    run, handle = library.loaded().nin_tap_gradient, kernels.handles[x.dtype]
    library.check(run(handle, *structs, columns, *addresses, row, library.thread_pool()))
    sums = sums[:, :columns].to(x.dtype)
    return sums[:-1].view(height, width, channels, columns).permute(3, 2, 0, 1).contiguous(), sums[-1].clone()


def winograd_input_gradient(kernels: Kernels, grad_z: Tensor, x: Tensor, chain: ChainArguments) -> Tensor | None:
    """Return the input's gradient, or None where Winograd is not faster.

    It is the forward pass of ``grad_z`` with flipped kernels, and with input and output channels exchanged.
    """
    weight = chain.weights[0]
    padding = [size - 1 - border for size, border in zip(weight.shape[2:], chain.padding, strict=True)]
    if tuple(chain.stride) != (1, 1) or tuple(chain.dilation) != (1, 1) or min(padding) < 0:
        return None
    transposed = ChainArguments([weight.transpose(0, 1)], [None], (1, 1), padding, (1, 1), ["none"])
    grad_x = torch.empty(x.shape, dtype=x.dtype, memory_format=reference.memory_format_of(x))
    packed_chain, size = abi.choose_winograd(kernels, abi.pack_chain(grad_z, grad_x, transposed), transposed)
    if not size:
        return None
    packed = packed_weight(kernels, weight, for_input_gradient=True, winograd_tile_size=size)
    abi.run_forward(kernels, packed_chain, [packed], transposed, grad_z, grad_x)
    return grad_x


# Winograd-domain sums of a weight gradient, as floats (64 MB), and output pixels that they sum over. With more sums, or
# fewer pixels, reading and writing the sums takes longer than PyTorch's backward.
MAX_WINOGRAD_SUMS, MIN_WINOGRAD_PIXELS = 1 << 24, 1024


def winograd_weight_gradient(kernels: Kernels, grad_z: Tensor, x: Tensor, chain: ChainArguments) -> Tensor | None:
    """Return Gᵀ (Bᵀ x B ⊙ A grad_z Aᵀ) G, summed over all tiles, or None where Winograd is not faster."""
    weight = chain.weights[0]
    packed_chain, size = abi.choose_winograd(kernels, abi.pack_chain(x, grad_z, chain), chain)
    pixels = grad_z.shape[0] * grad_z.shape[2] * grad_z.shape[3]
    if not size or size**2 * weight.shape[0] * weight.shape[1] > MAX_WINOGRAD_SUMS or pixels < MIN_WINOGRAD_PIXELS:
        return None
    grad_weight = torch.empty(weight.shape, dtype=torch.float32)
    handle, addresses = kernels.handles[x.dtype], (x.data_ptr(), grad_z.data_ptr(), grad_weight.data_ptr())
    gradient = library.loaded().nin_winograd_gradient
    library.check(gradient(handle, packed_chain, weight.shape[0], *addresses, library.thread_pool()))
    return grad_weight.to(x.dtype)
