"""The compiled CPU kernels of ``nin::mlpconv``, registered over the reference.

``NIN_CPU_ISA`` forces an instruction set (for tests and comparisons): one of ``avx512_amx``, ``avx512_bf16``,
``avx512``, ``avx2``, ``portable``, or ``reference`` for plain PyTorch. One that the machine lacks gives way to the next
one down.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from nin.ops import reference, schema
from nin.ops.arguments import ChainArguments, Gradients, as_dispatcher_backward_kernel, as_dispatcher_kernel
from nin.ops.cpu import abi, conv_backward, library, weight_cache


def choose_kernels() -> library.Kernels | None:
    """Return the kernels that ``NIN_CPU_ISA`` and the machine allow; None for the reference."""
    wanted = os.environ.get(library.ISA_VARIABLE) or None
    if wanted not in (None, "reference", *library.INSTRUCTION_SETS):
        known = ", ".join((*library.INSTRUCTION_SETS, "reference"))
        raise ValueError(f"{library.ISA_VARIABLE} must be one of {known}, got {wanted!r}")
    absent = library.LIBRARY is None or wanted == "reference"
    return None if absent else library.find_kernels(library.loaded(), wanted)


def backend_summary() -> str:
    """Return one line for ``nin.backends()``."""
    if library.LIBRARY is None:
        return "reference (PyTorch): installed without a C++ compiler, there is no compiled library"
    if KERNELS is None:
        return f"reference (PyTorch): {library.ISA_VARIABLE}=reference"
    built = library.loaded().nin_version().decode()
    line = f"nin {KERNELS.name} (compiled {built}), float32 and bfloat16"
    return f"{line}; other dtypes, and single small float32 layers: reference"


def mlpconv(x: Tensor, layers: ChainArguments) -> Tensor:
    """Compute the chain tile by tile; the hidden layers stay in the cache."""
    if KERNELS is None or not _serves(x, layers) or is_faster_in_pytorch(x, layers):
        return reference.mlpconv(x, layers)
    y = torch.empty(layers.output_shape(x), dtype=x.dtype, memory_format=reference.memory_format_of(x))
    if y.numel() > 0:
        handle, floats = KERNELS.handles[x.dtype], KERNELS.handles[torch.float32]
        row, winograd = abi.choose_algorithm(KERNELS, abi.pack(x, y, layers), layers)
        packed = [weight_cache.packed_weight(handle, weight) for weight in layers.weights[1 if winograd else 0 :]]
        if winograd:
            packed.insert(0, weight_cache.packed_weight(floats, layers.weights[0], winograd=winograd))
        abi.run_forward(KERNELS, row, packed, layers, x, y)
    return y


# The two kinds of call in which PyTorch's own convolution was measured faster (docs/kernels.md has the table). Such a
# layer gains nothing from the fused pass; it is float32 and alone.
FEW_MACS, FEW_PIXELS = 150_000, 512  # calls of 20 µs, of which PyTorch's take 2 to 4 µs less
FEW_CHANNELS_IN, FEW_CHANNELS_OUT, MANY_PIXELS = 16, 15, 2048  # NCHW: turning the tiles over takes most of the time


def is_faster_in_pytorch(x: Tensor, layers: ChainArguments) -> bool:
    """Return whether the forward pass goes to the reference although the compiled kernel could do it."""
    if len(layers.weights) > 1 or x.dtype != torch.float32:
        return False
    channels, in_channels, kernel_height, kernel_width = layers.weights[0].shape
    stride, (images, _, height, width) = layers.stride, x.shape
    taps = kernel_height * kernel_width
    pixels = images * height * width // (stride[0] * stride[1])
    if pixels <= FEW_PIXELS and pixels * channels * in_channels * taps < FEW_MACS:
        return True
    plain = layers.is_pointwise() and stride[0] == stride[1] == 1
    few = in_channels <= FEW_CHANNELS_IN and channels <= FEW_CHANNELS_OUT
    return plain and few and height * width >= MANY_PIXELS and x.is_contiguous()


def serving_kernel(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
) -> str:
    """Return what computes a forward pass on the CPU: the name of an instruction set, or "reference".

    Example:
        >>> x, weight = torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.randn(4, 3, 1, 1, dtype=torch.float64)
        >>> from nin.ops.cpu.dispatch import serving_kernel
        >>> serving_kernel(x, [weight], [None])
        'reference'
    """
    # dilation and activations decide nothing
    layers = ChainArguments(weights, biases, stride, padding, (1, 1), ["none"] * len(weights))
    if KERNELS is None or not _serves(x, layers) or is_faster_in_pytorch(x, layers):
        return "reference"
    return KERNELS.name


# Weights up to which the backward kernel keeps float sums for several slices of the pixels at once; beyond, PyTorch's
# layer by layer backward, whose products are large enough then.
MOST_BACKWARD_WEIGHTS = 1 << 21


def mlpconv_backward(grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, needs: Sequence[bool]) -> Gradients:
    """Compute the gradients of a 1×1 chain tile by tile; see ``reference.mlpconv_backward``.

    A k×k convolution's are in `gradients`.
    """
    weights, biases = layers.weights, layers.biases
    fits = KERNELS is not None and _serves(x, layers) and (grad.shape, grad.dtype) == (y.shape, x.dtype)
    plain = layers.is_pointwise()
    if fits and not plain and grad.numel() > 0 and len(weights) == 1 and layers.activations[0] in ("none", "relu"):
        assert KERNELS is not None
        return conv_backward.convolution_backward(KERNELS, grad, x, y, layers, needs)
    if not fits or not plain or grad.numel() == 0 or sum(w.numel() for w in weights) > MOST_BACKWARD_WEIGHTS:
        return reference.mlpconv_backward(grad, x, y, layers, needs)
    assert KERNELS is not None
    count, handle = len(weights), KERNELS.handles[x.dtype]
    layout = reference.memory_format_of(x)
    grad_x = torch.empty(x.shape, dtype=x.dtype, memory_format=layout) if needs[0] else x.new_empty(0)
    if tuple(layers.stride) != (1, 1):  # the pixels that it steps over
        grad_x.zero_()
    grads = [
        torch.empty(p.shape if p is not None and needed else 0, dtype=x.dtype)
        for p, needed in zip((*weights, *biases), needs[1:], strict=True)
    ]
    grad_weights, grad_biases = grads[:count], grads[count:]
    packed = [weight_cache.packed_weight(handle, weight) for weight in weights]
    exchanged = [weight_cache.packed_weight(handle, weight, for_input_gradient=True) for weight in weights]
    row = abi.pack(x, y, layers)
    rows, alive = abi.pack_layers(packed, layers)
    strides = struct.pack("8q", *grad.stride(), *(grad_x.stride() if needs[0] else (0, 0, 0, 0)))
    pointers = [
        t.data_ptr() if t.numel() > 0 else 0
        for layer in zip(exchanged, grad_weights, grad_biases, strict=True)
        for t in layer
    ]
    places = struct.pack(f"{len(pointers)}q", *pointers)
    addresses = grad.data_ptr(), x.data_ptr(), y.data_ptr(), grad_x.data_ptr() if needs[0] else 0
    backward = library.loaded().nin_backward
    library.check(backward(handle, row, rows, strides, places, *addresses, library.pool()))
    del alive
    return grad_x, grad_weights, grad_biases


def _serves(x: Tensor, layers: ChainArguments) -> bool:
    """Return whether the tensors fit together; what does not goes to the reference, whose error says why."""
    if x.dtype not in library.DTYPES or x.dim() != 4 or 0 in x.shape[1:]:
        return False
    channels = x.shape[1]
    for i, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
        shape = weight.shape
        if len(shape) != 4 or shape[1] != channels or weight.dtype != x.dtype or 0 in shape or not weight.is_cpu:
            return False
        if i > 0 and (shape[2] != 1 or shape[3] != 1):
            return False
        channels = shape[0]
        if bias is not None and (bias.shape != (channels,) or bias.dtype != x.dtype or not bias.is_cpu):
            return False
    return True


KERNELS = choose_kernels()

if KERNELS is not None:
    schema.library.impl("mlpconv", as_dispatcher_kernel(mlpconv), "CPU")
    schema.library.impl("mlpconv_backward", as_dispatcher_backward_kernel(mlpconv_backward), "CPU")
