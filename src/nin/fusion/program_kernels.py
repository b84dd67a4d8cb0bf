"""Which of PyTorch's functions the compiled library computes as a step, to the same bits."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin.ops.checks import pair
from nin.ops.cpu.steps import KernelStep, add_step, pool_step


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
    """Return the step for a call of a function or module with tensors; None if there is none to the same bits."""
    find = _FINDERS.get(type(function) if isinstance(function, nn.Module) else function)
    if find is None or any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    if not all(_is_plain(value) for value in args if isinstance(value, Tensor)):
        return None
    options = (function,) if isinstance(function, nn.Module) else ()
    found: FoundStep | None = find(*options, *args, **kwargs)
    return found


def dense_order(t: Tensor) -> bool:
    """Return whether a tensor's values lie without gaps, in one of PyTorch's two orders."""
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _is_plain(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.is_cpu and t.layout == torch.strided and not t.is_neg() and t.numel() > 0


def _activation(name: str, *, changes: bool = False) -> Callable[..., FoundStep | None]:
    def find(x: Tensor, inplace: bool = False) -> FoundStep | None:
        if not dense_order(x):
            return None
        y = None if inplace or changes else torch.empty_like(x)
        return FoundStep(x, None, y, add_step(x.numel(), name)) if y is None or y.stride() == x.stride() else None

    return find


def _activation_module(name: str) -> Callable[..., FoundStep | None]:
    find = _activation(name)
    return lambda module, x: find(x, module.inplace)


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> FoundStep | None:
    return _activation("relu6")(x, inplace) if (min_val, max_val) == (0, 6) else None


def _add(*, changes: bool) -> Callable[..., FoundStep | None]:
    def find(x: Any, other: Any, **options: Any) -> FoundStep | None:
        if options or not isinstance(x, Tensor) or not isinstance(other, Tensor) or not dense_order(x):
            return None
        if x.shape != other.shape or x.stride() != other.stride():
            return None
        y = None if changes else torch.empty_like(x)
        if y is not None and y.stride() != x.stride():
            return None
        return FoundStep(x, other, y, add_step(x.numel()))

    return find


def _pool(x: Tensor, y: Tensor, window: tuple[Any, Any, Any, Any], **options: Any) -> FoundStep | None:
    """Return the step of a pooling whose result is like ``y``."""
    if x.dim() != 4 or x.stride(1) != 1 or y.stride(1) != 1 or not dense_order(y):
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


def _max_pool_module(m: nn.MaxPool2d, x: Tensor) -> FoundStep | None:
    return _max_pool(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _average_pool_module(m: nn.AvgPool2d, x: Tensor) -> FoundStep | None:
    return _average_pool(x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)


def _nothing(module: nn.Module, x: Tensor) -> FoundStep | None:
    return FoundStep(x)


_FINDERS: dict[Any, Callable[..., FoundStep | None]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _activation("relu")),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _activation("relu", changes=True)),
    F.relu6: _activation("relu6"),
    F.hardtanh: _hardtanh,
    nn.ReLU: _activation_module("relu"),
    nn.ReLU6: _activation_module("relu6"),
    **dict.fromkeys((operator.add, torch.add, Tensor.add), _add(changes=False)),
    **dict.fromkeys((operator.iadd, Tensor.add_), _add(changes=True)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.avg_pool2d: _average_pool,
    nn.MaxPool2d: _max_pool_module,
    nn.AvgPool2d: _average_pool_module,
    # in evaluation
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _nothing),
}
