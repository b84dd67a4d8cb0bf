"""A cache of packed weights: the CPU kernels' copies of weights, kept until a byte of the weight changes."""

import ctypes
import struct
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nin.ops.cpu import library
from nin.ops.cpu.library import Kernels

# Where a weight lies and how it is packed: address, shape, strides, dtype, then what `_pack` is asked for.
_Key = tuple[int, torch.Size, tuple[int, ...], torch.dtype, int, bool, int]


class _Copy(NamedTuple):
    """A packed copy, and the hash of the weight's bytes when it was made; None for a weight that never changes."""

    hash: int | None
    packed: Tensor


class _Memory(NamedTuple):
    """A tensor's memory, and what is kept of the weights in it."""

    storage: weakref.ref[torch.UntypedStorage]
    keys: set[_Key]


# The memory is watched and not the tensors: torch.utils.swap_tensors refuses a tensor that a weak reference points to.
_copies: dict[_Key, _Copy] = {}
_memories: dict[int, _Memory] = {}  # by the id of the storage
_constants: set[int] = set()  # ids of storages that nobody writes to

# Packed copies of one storage's weights, over its bytes, before all are dropped: more than Winograd's transforms, both
# directions and two dtypes need. Without it, a thousand views of one tensor would leave a thousand copies.
MAX_COPIED_RATIO = 32


def packed_weights(
    kernels: Kernels, weights: Sequence[Tensor], *, for_input_gradient: bool = False, winograd_tile_size: int = 0
) -> list[Tensor]:
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

    Returns:
        The packed bytes of each, 1-D.
    """
    packed: list[Tensor | None] = []
    keys: list[_Key] = []
    spans: list[int] = []  # address and bytes of each weight that is to be hashed
    hashed: list[int] = []  # its index
    tile_size = winograd_tile_size
    for i, weight in enumerate(weights):
        handle = kernels.handles[torch.float32 if tile_size else weight.dtype]
        address = weight.data_ptr()
        key = (address, weight.shape, weight.stride(), weight.dtype, handle, for_input_gradient, tile_size)
        keys.append(key)
        copy = _copies.get(key)
        if copy is not None and copy.hash is None:
            packed.append(copy.packed)
        elif _is_dense(weight):
            packed.append(None)
            spans += address, weight.nbytes
            hashed.append(i)
        else:
            packed.append(_pack(handle, weight, for_input_gradient, tile_size))
        tile_size = 0
    for i, value in zip(hashed, hash_bytes(kernels, spans), strict=True):
        copy = _copies.get(keys[i])
        if copy is None or copy.hash != value:
            copy = _keep(keys[i], weights[i], value)
        packed[i] = copy.packed
    return packed  # type: ignore[return-value]


def packed_weight(
    kernels: Kernels, weight: Tensor, *, for_input_gradient: bool = False, winograd_tile_size: int = 0
) -> Tensor:
    """Return one weight packed for the kernels, see `packed_weights`."""
    return packed_weights(
        kernels, (weight,), for_input_gradient=for_input_gradient, winograd_tile_size=winograd_tile_size
    )[0]


def hash_bytes(kernels: Kernels, spans: Sequence[int]) -> list[int]:
    """Return a hash of 64 bits of each span of memory.

    Args:
        kernels: of the instruction set in use.
        spans: an address, then a number of bytes, for each span.
    """
    count = len(spans) // 2
    if not count:
        return []
    hashes = (ctypes.c_uint64 * count)()
    blocks = struct.pack(f"{2 * count}q", *spans)
    handle = kernels.handles[torch.float32]
    library.check(library.loaded().nin_hash(handle, blocks, count, hashes, library.thread_pool()))
    return list(hashes)


def hash_tensors(kernels: Kernels, tensors: Sequence[Tensor]) -> tuple[object, ...] | None:
    """Return a value that is equal as long as the tensors are, in shapes, strides, dtypes and every byte.

    None where that cannot be told: not all are in the CPU's memory, without gaps.
    """
    if not all(t.is_cpu and t.layout == torch.strided and _is_dense(t) for t in tensors):
        return None
    spans = [number for t in tensors for number in (t.data_ptr(), t.nbytes)]
    return (*hash_bytes(kernels, spans), *((t.shape, t.stride(), t.dtype) for t in tensors))


def mark_constant(weight: Tensor) -> None:
    """Promise that nobody ever writes to a weight's memory, so that its packed copies need no check."""
    storage = weight.untyped_storage()
    name = id(storage)
    _constants.add(name)
    weakref.finalize(storage, _constants.discard, name).atexit = False


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _keep(key: _Key, weight: Tensor, value: int) -> _Copy:
    """Pack a weight and keep the copy in the cache."""
    storage = weight.untyped_storage()
    name = id(storage)
    copy = _Copy(None if name in _constants else value, _pack(key[4], weight, key[5], key[6]))
    memory = _memories.get(name)
    if memory is None or memory.storage() is not storage:

        def evict(dead: weakref.ref[torch.UntypedStorage]) -> None:
            if name in _memories and _memories[name].storage is dead:  # another storage may have the id by now
                for old in _memories.pop(name).keys:
                    _copies.pop(old, None)

        memory = _memories[name] = _Memory(weakref.ref(storage, evict), set())
    kept = [old for old in tuple(memory.keys) if old in _copies]
    if sum(_copies[old].packed.nbytes for old in kept) > MAX_COPIED_RATIO * storage.nbytes():
        for old in kept:
            _copies.pop(old, None)
        memory.keys.clear()
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
