"""Weights in the order in which the CPU kernels read them, kept until the weight changes."""

from __future__ import annotations

import struct
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from nin.ops import compiled


@dataclass(frozen=True)
class _Entry:
    weight: weakref.ref[Tensor]
    state: tuple[object, ...]
    packed: Tensor


_packed: dict[tuple[int, int, bool], _Entry] = {}


def packed_weight(handle: int, weight: Tensor, for_input_gradient: bool = False) -> Tensor:
    """Return the weight in the kernels' order; packed again only after the weight has changed.

    A change is seen by the version counter that every in-place operation and optimiser step raises, and by the
    address. A change through ``weight.data`` or another library's view of the memory raises no counter: it is seen
    where one of 64 values differs, as after scaling, averaging or copying. Weights made in inference mode have no
    counter: all of their values are compared, by a hash. The copy lives as long as the weight.
    """
    key = (id(weight), handle, for_input_gradient)
    address = weight.data_ptr()
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    size, library = weight.numel() * weight.element_size() if dense else 0, compiled.loaded()
    if not weight.is_inference():
        change = weight._version, library.nin_sample(address, size)
    elif dense:
        change = -1, library.nin_hash(address, size)
    else:
        return _pack(handle, weight, for_input_gradient)
    state = (change, address, weight.shape, weight.stride())
    entry = _packed.get(key)
    if entry is not None and entry.weight() is weight and entry.state == state:
        return entry.packed

    def forget(dead: weakref.ref[Tensor]) -> None:
        last = _packed.get(key)
        if last is not None and last.weight is dead:  # the id may serve another weight by now
            del _packed[key]

    packed = _pack(handle, weight, for_input_gradient)
    _packed[key] = _Entry(weakref.ref(weight, forget), state, packed)
    return packed


def _pack(handle: int, weight: Tensor, for_input_gradient: bool) -> Tensor:
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
    packed = torch.empty(compiled.loaded().nin_packed_bytes(handle, row), dtype=torch.uint8)
    compiled.loaded().nin_pack(handle, row, address, packed.data_ptr())
    return packed
