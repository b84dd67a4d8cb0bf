"""Steps of single convolutions, norms and what else is computed of each pixel by itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nin.fusion.node_roles import activation_inside
from nin.ops.arguments import ChainArguments
from nin.ops.checks import pair
from nin.ops.cpu import dispatch, library
from nin.ops.cpu.steps import KernelStep, Other, convolution_step, scale_shift_step
from nin.ops.cpu.weight_cache import is_dense
from nin.ops.reference import memory_format_of


class FoundStep(NamedTuple):
    """A step for a call of a function.

    Attributes:
        x: what it reads.
        other: what it reads besides, or None.
        y: where the result goes; None where it goes to ``x``.
        step: the step, or None where the result is ``x`` itself.
    """

    x: Tensor
    other: Tensor | None = None
    y: Tensor | None = None
    step: KernelStep | None = None


def are_plain(*tensors: Tensor) -> bool:
    """Return whether steps can read tensors, which are all of one dtype."""
    return len({t.dtype for t in tensors}) <= 1 and all(
        t.dtype in library.DTYPES and t.is_cpu and t.layout == torch.strided and not t.is_neg() and t.numel() > 0
        for t in tensors
    )


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str = "none",
) -> FoundStep | None:
    """Return the step of a convolution with zeros around the image, as PyTorch's arguments tell it; None if not."""
    weights = (weight,) if bias is None else (weight, bias)
    if x.dim() != 4 or not are_plain(x, *weights):
        return None
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    if isinstance(padding, str):
        around = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, weight.shape[2:], strict=True)]
        if any(both % 2 for both in around):
            return None
        padding = tuple(both // 2 for both in around)
    geometry = strides, pair("padding", padding, 0), dilations
    layer = ChainArguments((weight,), (bias,), *geometry, (activation,))
    size = layer.output_shape(x)
    if dispatch.KERNELS is None or min(size) < 1 or x.shape[1] != weight.shape[1] * groups:
        return None
    y = torch.empty(size, dtype=x.dtype, memory_format=memory_format_of(x))
    return FoundStep(x, None, y, convolution_step(dispatch.KERNELS, x, y, layer, groups))


def convolution_module(m: nn.Conv2d, x: Tensor) -> FoundStep | None:
    """Return the step of a convolution's module."""
    if m.padding_mode != "zeros":
        return None
    return convolution(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


def _pixels(x: Tensor, axis: int) -> Tensor | None:
    """Return images, or rows of any shape, as (N, C, P, 1) with their channels at an axis; None if it is no view."""
    moved = x.movedim(axis, -1)
    flat = moved[:, None] if x.dim() == 2 else moved.flatten(1, -2)
    same = flat.untyped_storage()._cdata == x.untyped_storage()._cdata
    return flat.movedim(-1, 1)[..., None] if same and 0 not in flat.stride() else None


def channel_axis(x: Tensor) -> int | None:
    """Return the axis of contiguous channels of images or rows; None if there is none."""
    return next((axis for axis in (1, -1) if 2 <= x.dim() <= 4 and x.stride(axis) == 1), None)


def pixelwise(x: Tensor, y: Tensor, axis: int, other: Tensor | None = None, **options: Any) -> FoundStep | None:
    """Return a step of every pixel by itself, see `scale_shift_step`; None if the tensors do not lie as it needs."""
    pixels, result = _pixels(x, axis), _pixels(y, axis)
    if pixels is None or result is None or result.stride(1) != 1:
        return None
    return FoundStep(x, other, y, scale_shift_step(pixels, result, **options))


def of_each_pixel(x: Tensor, other: Tensor, kind: Other) -> FoundStep | None:
    """Return the step of two images, of which each may be a part of the channels of wider ones."""
    axis = channel_axis(x)
    if axis is None or x.shape != other.shape or other.stride(axis) != 1:
        return None
    pixels = _pixels(other, axis)
    if pixels is None:
        return None
    images, _, count, _ = pixels.shape
    stride = pixels.stride(2) if count > 1 else pixels.stride(0)
    if images > 1 and pixels.stride(0) != count * stride:
        return None
    return pixelwise(x, dense_like(x), axis, other, other_is=(kind, stride))


def dense_like(x: Tensor) -> Tensor:
    """Return a tensor of any values with the shape of another and its order of axes."""
    last = x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


def layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> FoundStep | None:
    """Return the step of a LayerNorm over the last axis, as PyTorch's arguments tell it."""
    if not 2 <= x.dim() <= 4 or tuple(normalized_shape) != (x.shape[-1],):
        return None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return pixelwise(x, y, -1, scale=weight, shift=bias, norm_eps=eps)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
) -> FoundStep | None:
    """Return the step of a BatchNorm with fixed statistics, as PyTorch's arguments tell it."""
    if training or running_mean is None or running_var is None or channel_axis(x) != 1:
        return None
    scale = torch.rsqrt(running_var.double() + eps) * (1 if weight is None else weight)
    shift = -running_mean * scale + (0 if bias is None else bias)
    y = torch.empty_like(x)
    return pixelwise(x, y, 1, scale=scale, shift=shift, activation=activation)


def batch_norm_module(m: nn.BatchNorm2d, x: Tensor) -> FoundStep | None:
    """Return the step of a BatchNorm, with the activation that timm's has inside."""
    activation = activation_inside(m)
    if activation is None or m.training or x.dim() != 4 or x.shape[1] != m.num_features:
        return None
    return batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps, activation=activation)


def product(x: Any, other: Any) -> FoundStep | None:
    """Return the step of images times a factor for each channel, or for each channel of each image."""
    if not (isinstance(x, Tensor) and isinstance(other, Tensor)):
        return None
    if x.numel() < other.numel():
        x, other = other, x
    if x.shape == other.shape:
        return of_each_pixel(x, other, Other.PIXEL_SCALE)
    axis = channel_axis(x)
    if axis is None or x.dim() < 3 or other.dim() > x.dim():
        return None
    axis %= x.dim()
    factors = other[(None,) * (x.dim() - other.dim())]
    of_channels = tuple(size if i == axis else 1 for i, size in enumerate(x.shape))
    if tuple(factors.shape) not in (of_channels, (x.shape[0], *of_channels[1:])):
        return None
    if not is_dense(other):
        return None
    per_image = x.shape[axis] if other.numel() > x.shape[axis] else 0
    return pixelwise(x, dense_like(x), axis, other, other_is=(Other.SCALE, per_image))


def concatenation(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, list[FoundStep]] | None:
    """Return the result of a call that joins images along their channels, and a step for each; None if it is none."""
    if function not in (torch.cat, torch.concat) or not kwargs.keys() <= {"tensors", "dim"}:
        return None
    names: dict[str, Any] = {**dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}
    tensors, axis = names.get("tensors"), names.get("dim", 0)
    if not tensors or not all(isinstance(t, Tensor) and 2 <= t.dim() <= 4 for t in tensors):
        return None
    if not are_plain(*tensors):
        return None
    if any(axis % t.dim() != (channel_axis(t) or 0) % t.dim() for t in tensors):
        return None
    y: Tensor = function(*args, **kwargs)
    parts = y.split([t.shape[axis] for t in tensors], axis)
    steps = [pixelwise(t, part, axis) for t, part in zip(tensors, parts, strict=True)]
    return None if None in steps else (y, [step for step in steps if step is not None])
