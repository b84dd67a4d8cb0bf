"""A cache of packed weights: the CPU kernels' copy of a weight, kept until the weight changes."""

import struct
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from nin.ops.cpu import library
from nin.ops.cpu.library import Kernels


class _Entry(NamedTuple):
    """A weight's packed copies, by `packed_weight`'s other arguments, each with the weight's state when packed."""

    weight: weakref.ref[Tensor]
    copies: dict[tuple[int, bool, int], tuple[tuple[object, ...], Tensor]]


# By the weight's id: a lookup takes 0.2 µs, one in torch.utils.weak.WeakTensorKeyDictionary 1.7 µs.
_cache: dict[int, _Entry] = {}


def packed_weight(
    kernels: Kernels, weight: Tensor, *, for_input_gradient: bool = False, winograd_tile_size: int = 0
) -> Tensor:
    """Return a weight packed for the kernels, from the cache unless it has changed.

    A change is detected by the version counter that in-place operations raise, by the address, and by the end of every
    step of an optimiser that holds the weight, as fused optimisers do not raise the counter. A change through
    ``weight.data`` or another library's view of the memory is detected if one of 64 sampled values differs, as after
    scaling, averaging or copying. Weights made in inference mode have no counter: a hash of all values takes its place.
    Non-contiguous weights are packed in every call. The packed copy lives as long as the weight.

    Args:
        kernels: of the instruction set in use.
        weight: (C_out, C_in, kH, kW), float32 or bfloat16.
        for_input_gradient: pack it with input and output channels exchanged and its kernel flipped.
        winograd_tile_size: if not 0, apply the filter transform for input tiles of this size; the result is float32.

    Returns:
        The packed bytes, 1-D.
    """
    handle = kernels.handles[torch.float32 if winograd_tile_size else weight.dtype]
    if not weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last):
        return _pack(handle, weight, for_input_gradient, winograd_tile_size)
    address, size = weight.data_ptr(), weight.nbytes
    if weight.is_inference():
        change = -1, library.loaded().nin_hash(address, size)
    else:
        change = weight._version, library.loaded().nin_sample(address, size)
    state = (change, address, weight.shape, weight.stride())
    weight_id, key = id(weight), (handle, for_input_gradient, winograd_tile_size)
    entry = _cache.get(weight_id)
    if entry is None or entry.weight() is not weight:

        def evict(dead: weakref.ref[Tensor]) -> None:
            if weight_id in _cache and _cache[weight_id].weight is dead:  # the id may belong to another weight by now
                del _cache[weight_id]

        entry = _cache[weight_id] = _Entry(weakref.ref(weight, evict), {})
    copy = entry.copies.get(key)
    if copy is None or copy[0] != state:
        copy = entry.copies[key] = state, _pack(handle, weight, for_input_gradient, winograd_tile_size)
    return copy[1]


def _evict_stepped(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Evict the parameters of an optimiser that has made a step."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            _cache.pop(id(weight), None)


register_optimizer_step_post_hook(_evict_stepped)


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
