"""A cache of packed weights: the CPU kernels' copies of weights, kept until a byte of the weight changes."""

import ctypes
import functools
import struct
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nin.errors import UserError
from nin.ops.cpu import library
from nin.ops.cpu.library import Kernels
from nin.ops.transforms import PLAIN_TYPES, is_wrapped

# Where a weight lies and how it is packed: address, shape, strides, dtype, then what `_pack` is asked for.
_Key = tuple[int, torch.Size, tuple[int, ...], torch.dtype, int, bool, int]


class _Constant:
    """The promise that a weight is only written to by what raises its version counter; see `mark_constant`.

    It keeps neither the weight nor its memory alive.

    Attributes:
        stands: whether it was not taken back.
    """

    def __init__(self, weight: Tensor) -> None:
        self.stands = True
        self._owner, self._storage = _owner_of(weight), weakref.ref(weight.untyped_storage())
        with torch.inference_mode(False):
            # shares the counter, and no longer the memory, which it would keep alive
            self._alias = weight.detach()
            self._alias.data = torch.empty(0, dtype=weight.dtype, device="cpu")

    @property
    def version(self) -> int:
        return self._alias._version

    def holds_for(self, weight: Tensor) -> bool:
        """Return whether a tensor is the weight that it was given for, or a view of it, in the memory of then.

        Another tensor may have come to the same address, and a parameter made from ``weight.data`` has a counter of its
        own. The counters' values tell a new tensor in the place of one that was freed.
        """
        return (
            self.stands
            and _owner_of(weight) == self._owner
            and weight.untyped_storage() is self._storage()
            and not weight.requires_grad
            and weight._version == self._alias._version
        )


def _owner_of(weight: Tensor) -> int:
    """Return the address of PyTorch's object for a tensor, or for the tensor that it is a view of."""
    base: Tensor | None = weight._base
    return weight._cdata if base is None else base._cdata


class PackedCopy(NamedTuple):
    """A packed copy, and what the weight was when it was made: the hash of its bytes, or for a constant its version."""

    packed: Tensor
    hash: int | None = None
    constant: _Constant | None = None
    version: int = 0

    def is_of_constant(self, weight: Tensor) -> bool:
        """Return whether this is the copy of a constant, ``weight``, that nobody has written to."""
        constant = self.constant
        return constant is not None and constant.holds_for(weight) and constant.version == self.version


class _Memory(NamedTuple):
    """A tensor's memory, and what is kept of the weights in it."""

    storage: weakref.ref[torch.UntypedStorage]
    keys: set[_Key]


# The memory is watched and not the tensors: torch.utils.swap_tensors refuses a tensor that a weak reference points to.
_copies: dict[_Key, PackedCopy] = {}
_memories: dict[int, _Memory] = {}  # by the id of the storage
_constants: dict[int, _Constant] = {}  # by the id of the storage
calls: dict[tuple[Any, ...], Any] = {}  # what `call_cache` keeps; emptied when a copy goes or is made again

# Packed copies of one storage's weights, over its bytes, before all are dropped: more than Winograd's transforms, both
# directions and two dtypes need. Without it, a thousand views of one tensor would leave a thousand copies.
MAX_COPIED_RATIO = 32


def packed_copies(
    kernels: Kernels,
    weights: Sequence[Tensor],
    *,
    for_input_gradient: bool = False,
    winograd_tile_size: int = 0,
    as_floats: int | None = None,
) -> list[PackedCopy]:
    """Return weights packed for the kernels, from the cache where none of their bytes has changed.

    All bytes are hashed in every call, so that a change is seen whoever made it: PyTorch, an optimiser's fused kernel,
    ``weight.data``, NumPy, another process. Non-contiguous weights are packed in every call. A packed copy lives as
    long as the weight's memory.

    Args:
        kernels: of the instruction set in use.
        weights: (C_out, C_in, kH, kW) each, float32 or bfloat16.
        for_input_gradient: pack them with input and output channels exchanged and the kernels flipped.
        winograd_tile_size: if not 0, apply the filter transform for input tiles of this size to the first; the result
            is float32.
        as_floats: the weight that is packed for the kernels of float32, whatever its dtype; None: none.

    Returns:
        A copy of each, whose bytes are 1-D.
    """
    keys: list[_Key] = []
    copies: list[PackedCopy | None] = []
    spans: list[int] = []
    tile_size = winograd_tile_size
    for i, weight in enumerate(weights):
        dtype, address = weight.dtype, weight.data_ptr()
        handle = kernels.handles[torch.float32 if tile_size or i == as_floats else dtype]
        key = (address, weight.shape, weight.stride(), dtype, handle, for_input_gradient, tile_size)
        copy = _copies.get(key)
        keys.append(key)
        copies.append(copy)
        spans += (address, 0 if copy is None or copy.hash is None else weight.nbytes)
        tile_size = 0
    now: list[PackedCopy] = []
    for key, copy, weight, value in zip(keys, copies, weights, hash_bytes(kernels, spans), strict=True):
        if copy is None or not (copy.hash == value if copy.constant is None else copy.is_of_constant(weight)):
            copy = _pack_again(kernels, key, weight)
        now.append(copy)
    return now


