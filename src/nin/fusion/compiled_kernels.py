"""Which of PyTorch's functions the compiled library computes as a step."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin.fusion.node_roles import activation_inside
from nin.ops.arguments import ChainArguments
from nin.ops.checks import pair
from nin.ops.cpu import dispatch, library
from nin.ops.cpu.steps import KernelStep, add_step, convolution_step, linear_step, pool_step, scale_shift_step
from nin.ops.cpu.weight_cache import is_dense
from nin.ops.reference import memory_format_of

# The most pixels whose mean is their plain sum over their number: a longer sum would lose digits.
MOST_PIXELS = 1024


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


def find_step(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FoundStep | None:
    """Return the step for a call of a function or module with tensors; None if there is none.

    Sums, ReLU, ReLU6 and poolings have PyTorch's bits; other activations, the mean over an image and fully connected
    layers are right to rounding, as the operators around them are. In bfloat16 all compute in float32 and round once.
    """
    find = _FINDERS.get(type(function) if isinstance(function, nn.Module) else function)
    if isinstance(function, nn.BatchNorm2d):  # timm's too
        find = _batch_norm_module
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    if find is None or not tensors.keys() <= {"weight", "bias"}:
        return None
    if not _are_plain(*(value for value in (*args, *tensors.values()) if isinstance(value, Tensor))):
        return None
    options = (function,) if isinstance(function, nn.Module) else ()
    found: FoundStep | None = find(*options, *args, **kwargs)
    return found


def _are_plain(*tensors: Tensor) -> bool:
    """Return whether steps can read tensors, which are all of one dtype."""
    return len({t.dtype for t in tensors}) <= 1 and all(
        t.dtype in library.DTYPES and t.is_cpu and t.layout == torch.strided and not t.is_neg() and t.numel() > 0
        for t in tensors
    )


def _activation(name: str, *, changes: bool = False) -> Callable[..., FoundStep | None]:
    def find(x: Tensor, inplace: bool = False) -> FoundStep | None:
        if not is_dense(x):
            return None
        y = None if inplace or changes else torch.empty_like(x)
        return FoundStep(x, None, y, add_step(x, name)) if y is None or y.stride() == x.stride() else None

    return find


def _activation_module(name: str) -> Callable[..., FoundStep | None]:
    find = _activation(name)
    return lambda module, x: find(x, module.inplace)


def _gelu(x: Tensor, approximate: str = "none") -> FoundStep | None:
    return _activation("gelu")(x) if approximate == "none" else None


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> FoundStep | None:
    return _activation("relu6")(x, inplace) if (min_val, max_val) == (0, 6) else None


def _add(*, changes: bool) -> Callable[..., FoundStep | None]:
    def find(x: Any, other: Any, **options: Any) -> FoundStep | None:
        if options or not isinstance(x, Tensor) or not isinstance(other, Tensor) or not is_dense(x):
            return None
        if x.shape != other.shape or x.stride() != other.stride():
            return None
        y = None if changes else torch.empty_like(x)
        if y is not None and y.stride() != x.stride():
            return None
        return FoundStep(x, other, y, add_step(x))

    return find


def _pool(x: Tensor, y: Tensor, window: tuple[Any, Any, Any, Any], **options: Any) -> FoundStep | None:
    """Return the step of a pooling whose result is like ``y``."""
    if x.dim() != 4 or x.stride(1) != 1 or y.stride(1) != 1 or not is_dense(y):
        return None
    size, stride, padding, dilation = window
    size = pair("kernel_size", size, 1)
    sizes = size, size if stride in (None, [], ()) else pair("stride", stride, 1), pair("padding", padding, 0)
    return FoundStep(x, None, y, pool_step(x, y, (*sizes, pair("dilation", dilation, 1)), **options))


def _max_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> FoundStep | None:
    if return_indices:
        return None
    y = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    return _pool(x, y, (kernel_size, stride, padding, dilation), largest=True)


def _average_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> FoundStep | None:
    y = F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    options = {"counts_padding": count_include_pad, "divisor": divisor_override or 0}
    return _pool(x, y, (kernel_size, stride, padding, 1), largest=False, **options)


def _adaptive_pool(x: Tensor, output_size: Any) -> FoundStep | None:
    return _mean_over_image(x, F.adaptive_avg_pool2d(x, 1)) if output_size in (1, (1, 1), [1, 1]) else None


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> FoundStep | None:
    if x.dim() != 4 or not isinstance(dim, tuple | list) or sorted(d % 4 for d in dim) != [2, 3] or dtype is not None:
        return None
    return _mean_over_image(x, x.mean(dim, keepdim))


def _mean_over_image(x: Tensor, y: Tensor) -> FoundStep | None:
    """Return the step of a mean with the result ``y``."""
    if x.dim() != 4 or x.stride(1) != 1 or y.stride(1) != 1 or x.shape[2] * x.shape[3] > MOST_PIXELS:
        return None
    window = (*x.shape[2:],), (1, 1), (0, 0), (1, 1)
    image = y if y.dim() == 4 else y[:, :, None, None]
    return FoundStep(x, None, y, pool_step(x, image, window, largest=False))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> FoundStep | None:
    weights = (weight,) if bias is None else (weight, bias)
    if x.dim() != 2 or not _are_plain(x, *weights) or not all(t.is_contiguous() for t in (x, *weights)):
        return None
    y = F.linear(x, weight, bias)
    return FoundStep(x, None, y, linear_step(x, weight, bias, y))


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
    if x.dim() != 4 or not _are_plain(x, *weights):
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


def _convolution_module(m: nn.Conv2d, x: Tensor) -> FoundStep | None:
    if m.padding_mode != "zeros":
        return None
    return convolution(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


def _max_pool_module(m: nn.MaxPool2d, x: Tensor) -> FoundStep | None:
    return _max_pool(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _average_pool_module(m: nn.AvgPool2d, x: Tensor) -> FoundStep | None:
    return _average_pool(x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)


def _nothing(module: nn.Module, x: Tensor) -> FoundStep | None:
    return FoundStep(x)


def _pixels(x: Tensor, axis: int) -> Tensor | None:
    """Return images, or rows of any shape, as (N, C, P, 1) with their channels at an axis; None if it is no view."""
    moved = x.movedim(axis, -1)
    flat = moved[:, None] if x.dim() == 2 else moved.flatten(1, -2)
    same = flat.untyped_storage()._cdata == x.untyped_storage()._cdata
    return flat.movedim(-1, 1)[..., None] if same and 0 not in flat.stride() else None


def _channel_axis(x: Tensor) -> int | None:
    """Return the axis of contiguous channels of images or rows; None if there is none."""
    return next((axis for axis in (1, -1) if 2 <= x.dim() <= 4 and x.stride(axis) == 1), None)


def _pixelwise(
    x: Tensor,
    y: Tensor,
    axis: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    other: Tensor | None = None,
    activation: str = "none",
    norm_eps: float | None = None,
) -> FoundStep | None:
    """Return the step of ``y = activation(x · scale + shift)``, see `scale_shift_step`."""
    pixels, result = _pixels(x, axis), _pixels(y, axis)
    if pixels is None or result is None or result.stride(1) != 1:
        return None
    if other is not None and not (_are_plain(x, other) and is_dense(other)):
        return None
    per_image = other is not None and other.numel() > x.shape[axis]
    step = scale_shift_step(pixels, result, scale, shift, activation, norm_eps, per_image=per_image)
    return FoundStep(x, other, y, step)


def _layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> FoundStep | None:
    if not 2 <= x.dim() <= 4 or tuple(normalized_shape) != (x.shape[-1],):
        return None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _pixelwise(x, y, -1, weight, bias, norm_eps=eps)


def _batch_norm(
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
    if training or running_mean is None or running_var is None or _channel_axis(x) != 1:
        return None
    scale = torch.rsqrt(running_var.double() + eps) * (1 if weight is None else weight)
    shift = -running_mean * scale + (0 if bias is None else bias)
    y = torch.empty_like(x)
    return _pixelwise(x, y, 1, scale, shift, activation=activation)


def _batch_norm_module(m: nn.BatchNorm2d, x: Tensor) -> FoundStep | None:
    """Return the step of a BatchNorm, with the activation that timm's has inside."""
    activation = activation_inside(m)
    if activation is None or m.training or x.dim() != 4 or x.shape[1] != m.num_features:
        return None
    return _batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps, activation=activation)


