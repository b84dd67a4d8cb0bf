"""Strides of the images that a kernel reads and writes, coalesced to spare it divisions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class CoalescedPixels:
    """Tensors of equal (N, H, W) as a kernel walks them: one index over all pixels.

    Attributes:
        pixels: N H W.
        height: rows of an image, 1 where rows follow each other without a gap.
        width: pixels of a row, N H W where images do too.
        strides: (image, channel, row, column) of each tensor, in values.
        needs_64_bits: whether offsets do.
    """

    pixels: Any
    height: Any
    width: Any
    strides: tuple[tuple[Any, ...], ...]
    needs_64_bits: bool

    def numbers(self) -> tuple[Any, ...]:
        """Return pixels, height, width and all strides, in the order of the kernels' arguments."""
        return (self.pixels, self.height, self.width, *(n for strides in self.strides for n in strides))


def coalesce_pixels(*tensors: Tensor) -> CoalescedPixels:
    """Return how to walk the tensors together, rows and images merged where the strides of all allow it.

    NCHW, channels_last and views differ in their strides alone, so all are read and written in place. A merged
    dimension needs no division to find a pixel's offset.
    """
    images, _, height, width = tensors[0].shape
    strides: list[tuple[Any, ...]] = [t.stride() for t in tensors]
    if height == width == 1:  # images of one pixel are a row of pixels, in every format
        strides = [(n, c, 0, n) for n, c, _, _ in strides]
    elif width == 1:  # a column of pixels is walked as a row
        height, width = 1, height
        strides = [(n, c, 0, h) for n, c, h, _ in strides]
    elif height == 1 or all(h == width * w for _, _, h, w in strides):
        height, width = 1, height * width
        strides = [(n, c, 0, w) for n, c, _, w in strides]
    if height == 1 and (images == 1 or all(n == width * w for n, _, _, w in strides)):
        width = images * width
    total = images * tensors[0].shape[2] * tensors[0].shape[3]
    return CoalescedPixels(total, height, width, tuple(strides), needs_64_bit_offsets(*tensors))


def needs_64_bit_offsets(*tensors: Tensor) -> bool:
    """Return whether an offset into one of the tensors, or the number of pixels, passes 31 bits."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) >= 1 << 31
        # the last tile counts on to at most 127 pixels beyond the end
        or t.shape[0] * t.shape[2] * t.shape[3] >= (1 << 31) - 1024
        for t in tensors
    )


def subsample(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Return a view of the pixels that a 1×1 convolution with that stride reads."""
    return x if tuple(stride) == (1, 1) else x[:, :, :: stride[0], :: stride[1]]
