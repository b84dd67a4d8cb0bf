"""Which of PyTorch's functions the compiled library computes as a step."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin.fusion.compiled_layers import (
    FoundStep,
    are_plain,
    batch_norm,
    batch_norm_module,
    channel_axis,
    convolution,
    convolution_module,
    dense_like,
    layer_norm,
    of_each_pixel,
    pixelwise,
    product,
)
from nin.ops.checks import pair
from nin.ops.cpu.steps import Other, add_step, linear_step, pool_step
from nin.ops.cpu.weight_cache import is_dense

# The most pixels whose mean is their plain sum over their number: a longer sum would lose digits.
MOST_PIXELS = 1024


def find_step(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FoundStep | None:
    """Return the step for a call of a function or module with tensors; None if there is none.

    Sums, ReLU, ReLU6 and poolings have PyTorch's bits; other activations, the mean over an image and fully connected
    layers are right to rounding, as the operators around them are. In bfloat16 all compute in float32 and round once.
    """
    find = _FINDERS.get(type(function) if isinstance(function, nn.Module) else function)
    if isinstance(function, nn.BatchNorm2d):  # timm's too
        find = batch_norm_module
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    if find is None or not tensors.keys() <= {"weight", "bias"}:
        return None
    if not are_plain(*(value for value in (*args, *tensors.values()) if isinstance(value, Tensor))):
        return None
    options = (function,) if isinstance(function, nn.Module) else ()
    try:
        inspect.signature(find).bind(*options, *args, **kwargs)
    except TypeError:  # an argument that only PyTorch knows, such as NumPy's names, or out=None
        return None
    found: FoundStep | None = find(*options, *args, **kwargs)
    return found


def _activation(name: str, *, changes: bool = False) -> Callable[..., FoundStep | None]:
    def find(x: Tensor, inplace: bool = False) -> FoundStep | None:
        if not is_dense(x):
            axis, result = channel_axis(x), x if inplace or changes else dense_like(x)
            found = None if axis is None else pixelwise(x, result, axis, activation=name)
            return found if found is None or result is not x else found._replace(y=None)
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
        if options or not isinstance(x, Tensor) or not isinstance(other, Tensor) or x.shape != other.shape:
            return None
        if not is_dense(x) or x.stride() != other.stride():
            return None if changes else of_each_pixel(x, other, Other.PIXEL_SHIFT)
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


def _pad(x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> FoundStep | None:
    """Return the step of zeros around images: the mean of one pixel, or of none, over one."""
    if mode != "constant" or value or len(pad) != 4 or min(pad) < 0 or x.dim() != 4:
        return None
    left, _, top, _ = pad
    return _pool(x, F.pad(x, pad), (1, 1, (top, left), 1), largest=False, divisor=1)


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
    if x.dim() != 2 or not are_plain(x, *weights) or not all(t.is_contiguous() for t in (x, *weights)):
        return None
    y = F.linear(x, weight, bias)
    return FoundStep(x, None, y, linear_step(x, weight, bias, y))


def _max_pool_module(m: nn.MaxPool2d, x: Tensor) -> FoundStep | None:
    return _max_pool(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _average_pool_module(m: nn.AvgPool2d, x: Tensor) -> FoundStep | None:
    return _average_pool(x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)


def _nothing(module: nn.Module, x: Tensor) -> FoundStep | None:
    return FoundStep(x)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> FoundStep | None:
    return FoundStep(x) if p == 0 or not training else None


# Whose tensors behind the first are read where they lie, in every call.
WEIGHTED = {F.conv2d, torch.conv2d, F.linear, torch._C._nn.linear, F.layer_norm, F.batch_norm}

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
    **dict.fromkeys((nn.ReLU6, nn.Hardtanh), lambda m, x: _hardtanh(x, m.min_val, m.max_val, m.inplace)),
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
    F.pad: _pad,
    F.adaptive_avg_pool2d: _adaptive_pool,
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((F.linear, torch._C._nn.linear), _linear),
    **dict.fromkeys((F.conv2d, torch.conv2d), convolution),
    nn.Conv2d: convolution_module,
    nn.MaxPool2d: _max_pool_module,
    nn.AdaptiveAvgPool2d: lambda module, x: _adaptive_pool(x, module.output_size),
    nn.Linear: lambda module, x: _linear(x, module.weight, module.bias),
    nn.AvgPool2d: _average_pool_module,
    **dict.fromkeys((operator.mul, torch.mul, Tensor.mul), product),
    F.layer_norm: layer_norm,
    nn.LayerNorm: lambda module, x: layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps),
    F.batch_norm: batch_norm,
    F.dropout: _dropout,
    # in evaluation
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _nothing),
}
