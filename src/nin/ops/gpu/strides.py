"""Where pixels lie: the strides of images that a kernel walks through together, with as few divisions as possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the pixels of some tensors of equal (N, H, W) lie.

    Attributes:
        pixels: N H W.
        height: rows of an image, 1 where its rows follow each other without a gap.
        width: pixels of a row.
        strides: for each tensor (image, channel, row, column).
        wide: whether offsets need 64 bits.
    """

    pixels: Any
    height: Any
    width: Any
    strides: tuple[tuple[Any, ...], ...]
    wide: bool


def places(*tensors: Tensor) -> Places:
    """Return where the pixels of the tensors lie, rows and images put together where the strides allow it in all.

    The layout is in the strides alone: NCHW, channels_last and views are read and written where they lie.
    """
    images, _, height, width = tensors[0].shape
    strides: list[tuple[Any, ...]] = [t.stride() for t in tensors]
    if width == 1:
        height, width = 1, height
        strides = [(n, c, 0, h) for n, c, h, _ in strides]
    elif height == 1 or all(h == width * w for _, _, h, w in strides):
        height, width = 1, height * width
        strides = [(n, c, 0, w) for n, c, _, w in strides]
    if height == 1 and (images == 1 or all(n == width * w for n, _, _, w in strides)):
        width = images * width
    total = images * tensors[0].shape[2] * tensors[0].shape[3]
    return Places(total, height, width, tuple(strides), needs_64_bits(*tensors))


def needs_64_bits(*tensors: Tensor) -> bool:
    """Return whether an offset into one of the tensors, or the number of pixels, passes 31 bits."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) >= 1 << 31
        or t.shape[0] * t.shape[2] * t.shape[3] >= (1 << 31) - 1024
        for t in tensors
    )


def strided(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Return a view of the pixels that a 1×1 convolution with that stride looks at."""
    return x if tuple(stride) == (1, 1) else x[:, :, :: stride[0], :: stride[1]]