def packed_weights(
    kernels: Kernels, weights: Sequence[Tensor], *, for_input_gradient: bool = False, winograd_tile_size: int = 0
) -> list[Tensor]:
    """Return the bytes of weights packed for the kernels, see `packed_copies`."""
    copies = packed_copies(
        kernels, weights, for_input_gradient=for_input_gradient, winograd_tile_size=winograd_tile_size
    )
    return [copy.packed for copy in copies]


def packed_weight(
    kernels: Kernels, weight: Tensor, *, for_input_gradient: bool = False, winograd_tile_size: int = 0
) -> Tensor:
    """Return one weight packed for the kernels, see `packed_copies`."""
    return packed_weights(
        kernels, (weight,), for_input_gradient=for_input_gradient, winograd_tile_size=winograd_tile_size
    )[0]


def hash_bytes(kernels: Kernels, spans: Sequence[int]) -> Sequence[int]:
    """Return a hash of 64 bits of each span of memory.

    Args:
        kernels: of the instruction set in use.
        spans: an address, then a number of bytes, for each span.
    """
    return _hash_blocks(kernels, struct.pack(f"{len(spans)}q", *spans), len(spans) // 2)


def _hash_blocks(kernels: Kernels, blocks: bytes, count: int) -> Any:
    """Return the array of hashes of blocks of memory: packed structs ``nin_bytes``."""
    hashes = _hashes_type(count)()
    status = library.loaded().nin_hash(kernels.handles[torch.float32], blocks, count, hashes, library.thread_pool())
    library.check(status)
    return hashes


@functools.lru_cache
def _hashes_type(count: int) -> Any:
    """Return the type of an array of hashes: made once, as that takes a µs."""
    return ctypes.c_uint64 * count


def hash_tensors(
    kernels: Kernels, tensors: Sequence[Tensor], copies: Sequence[Tensor] | None = None
) -> tuple[object, ...] | None:
    """Return a value that is equal as long as the tensors are, in shapes, strides, dtypes and every byte.

    None where that cannot be told: not all are in the CPU's memory, without gaps.

    Args:
        kernels: of the instruction set in use.
        tensors: whose versions are asked for, where they are constants.
        copies: of the tensors, whose bytes are hashed in their place.
    """
    if not all(map(_is_hashable, tensors)):
        return None
    constants = [_constant_of(t) if _constants else None for t in tensors]
    hashed = [t for t, constant in zip(copies or tensors, constants, strict=True) if constant is None]
    spans = [number for t in hashed for number in (t.data_ptr(), t.nbytes)]
    versions = [c and (t.data_ptr(), c, c.version) for t, c in zip(tensors, constants, strict=True)]
    return (*hash_bytes(kernels, spans), *versions, *((t.shape, t.stride(), t.dtype) for t in tensors))


def mark_constant(weight: Tensor) -> None:
    """Promise that a weight's memory is only written to by what raises its version counter, so that no byte is hashed.

    The promise is taken back by a call in which the weight requires gradients, or another tensor has its memory. Of two
    weights in one memory only the first is constant.
    """
    storage = weight.untyped_storage()
    name = id(storage)
    if name not in _constants:
        weakref.finalize(storage, _constants.pop, name, None).atexit = False
    elif not _constants[name].holds_for(weight):
        _take_back(name)
        return
    _constants[name] = _Constant(weight)
    memory = _memories.get(name)
    for old in () if memory is None else memory.keys:  # those that are hashed
        _copies.pop(old, None)
    calls.clear()


def _take_back(name: int) -> None:
    """Take back the promise for a storage, for all copies of what lies in it."""
    _constants.pop(name).stands = False


def _constant_of(weight: Tensor) -> _Constant | None:
    """Return the promise for a weight; None if its bytes are to be hashed."""
    name = id(weight.untyped_storage())
    constant = _constants.get(name)
    if constant is None or constant.holds_for(weight):
        return constant
    _take_back(name)
    return None


def take_back_constants(weights: Sequence[Tensor]) -> None:
    """Take back the promises for those weights of a call that require gradients, whatever computes it."""
    if _constants:
        for weight in weights:
            # a wrapper has no storage
            if type(weight) in PLAIN_TYPES and weight.requires_grad and not is_wrapped(weight):
                _constant_of(weight)


def freeze(model: nn.Module) -> nn.Module:
    """Promise that a network is only read from now on, so that a call on the CPU does not look for changed weights.

    nin keeps weights in the order that its CPU kernels read them in. Each call hashes the bytes of all its weights to
    see whether one was written to; for a network that only answers, that is time lost: the shorter the call, the more.
    Parameters get ``requires_grad=False``, and their gradients are dropped.

    Still seen: what raises a parameter's version counter (``load_state_dict``, ``copy_`` and other in-place
    operations) and other memory in its place (``parameter.data = …``, a new parameter, ``to``). **Not seen any more**:
    writes into the same memory through ``parameter.data`` (a parameter made from it too) or ``parameter.numpy()``, by
    another process, and by an optimiser's fused kernel. ``model.requires_grad_(True)`` takes the promise back: from the
    next call on, every byte counts again. Copies and pickles of a frozen network are not frozen.

    Standardised convolutions compute their weights in every call: use their `fold` before. BatchNorm's statistics and
    parameters that share their memory with others are hashed as before. On a GPU nothing changes.

    Args:
        model: in evaluation mode.

    Returns:
        The same model.

    Raises:
        UserError: a part of the model is in training mode.

    Example:
        >>> model = nin.freeze(nin.MLPConv(3, (192, 160, 96), kernel_size=5, padding=2).eval())
        >>> model(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 96, 32, 32])
    """
    training = next((name or "the model" for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise UserError(f"nin.freeze takes a network in evaluation mode, got {training} in training: call eval() first")
    parameters = list(model.requires_grad_(False).parameters())
    for parameter in parameters:
        parameter.grad = None
    watchable = [p for p in parameters if p.is_cpu and p.layout == torch.strided and not p.is_inference()]
    users = Counter(id(p.untyped_storage()) for p in watchable)
    for parameter in watchable:
        if users[id(parameter.untyped_storage())] == 1:
            mark_constant(parameter)
    return model


def _is_hashable(t: Tensor) -> bool:
    """Return whether a tensor is in the CPU's memory, without gaps."""
    return t.is_cpu and t.layout == torch.strided and is_dense(t)


def is_dense(t: Tensor) -> bool:
    """Return whether a tensor's values lie without gaps, in one of PyTorch's two orders."""
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _pack_again(kernels: Kernels, key: _Key, weight: Tensor) -> PackedCopy:
    """Pack a weight, and keep the copy in the cache if its bytes can be hashed."""
    pack = functools.partial(_pack, key[4], for_input_gradient=key[5], winograd_tile_size=key[6])
    if not is_dense(weight):
        return PackedCopy(pack(weight))
    storage = weight.untyped_storage()
    name = id(storage)
    constant = _constant_of(weight)
    if constant is None:
        # Another thread may write to the weight meanwhile, and back. What is hashed must be what is packed.
        snapshot = weight.clone()
        copy = PackedCopy(pack(snapshot), hash_bytes(kernels, (snapshot.data_ptr(), snapshot.nbytes))[0])
    else:
        version = constant.version  # before the values are read, as operations write first and then raise it
        copy = PackedCopy(pack(weight), None, constant, version)
    memory = _memories.get(name)
    if memory is None or memory.storage() is not storage:

        def evict(dead: weakref.ref[torch.UntypedStorage]) -> None:
            if name in _memories and _memories[name].storage is dead:  # another storage may have the id by now
                for old in _memories.pop(name).keys:
                    _copies.pop(old, None)
                calls.clear()

        memory = _memories[name] = _Memory(weakref.ref(storage, evict), set())
    kept = [old for old in tuple(memory.keys) if old in _copies]
    if sum(_copies[old].packed.nbytes for old in kept) > MAX_COPIED_RATIO * storage.nbytes():
        for old in kept:
            _copies.pop(old, None)
        memory.keys.clear()
    calls.clear()
    memory.keys.add(key)
    _copies[key] = copy
    return copy


def _pack(handle: int, weight: Tensor, for_input_gradient: bool, winograd_tile_size: int) -> Tensor:
    columns, channels, height, width = weight.shape
    column_stride, channel_stride, height_stride, width_stride = weight.stride()
    address = weight.data_ptr()
    if for_input_gradient:
        # negative strides from the last tap on flip the kernel without a copy
        address += ((height - 1) * height_stride + (width - 1) * width_stride) * weight.element_size()
        columns, channels, column_stride, channel_stride = channels, columns, channel_stride, column_stride
        height_stride, width_stride = -height_stride, -width_stride
    strides = (column_stride, channel_stride, height_stride, width_stride)
    view = struct.pack("9q", library.DTYPES[weight.dtype], columns, channels, height, width, *strides)
    lib = library.loaded()
    if not winograd_tile_size:
        packed = torch.empty(lib.nin_packed_bytes(handle, view), dtype=torch.uint8)
        lib.nin_pack(handle, view, address, packed.data_ptr())
        return packed
    packed = torch.empty(lib.nin_winograd_packed_bytes(handle, view, winograd_tile_size), dtype=torch.uint8)
    addresses = address, packed.data_ptr()
    library.check(lib.nin_winograd_pack(handle, view, winograd_tile_size, *addresses, library.thread_pool()))
    return packed