def _product(x: Any, other: Any) -> FoundStep | None:
    """Return the step of images times a factor for each channel, or for each channel of each image."""
    if not (isinstance(x, Tensor) and isinstance(other, Tensor)):
        return None
    if x.numel() < other.numel():
        x, other = other, x
    axis = _channel_axis(x)
    if axis is None or x.dim() < 3 or other.dim() > x.dim():
        return None
    axis %= x.dim()
    factors = other[(None,) * (x.dim() - other.dim())]
    of_channels = tuple(size if i == axis else 1 for i, size in enumerate(x.shape))
    if tuple(factors.shape) not in (of_channels, (x.shape[0], *of_channels[1:])):
        return None
    return _pixelwise(x, torch.empty_like(x), axis, other=other)


def concatenation(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, list[FoundStep]] | None:
    """Return the result of a call that joins images along their channels, and a step for each; None if it is none."""
    if function not in (torch.cat, torch.concat) or "out" in kwargs:
        return None
    names: dict[str, Any] = {**dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}
    tensors, axis = names.get("tensors"), names.get("dim", 0)
    if not tensors or not all(isinstance(t, Tensor) and 2 <= t.dim() <= 4 for t in tensors):
        return None
    if not _are_plain(*tensors):
        return None
    if any(axis % t.dim() != (_channel_axis(t) or 0) % t.dim() for t in tensors):
        return None
    y: Tensor = function(*args, **kwargs)
    parts = y.split([t.shape[axis] for t in tensors], axis)
    steps = [_pixelwise(t, part, axis) for t, part in zip(tensors, parts, strict=True)]
    return None if None in steps else (y, [step for step in steps if step is not None])


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> FoundStep | None:
    return FoundStep(x) if p == 0 or not training else None


