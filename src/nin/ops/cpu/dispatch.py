"""The compiled CPU kernels of ``nin::mlpconv``, registered over the reference.

``NIN_CPU_ISA`` forces an instruction set (for tests and comparisons): one of ``avx512_amx``, ``avx512_bf16``,
``avx512``, ``avx2``, ``portable``, or ``reference`` for plain PyTorch. One that the machine lacks gives way to the next
one down.
"""

import os
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nin.ops import reference, schema
from nin.ops.arguments import ChainArguments, Gradients
from nin.ops.cpu import abi, call_cache, library, weight_cache
from nin.ops.cpu.call_cache import CallKey
from nin.ops.cpu.conv_backward import convolution_backward
from nin.ops.cpu.library import Kernels
from nin.ops.cpu.weight_cache import packed_copies, packed_weights


def choose_kernels() -> Kernels | None:
    """Return the kernels that ``NIN_CPU_ISA`` and the machine allow; None for the reference."""
    wanted = os.environ.get(library.ISA_VARIABLE) or None
    if wanted not in (None, "reference", *library.INSTRUCTION_SETS):
        known = ", ".join((*library.INSTRUCTION_SETS, "reference"))
        raise ValueError(f"{library.ISA_VARIABLE} must be one of {known}, got {wanted!r}")
    absent = library.LIBRARY is None or wanted == "reference"
    return None if absent else library.find_kernels(library.loaded(), wanted)


def backend_summary() -> str:
    """Return the line of ``nin.backends()`` for the CPU."""
    if library.LIBRARY is None:
        return "reference (PyTorch): installed without a C++ compiler, there is no compiled library"
    if KERNELS is None:
        return f"reference (PyTorch): {library.ISA_VARIABLE}=reference"
    built = library.loaded().nin_version().decode()
    line = f"nin {KERNELS.name} (compiled {built}), float32 and bfloat16"
    return f"{line}; other dtypes, and single small float32 layers: reference"


def call_key(x: Tensor, chain: ChainArguments) -> CallKey | None:
    """Return the key for `call_cache.repeat` of a call without gradients, of plain tensors; None if it has none."""
    return None if KERNELS is None else call_cache.key_of(KERNELS, x, chain)


def mlpconv(x: Tensor, chain: ChainArguments, key: CallKey | None = None) -> Tensor:
    """Compute the chain tile by tile, so that the hidden layers stay in the cache.

    Args:
        x: the images.
        chain: the other arguments.
        key: of a call to be repeated, see `call_key`.
    """
    schema.check_memory((x, *chain.weights, *chain.biases))
    weight_cache.take_back_constants(chain.weights)
    if KERNELS is None or not _is_supported(x, chain) or is_faster_in_pytorch(x, chain):
        if key is not None:
            call_cache.remember_reference(key)
        return reference.mlpconv(x, chain)
    layout = reference.memory_format_of(x)
    output: dict[str, Any] = {"size": chain.output_shape(x), "dtype": x.dtype, "memory_format": layout}
    y = torch.empty(**output)
    if y.numel() > 0:  # an empty batch has nothing to compute
        packed_chain, tile_size = abi.choose_winograd(KERNELS, abi.pack_chain(x, y, chain), chain)
        copies = packed_copies(KERNELS, chain.weights, winograd_tile_size=tile_size)
        abi.run_forward(KERNELS, packed_chain, [copy.packed for copy in copies], chain, x, y)
        if key is not None:
            call_cache.remember(key, KERNELS, packed_chain, copies, chain, output, (x, y))
    return y


# The two kinds of call in which PyTorch's own convolution was measured faster (docs/kernels.md has the table): single
# float32 layers, which gain nothing from the fused pass.
SMALL_CALL_MACS, SMALL_CALL_PIXELS = 150_000, 512  # calls of 20 µs, of which PyTorch's take 2 to 4 µs less
FEW_IN_CHANNELS, FEW_OUT_CHANNELS, MANY_PIXELS = 16, 15, 2048  # NCHW: transposing the tiles takes most of the time


