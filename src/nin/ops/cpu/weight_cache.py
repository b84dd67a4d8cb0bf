"""Weights in the order in which the CPU kernels read them, kept until the weight changes."""

from __future__ import annotations

import struct
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from nin.ops.cpu import library as compiled


@dataclass(frozen=True)
class _Entry:
    weight: weakref.ref[Tensor]
    state: tuple[object, ...]
    packed: Tensor


# by the weight's id, then by the other arguments of `packed_weight`
_packed: dict[int, dict[tuple[int, bool, int], _Entry]] = {}


def packed_weight(handle: int, weight: Tensor, for_input_gradient: bool = False, winograd: int = 0) -> Tensor:
    """Return the weight in the kernels' order; packed again only after the weight has changed.

    With ``winograd``, the size of its squares, a weight is transformed first and packed as float32: then ``handle`` is
    that of the float32 kernels.

    A change is seen by the version counter that in-place operations raise, by the address, and by the end of every
    step of an optimiser that holds the weight: fused ones raise no counter. A change through ``weight.data`` or
    another library's view of the memory is seen where one of 64 values differs, as after scaling, averaging or
    copying. Weights made in inference mode have no counter: all of their values are compared, by a hash. Weights
    that do not lie in one piece are packed for every call. The copy lives as long as the weight.
    """
    if not weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last):
        return _pack(handle, weight, for_input_gradient, winograd)
    address, size = weight.data_ptr(), weight.numel() * weight.element_size()
    if weight.is_inference():
        change = -1, compiled.loaded().nin_hash(address, size)
    else:
        change = weight._version, compiled.loaded().nin_sample(address, size)
    state = (change, address, weight.shape, weight.stride())
    number, key = id(weight), (handle, for_input_gradient, winograd)
    entry = _packed.get(number, {}).get(key)
    if entry is not None and entry.weight() is weight and entry.state == state:
        return entry.packed

    def forget(dead: weakref.ref[Tensor]) -> None:
        entries = _packed.get(number, {})
        if key in entries and entries[key].weight is dead:  # the id may serve another weight by now
            del entries[key]
            if not entries:
                _packed.pop(number, None)

    packed = _pack(handle, weight, for_input_gradient, winograd)
    _packed.setdefault(number, {})[key] = _Entry(weakref.ref(weight, forget), state, packed)
    return packed


def _forget_stepped(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Forget the packed weights of an optimiser's parameters."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            _packed.pop(id(weight), None)


register_optimizer_step_post_hook(_forget_stepped)


def _pack(handle: int, weight: Tensor, for_input_gradient: bool, winograd: int = 0) -> Tensor:
    """Copy a weight into panels; for the input's gradient with its channels exchanged and its taps turned over."""
    columns, channels, height, width = weight.shape
    column_stride, channel_stride, height_stride, width_stride = weight.stride()
    address = weight.data_ptr()
    if for_input_gradient:
        address += ((height - 1) * height_stride + (width - 1) * width_stride) * weight.element_size()
        columns, channels, column_stride, channel_stride = channels, columns, channel_stride, column_stride
        height_stride, width_stride = -height_stride, -width_stride
    strides = (column_stride, channel_stride, height_stride, width_stride)
    row = struct.pack("9q", compiled.DTYPES[weight.dtype], columns, channels, height, width, *strides)
    library = compiled.loaded()
    if not winograd:
        packed = torch.empty(library.nin_packed_bytes(handle, row), dtype=torch.uint8)
        library.nin_pack(handle, row, address, packed.data_ptr())
        return packed
    squares = struct.pack("9q", 0, columns, channels, winograd, winograd, 0, 0, 0, 0)
    packed = torch.empty(library.nin_packed_bytes(handle, squares), dtype=torch.uint8)
    addresses = address, packed.data_ptr()
    compiled.check(library.nin_winograd_pack(handle, row, winograd, *addresses, compiled.pool()))
    return packed
