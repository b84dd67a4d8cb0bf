"""A cache of calls: what follows from the arguments' shapes and addresses, so that a call is made again at once.

Checking the arguments, choosing the algorithm and packing the structs of the C interface takes 20 to 30 µs of Python.
None of it depends on the values. Only the weights' bytes have to be as they were when they were packed, which the
library verifies before it computes.
"""

import contextlib
import dataclasses
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments
from nin.ops.cpu import abi, library, weight_cache
from nin.ops.cpu.library import Kernels
from nin.ops.cpu.weight_cache import PackedCopy

# Options; shapes, strides and dtypes of all tensors; addresses of all but the images.
CallKey = tuple[Any, ...]

MAX_CALLS = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class KernelCall:
    """A function of the library that computes a forward pass, and its arguments.

    Attributes:
        function: ``nin_forward`` or ``nin_inverted_bottleneck``.
        kernels: the address of their table.
        structs: nin_chain and the nin_layer, and what the function takes besides, before the images.
        hashed: the structs nin_bytes of the weights that are hashed, their hashes, and how many.
        copies: the packed weights, which the structs point to.
        constants: the weights that are not hashed: their places and copies.
        output: of ``torch.empty``, for the result.
    """

    function: Callable[..., int]
    kernels: int
    structs: tuple[Any, ...]
    hashed: tuple[bytes, bytes, int]
    copies: Sequence[PackedCopy]
    constants: Sequence[tuple[int, PackedCopy]]
    output: dict[str, Any]

    def __call__(self, x: Tensor, chain: ChainArguments) -> Tensor | None:
        """Return the chain's output, or None if a weight has changed."""
        for place, copy in self.constants:
            if not copy.is_of_constant(chain.weights[place]):
                return None
        y = torch.empty(**self.output)
        addresses = x.data_ptr(), y.data_ptr()
        status = self.function(self.kernels, *self.structs, *addresses, library.thread_pool(), *self.hashed)
        if status == library.WEIGHTS_CHANGED:
            return None
        library.check(status)
        return y


def key_of(kernels: Kernels, x: Tensor, chain: ChainArguments) -> CallKey | None:
    """Return the key of a call; None if it is not one of plain tensors in the CPU's memory that nobody looks at.

    Nor is it one where a tensor is empty, or its values do not lie at its address, see `has_memory`.

    Args:
        kernels: of the instruction set in use.
        x: the images, for which `transforms.is_plain` holds, as for the chain's tensors.
        chain: the other arguments, unchecked.
    """
    if x is None or not x.is_cpu or x.is_nested or x.layout is not torch.strided or x.is_neg():
        return None
    if torch.is_autocast_enabled("cpu") or torch._C._autograd._profiler_enabled():
        return None
    weights, biases, stride, padding, dilation, activations = chain
    key = [kernels.name, abi.WINOGRAD, stride, padding, dilation, *activations, x.dtype, x.shape, x.stride()]
    try:
        if not x.data_ptr():
            return None
        for t in (*weights, *biases):
            if t is None:
                key.append(None)
            elif t.is_cpu and t.layout is torch.strided and not t.is_neg() and (address := t.data_ptr()):
                key += (address, t.dtype, t.shape, t.stride())
            else:
                return None
    except RuntimeError:  # of a wrapper, which has no storage; asking first would take as long as all of this
        return None
    return tuple(key)


def repeat(key: CallKey, x: Tensor, chain: ChainArguments) -> Tensor | None:
    """Make a call again; return None if it was not made before, or a weight has changed since."""
    call: Callable[[Tensor, ChainArguments], Tensor | None] | None = weight_cache.calls.get(key)
    y = None if call is None else call(x, chain)
    if _watched and y is not None:
        _note(call, x, y, chain)
    return y


class SeenCall(NamedTuple):
    """A call that a kernel served while `watch` looked, with its images, its result and its other arguments."""

    call: KernelCall
    x: Tensor
    y: Tensor
    chain: ChainArguments


_watched: dict[int, list[SeenCall]] = {}  # by the thread that looks


@contextlib.contextmanager
def watch() -> Iterator[list[SeenCall]]:
    """Return the list to which the calls of this thread that can be repeated are added meanwhile."""
    thread = threading.get_ident()
    seen = _watched[thread] = []
    try:
        yield seen
    finally:
        del _watched[thread]


def _note(call: object, x: Tensor, y: Tensor, chain: ChainArguments) -> None:
    seen = _watched.get(threading.get_ident())
    if seen is not None and isinstance(call, KernelCall):
        seen.append(SeenCall(call, x, y, chain))


def remember_reference(key: CallKey) -> None:
    """Keep that the reference serves a call."""
    _keep(key, _call_reference)


def _call_reference(x: Tensor, chain: ChainArguments) -> Tensor:
    weight_cache.take_back_constants(chain.weights)
    return reference.mlpconv(x, chain)


def remember(
    key: CallKey,
    kernels: Kernels,
    packed_chain: bytes,
    copies: Sequence[PackedCopy],
    chain: ChainArguments,
    output: dict[str, Any],
    tensors: tuple[Tensor, Tensor],
    function: Callable[..., int] | None = None,
    options: tuple[int, ...] = (),
) -> None:
    """Keep a call that the kernels served, unless a weight or a bias has to be copied every time.

    Args:
        key: of the call.
        kernels: that served it.
        packed_chain: the struct nin_chain.
        copies: the packed weights.
        chain: the arguments.
        output: of ``torch.empty``, for the result.
        tensors: the images and the result of this call.
        function: of the library; None for ``nin_forward``.
        options: what the function takes between the structs and the images.
    """
    hashed = [(w, copy.hash) for w, copy in zip(chain.weights, copies, strict=True) if copy.hash is not None]
    constants = [(place, copy) for place, copy in enumerate(copies) if copy.constant is not None]
    biases_in_place = all(bias is None or bias.is_contiguous() for bias in chain.biases)
    if len(hashed) + len(constants) < len(copies) or not biases_in_place:
        return
    layers, _tensors = abi.pack_layers([copy.packed for copy in copies], chain)
    weights = b"".join(struct.pack("2q", w.data_ptr(), w.nbytes) for w, _ in hashed)
    hashes = struct.pack(f"{len(hashed)}Q", *(value for _, value in hashed)), len(hashed)
    handle = kernels.handles[output["dtype"]]
    structs = packed_chain, layers, *options
    function = function or library.loaded().nin_forward
    call = KernelCall(function, handle, structs, (weights, *hashes), copies, constants, output)
    _keep(key, call)
    if _watched:
        _note(call, *tensors, chain)


def _keep(key: CallKey, call: Callable[[Tensor, ChainArguments], Tensor | None]) -> None:
    if len(weight_cache.calls) >= MAX_CALLS:
        weight_cache.calls.clear()
    weight_cache.calls[key] = call