def is_faster_in_pytorch(x: Tensor, chain: ChainArguments) -> bool:
    """Return whether the forward pass goes to the reference although the compiled kernel supports it."""
    if len(chain.weights) > 1 or x.dtype != torch.float32:
        return False
    channels, in_channels, kernel_height, kernel_width = chain.weights[0].shape
    stride, (images, _, height, width) = chain.stride, x.shape
    taps = kernel_height * kernel_width
    pixels = images * height * width // (stride[0] * stride[1])
    if pixels <= SMALL_CALL_PIXELS and pixels * channels * in_channels * taps < SMALL_CALL_MACS:
        return True
    pointwise = chain.is_pointwise() and stride[0] == stride[1] == 1
    few_channels = in_channels <= FEW_IN_CHANNELS and channels <= FEW_OUT_CHANNELS
    return pointwise and few_channels and height * width >= MANY_PIXELS and x.is_contiguous()


# The backward kernel keeps float sums of all weights for each slice of the pixels; with more weights than this,
# PyTorch's backward is faster: its GEMMs, layer by layer, are large enough then.
MAX_BACKWARD_WEIGHTS = 1 << 21


def mlpconv_backward(grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool]) -> Gradients:
    """Compute the gradients with the compiled kernels, if they support the chain; see `reference.mlpconv_backward`."""
    schema.check_memory((grad, x, y, *chain.weights, *chain.biases))
    fits = (grad.shape, grad.dtype) == (y.shape, x.dtype) and grad.numel() > 0
    if KERNELS is not None and fits and _is_supported(x, chain):
        if chain.is_pointwise():
            if sum(weight.numel() for weight in chain.weights) <= MAX_BACKWARD_WEIGHTS:
                return _pointwise_backward(KERNELS, grad, x, y, chain, needs)
        elif len(chain.weights) == 1 and chain.activations[0] in ("none", "relu"):
            return convolution_backward(KERNELS, grad, x, y, chain, needs)
    return reference.mlpconv_backward(grad, x, y, chain, needs)


def _pointwise_backward(
    kernels: Kernels, grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool]
) -> Gradients:
    """Compute the gradients of a 1×1 chain tile by tile."""
    grads = grad_x, grad_weights, grad_biases = reference.empty_gradients(x, chain, needs)
    if tuple(chain.stride) != (1, 1):  # the kernel writes only the pixels that the stride visits
        grad_x.zero_()
    layers, _tensors = abi.pack_layers(packed_weights(kernels, chain.weights), chain)
    transposed = packed_weights(kernels, chain.weights, for_input_gradient=True)
    # the structs nin_layer_gradient; a null pointer where no gradient is needed
    layer_tensors = [t for layer in zip(transposed, grad_weights, grad_biases, strict=True) for t in layer]
    layer_grads = struct.pack(f"{len(layer_tensors)}q", *(t.data_ptr() if t.numel() else 0 for t in layer_tensors))
    strides = abi.pack_gradient_strides(grad, grad_x if needs[0] else None)
    structs = abi.pack_chain(x, y, chain), layers, strides, layer_grads
    addresses = grad.data_ptr(), x.data_ptr(), y.data_ptr(), grad_x.data_ptr() if needs[0] else 0
    backward = library.loaded().nin_backward
    library.check(backward(kernels.handles[x.dtype], *structs, *addresses, library.thread_pool()))
    return grads


def _is_supported(x: Tensor, chain: ChainArguments) -> bool:
    """Return whether the tensors fit together; if not, the reference raises the error that says why."""
    if x.dtype not in library.DTYPES or x.dim() != 4 or 0 in x.shape[1:]:
        return False
    channels = x.shape[1]
    for i, (weight, bias) in enumerate(zip(chain.weights, chain.biases, strict=True)):
        shape = weight.shape
        if len(shape) != 4 or shape[1] != channels or weight.dtype != x.dtype or 0 in shape or not weight.is_cpu:
            return False
        if i > 0 and (shape[2] != 1 or shape[3] != 1):
            return False
        channels = shape[0]
        if bias is not None and (bias.shape != (channels,) or bias.dtype != x.dtype or not bias.is_cpu):
            return False
    return True


# when the package is loaded, so that a wrong NIN_CPU_ISA fails at once and the choice costs a call nothing
KERNELS = choose_kernels()

if KERNELS is not None:
    schema.register_backend("cpu", mlpconv, mlpconv_backward)
