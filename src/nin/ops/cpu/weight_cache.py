"""A cache of packed weights: the CPU kernels' copies of weights, kept until a byte of the weight changes."""

import ctypes
import functools
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    keys: list[_Key] = []
    copies: list[_Copy | None] = []
    spans: list[int] = []
    tile_size = winograd_tile_size
    for weight in weights:
        dtype, address = weight.dtype, weight.data_ptr()
        handle = kernels.handles[torch.float32 if tile_size else dtype]
        key = (address, weight.shape, weight.stride(), dtype, handle, for_input_gradient, tile_size)
        copy = _copies.get(key)
        keys.append(key)
        copies.append(copy)
        spans += (address, 0 if copy is None or copy.hash is None else weight.nbytes)
        tile_size = 0
    packed = []
    for key, copy, weight, value in zip(keys, copies, weights, hash_bytes(kernels, spans), strict=True):
        if copy is None or (copy.hash is not None and copy.hash != value):
            copy = _pack_again(kernels, key, weight)
        packed.append(copy.packed)
    return packed


def packed_weight(
    kernels: Kernels, weight: Tensor, *, for_input_gradient: bool = False, winograd_tile_size: int = 0
) -> Tensor:
    """Return one weight packed for the kernels, see `packed_weights`."""
    return packed_weights(
        kernels, (weight,), for_input_gradient=for_input_gradient, winograd_tile_size=winograd_tile_size
    )[0]


def hash_bytes(kernels: Kernels, spans: Sequence[int]) -> Sequence[int]:
    """Return a hash of 64 bits of each span of memory.

    Args:
        kernels: of the instruction set in use.
        spans: an address, then a number of bytes, for each span.
    """
    count = len(spans) // 2
    make_blocks, make_hashes = _block_types(count)
    hashes = make_hashes()
    handle, pool = kernels.handles[torch.float32], library.thread_pool()
    library.check(library.loaded().nin_hash(handle, make_blocks(*spans), count, hashes, pool))
    return hashes


@functools.lru_cache
def _block_types(count: int) -> tuple[Callable[..., bytes], Any]:
    """Return what makes the structs ``nin_bytes``, and the array for their hashes: made once, as they take a µs."""
    return struct.Struct(f"{2 * count}q").pack, ctypes.c_uint64 * count


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


def _pack_again(kernels: Kernels, key: _Key, weight: Tensor) -> _Copy:
    """Pack a weight, and keep the copy in the cache if its bytes can be hashed."""
    packed = functools.partial(_pack, key[4], weight, key[5], key[6])
    if not _is_dense(weight):
        return _Copy(None, packed())
    storage = weight.untyped_storage()
    name = id(storage)
    value = None if name in _constants else hash_bytes(kernels, (key[0], weight.nbytes))[0]
    copy = _Copy(value, packed())
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
