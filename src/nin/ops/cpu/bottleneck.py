"""The compiled CPU kernel of ``nin::inverted_bottleneck`` in float32 and bfloat16, registered over the reference."""

import math
from typing import Any

import torch
from torch import Tensor

from nin.ops import bottleneck_reference as reference
from nin.ops import schema
from nin.ops.bottleneck_reference import BottleneckArguments, as_dispatcher_kernel
from nin.ops.cpu import abi, call_cache, dispatch, library, weight_cache
from nin.ops.cpu.call_cache import CallKey
from nin.ops.reference import memory_format_of


def call_key(x: Tensor, arguments: BottleneckArguments) -> CallKey | None:
    """Return the key for `call_cache.repeat` of a call without gradients, of plain tensors; None if it has none."""
    kernels = dispatch.KERNELS
    key = None if kernels is None else call_cache.key_of(kernels, x, arguments.chain)
    return None if key is None else ("inverted_bottleneck", arguments.residual, arguments.norm_eps, *key)


def serves(x: Tensor) -> bool:
    """Return whether this kernel computes a block of such images where they are and as they would be cast."""
    if dispatch.KERNELS is None or not x.is_cpu:
        return False
    casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return (torch.get_autocast_dtype("cpu") if casts else x.dtype) in library.DTYPES


def inverted_bottleneck(x: Tensor, arguments: BottleneckArguments, key: CallKey | None = None) -> Tensor:
    """Compute the block some lines at a time, so that the hidden tensors stay in the cache.

    Args:
        x: the images.
        arguments: the other arguments.
        key: of a call to be repeated, see `call_key`.
    """
    schema.check_memory((x, *arguments.weights, *arguments.biases))
    weight_cache.take_back_constants(arguments.weights)
    kernels = dispatch.KERNELS
    if kernels is None or not _is_supported(x, arguments) or _multiplies_padding(arguments):
        return reference.inverted_bottleneck(x, arguments)
    output: dict[str, Any] = {"size": arguments.output_shape(x), "dtype": x.dtype, "memory_format": memory_format_of(x)}
    y = torch.empty(**output)
    if y.numel() == 0:  # an empty batch has nothing to compute
        return y
    chain = arguments.chain
    depthwise = arguments.depthwise()
    packed_chain = abi.pack_chain(x, y, chain, depthwise, arguments.norm_eps)
    copies = weight_cache.packed_copies(kernels, chain.weights, as_floats=depthwise)
    layers, _tensors = abi.pack_layers([copy.packed for copy in copies], chain)
    function, residual = library.loaded().nin_inverted_bottleneck, int(arguments.residual)
    structs = kernels.handles[x.dtype], packed_chain, layers, residual
    library.check(function(*structs, x.data_ptr(), y.data_ptr(), library.thread_pool(), None, None, 0))
    if key is not None:
        call_cache.remember(key, kernels, packed_chain, copies, chain, output, (x, y), function, (residual,))
    return y


def _is_supported(x: Tensor, arguments: BottleneckArguments) -> bool:
    """Return whether the tensors fit together; if not, the reference raises the error that says why."""
    weights, count = arguments.weights, len(arguments.weights)
    if x.dtype not in library.DTYPES or x.dim() != 4 or 0 in x.shape[1:] or not 2 <= count <= 5:
        return False
    if arguments.norm_eps is not None and (count != 3 or not arguments.norm_eps >= 0):
        return False
    channels = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, arguments.biases, strict=True)):
        if weight.dim() != 4 or 0 in weight.shape or weight.dtype != x.dtype or not weight.is_cpu:
            return False
        expected = (channels, 1) if i == arguments.depthwise() else (weight.shape[0], channels, 1, 1)
        if weight.shape[: len(expected)] != expected:
            return False
        channels = weight.shape[0]
        if bias is not None and (bias.shape != (channels,) or bias.dtype != x.dtype or not bias.is_cpu):
            return False
    if arguments.squeezes() and weights[-2].shape[0] != weights[arguments.depthwise()].shape[0]:
        return False
    sides = arguments.output_shape(x)
    return min(sides[2:]) > 0 and (not arguments.residual or sides == tuple(x.shape))


def _multiplies_padding(arguments: BottleneckArguments) -> bool:
    """Return whether the zeros beside the lines meet a weight that is not finite: NaN, where PyTorch skips them.

    Calls that are repeated do not come here: their weights are those that were looked at.
    """
    return arguments.padding[1] > 0 and not math.isfinite(arguments.weights[arguments.depthwise()].sum().item())


if dispatch.KERNELS is not None:
    schema.library.impl("inverted_bottleneck", as_dispatcher_kernel(inverted_bottleneck), "CPU")
