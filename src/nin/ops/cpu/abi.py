"""The structs of the compiled library's C interface (``csrc/c_api.hpp``), packed from tensors, and its forward pass."""

import functools
import os
import struct
from collections.abc import Sequence

from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments
from nin.ops.cpu import library
from nin.ops.cpu.library import Kernels

WINOGRAD_VARIABLE = "NIN_CPU_WINOGRAD"
WINOGRAD = os.environ.get(WINOGRAD_VARIABLE, "1") != "0"
ACTIVATION_CODES = {name: code for code, name in enumerate((*reference.BOTTLENECK_ACTIVATIONS, *reference.GATES))}

# compiled once: packing by format string would look it up in every call
_CHAIN = struct.Struct("24qdq")
_TILE_SIZE = struct.Struct("q")  # the last field of nin_chain


def pack_chain(x: Tensor, y: Tensor, chain: ChainArguments, spatial: int = 0, norm_eps: float | None = None) -> bytes:
    """Return the struct ``nin_chain``: sizes, geometry and strides of a chain, whose layer ``spatial`` is k×k."""
    weights, _, stride, padding, dilation, _ = chain
    return pack_window(x, y, weights[spatial].shape[2:], stride, padding, dilation, len(weights), norm_eps)


def pack_window(
    x: Tensor,
    y: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    layers: int = 0,
    norm_eps: float | None = None,
) -> bytes:
    """Return the struct ``nin_chain`` of any window that moves over images: a pooling has no layers."""
    out = y.shape
    values = (library.DTYPES[x.dtype], *x.shape, out[2], out[3], *kernel_size, *stride, *padding, *dilation)
    epsilon = -1.0 if norm_eps is None else norm_eps
    return _CHAIN.pack(*values, *_strides(x), *_strides(y), layers, epsilon, 0)  # 0: direct, until `choose_winograd`


def _strides(t: Tensor) -> tuple[int, ...]:
    """Return the strides of images; of single pixels such that all of them are seen to be one line, in any format."""
    image, channel, row, column = t.stride()
    return (image, channel, image, image) if t.shape[2] == t.shape[3] == 1 else (image, channel, row, column)


def choose_winograd(kernels: Kernels, packed_chain: bytes, chain: ChainArguments) -> tuple[bytes, int]:
    """Return the packed chain with the Winograd tile size of its first layer, and that size; 0: direct convolution."""
    weight = chain.weights[0]
    if not WINOGRAD or weight.shape[2] == 1:
        return packed_chain, 0
    return _choose_winograd(kernels.handles[weight.dtype], packed_chain, weight.shape[0])


@functools.lru_cache(4096)  # 2 µs of each call otherwise
def _choose_winograd(handle: int, packed_chain: bytes, columns: int) -> tuple[bytes, int]:
    size = library.loaded().nin_winograd_size(handle, packed_chain, columns)
    return packed_chain[: -_TILE_SIZE.size] + _TILE_SIZE.pack(size), size


def pack_layers(packed: Sequence[Tensor], chain: ChainArguments) -> tuple[bytes, list[Tensor | None]]:
    """Return the structs ``nin_layer``, and the tensors they point to, which must outlive their use."""
    biases = [None if bias is None else bias.contiguous() for bias in chain.biases]
    values: list[int] = []
    for weight, bias, blob, activation in zip(chain.weights, biases, packed, chain.activations, strict=True):
        bias_address = 0 if bias is None else bias.data_ptr()
        values += (blob.data_ptr(), bias_address, weight.shape[0], ACTIVATION_CODES[activation])
    return struct.pack(f"{len(values)}q", *values), [*packed, *biases]


def pack_gradient_strides(grad: Tensor, grad_x: Tensor | None = None) -> bytes:
    """Return the struct ``nin_gradient_strides``: the strides of the output's and of the input's gradient."""
    return struct.pack("8q", *grad.stride(), *((0, 0, 0, 0) if grad_x is None else grad_x.stride()))


def run_forward(
    kernels: Kernels, packed_chain: bytes, packed: Sequence[Tensor], chain: ChainArguments, x: Tensor, y: Tensor
) -> None:
    """Run the forward pass of a chain, with its packed weights, into ``y``."""
    layers, _tensors = pack_layers(packed, chain)
    forward, handle = library.loaded().nin_forward, kernels.handles[x.dtype]
    addresses = x.data_ptr(), y.data_ptr()
    library.check(forward(handle, packed_chain, layers, *addresses, library.thread_pool(), None, None, 0))
