"""What the compiled library is given: a problem, its layers, and by which algorithm the first of them is computed."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments
from nin.ops.cpu import library

WINOGRAD_VARIABLE = "NIN_CPU_WINOGRAD"
WINOGRAD = os.environ.get(WINOGRAD_VARIABLE, "1") != "0"
ACTIVATION_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}

_PROBLEM = struct.Struct("25q")


def pack(x: Tensor, y: Tensor, layers: ChainArguments) -> bytes:
    """Return the library's ``nin_problem``: 25 numbers of eight bytes."""
    weights, _, stride, padding, dilation, _ = layers
    shape, out = x.shape, y.shape
    values = (library.DTYPES[x.dtype], *shape, out[2], out[3], *weights[0].shape[2:], *stride, *padding, *dilation)
    return _PROBLEM.pack(*values, *x.stride(), *y.stride(), len(weights), 0)


def choose_algorithm(kernels: library.Kernels, problem: bytes, layers: ChainArguments) -> tuple[bytes, int]:
    """Return the problem with the size of Winograd's squares for its first layer, and that size; 0: tap by tap."""
    weight = layers.weights[0]
    if not WINOGRAD or weight.shape[2] == 1:
        return problem, 0
    handle = kernels.handles[weight.dtype]
    size = library.loaded().nin_winograd_size(handle, problem, weight.shape[0])
    return problem[:-8] + struct.pack("q", size), size


def pack_layers(packed: Sequence[Tensor], layers: ChainArguments) -> tuple[bytes, list[Tensor]]:
    """Return the library's ``nin_layer`` for each layer, and what must live as long as they are used."""
    values: list[int] = []
    alive = list(packed)
    for weight, bias, blob, activation in zip(layers.weights, layers.biases, packed, layers.activations, strict=True):
        address = 0
        if bias is not None:
            alive.append(bias.contiguous())
            address = alive[-1].data_ptr()
        values += (blob.data_ptr(), address, weight.shape[0], ACTIVATION_CODES[activation])
    return struct.pack(f"{len(values)}q", *values), alive


def run_forward(
    kernels: library.Kernels, problem: bytes, packed: Sequence[Tensor], layers: ChainArguments, x: Tensor, y: Tensor
) -> None:
    """Compute ``y``."""
    rows, alive = pack_layers(packed, layers)
    forward, handle = library.loaded().nin_forward, kernels.handles[x.dtype]
    library.check(forward(handle, problem, rows, x.data_ptr(), y.data_ptr(), library.pool()))
    del alive