# Whose result may be the memory of their first argument in other shapes.
VIEWS: set[Any] = {torch.flatten, torch.squeeze, torch.unsqueeze, torch.reshape, torch.permute, torch.transpose}
VIEWS |= {torch.chunk, torch.split, torch.narrow, torch.movedim, operator.getitem, nn.Flatten}
VIEWS |= {Tensor.flatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.reshape, Tensor.view, Tensor.permute}
VIEWS |= {Tensor.transpose, Tensor.chunk, Tensor.split, Tensor.narrow, Tensor.movedim, Tensor.contiguous}

_FINDERS: dict[Any, Callable[..., FoundStep | None]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _activation("relu")),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _activation("relu", changes=True)),
    F.relu6: _activation("relu6"),
    F.hardtanh: _hardtanh,
    nn.ReLU: _activation_module("relu"),
    nn.ReLU6: _activation_module("relu6"),
    F.hardswish: _activation("hardswish"),
    F.silu: _activation("silu"),
    F.gelu: _gelu,
    F.hardsigmoid: _activation("hardsigmoid"),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid), _activation("sigmoid")),
    **dict.fromkeys((torch.sigmoid_, Tensor.sigmoid_), _activation("sigmoid", changes=True)),
    nn.Hardswish: _activation_module("hardswish"),
    nn.SiLU: _activation_module("silu"),
    nn.Hardsigmoid: _activation_module("hardsigmoid"),
    nn.GELU: lambda module, x: _gelu(x, module.approximate),
    nn.Sigmoid: lambda module, x: _activation("sigmoid")(x),
    **dict.fromkeys((operator.add, torch.add, Tensor.add), _add(changes=False)),
    **dict.fromkeys((operator.iadd, Tensor.add_), _add(changes=True)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.avg_pool2d: _average_pool,
    F.adaptive_avg_pool2d: _adaptive_pool,
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((F.linear, torch._C._nn.linear), _linear),
    **dict.fromkeys((F.conv2d, torch.conv2d), convolution),
    nn.Conv2d: _convolution_module,
    nn.MaxPool2d: _max_pool_module,
    nn.AdaptiveAvgPool2d: lambda module, x: _adaptive_pool(x, module.output_size),
    nn.Linear: lambda module, x: _linear(x, module.weight, module.bias),
    nn.AvgPool2d: _average_pool_module,
    **dict.fromkeys((operator.mul, torch.mul, Tensor.mul), _product),
    F.layer_norm: _layer_norm,
    nn.LayerNorm: lambda module, x: _layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps),
    F.batch_norm: _batch_norm,
    F.dropout: _dropout,
    # in evaluation
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _nothing),
}
