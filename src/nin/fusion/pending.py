"""Pending: the result of a chain's first layers, which are computed when the chain is complete or somebody looks."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nin.errors import UserError
from nin.fusion.chain import PLAIN_TYPES, Chain
from nin.fusion.link import (
    AFTER_STEPS,
    After,
    LayerNorm,
    LayerScale,
    Link,
    Norm,
    Permute,
    Residual,
    run_layers,
    squeeze,
)

_nothing = torch.empty(0, device="meta")  # under a Pending: code that looks past its type finds no numbers


class Pending(Tensor):
    """What the layers of a chain return before the chain is complete.

    The model's own forward runs in every call. The first layer of a chain (`ChainConv2d`, `ChainLinear`) computes
    nothing and returns one of these. The layers after it get it like any tensor, and what they do with it arrives in
    ``__torch_function__``, with the weights of this call. If it is the next step of the chain, it is noted, and the
    last step computes the chain and returns an ordinary tensor. Whatever else happens to it, such as an addition, a
    print, a layer that somebody put there later, computes the layers so far as PyTorch does and goes on with that. So
    the result is the model's, whatever its forward does.
    """

    chain: Chain
    x: Tensor
    links: list[Link]
    position: int  # how many of the chain's steps are in the links
    modes: tuple[Any, ...]  # in which the first layer was called, see `_modes`
    versions: list[tuple[Tensor, int]]  # of the tensors that the value depends on
    value: Tensor | None
    # of what squeeze-and-excitation makes of a result: that result, and its links then
    origin: tuple["Pending", list[Link]] | None

    def compute(self) -> Tensor:
        """Return the value, as PyTorch's layers compute it."""
        if self.value is None:
            _check_versions(self)
            with _restored(self.modes, self.x.device.type):
                value = run_layers(self.x, self.links)
                self.value = squeeze(value) if _is_squeezed(self) else value
        if self.value.requires_grad and not torch.is_grad_enabled():
            _check_no_function(self)
        return self.value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Go on with the chain if this is its next step; else compute the value and call the function with it."""
        kwargs = kwargs or {}
        if func in _SYMMETRIC and len(args) == 2 and type(args[0]) is not Pending:
            args = args[1], args[0]
        this = args[0] if args else None
        if type(this) is Pending and this.value is None:
            if func in _DIMENSIONS:
                return this.x.dim()  # BatchNorm asks for it
            step = _STEPS.get(func)
            result = None if step is None else step(this, *args[1:], **kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map_only(Pending, Pending.compute, (args, kwargs))
        return func(*args, **kwargs)


def start(chain: Chain, x: Tensor, link: Link) -> Tensor:
    """Return the result of a chain's first layer for ``x``."""
    pending = Tensor._make_subclass(Pending, _nothing)
    pending.chain, pending.x, pending.links, pending.value, pending.origin = chain, x, [link], None, None
    pending.position = 1
    pending.modes, pending.versions = _modes(x), _versions([x, *link.tensors()])
    return pending


def _advance(this: Pending, step: str, links: list[Link], new: list[Tensor] = [], *, inplace: bool = False) -> Any:  # noqa: B006
    """Return the result of the next step of a chain, or None if this is not its next step.

    Args:
        this: the result of the steps before.
        step: the step's name, see `Chain`.
        links: all links with this step.
        new: the tensors that it brings.
        inplace: it changes ``this``.
    """
    chain, position = this.chain, this.position
    if chain.steps[position] != step or this.modes != _modes(this.x):
        return None
    versions = [*this.versions, *_versions(new)] if new else this.versions
    if position + 1 == len(chain.steps):
        _check_versions(this)
        result = chain.run(this.x, links)
        if inplace:
            this.value = result
        return result
    pending = this if inplace else Tensor._make_subclass(Pending, _nothing)
    pending.chain, pending.x, pending.links, pending.value = chain, this.x, links, None
    pending.position = position + 1
    pending.origin = this.origin
    pending.modes, pending.versions = this.modes, versions
    return pending


def _is_squeezed(this: Pending) -> bool:
    """Return whether a value is the mean over an image, without a layer behind it."""
    return this.origin is not None and len(this.links) == len(this.origin[1])


def _conv2d(
    this: Pending,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not this.chain.convolves:
        return None
    link = conv_link(weight, bias, stride, padding, dilation, groups)
    if _is_squeezed(this):
        link = link._replace(role="squeeze")
    return _advance(this, "layer", [*this.links, link], link.tensors())


def _linear(this: Pending, weight: Tensor, bias: Tensor | None = None) -> Any:
    if this.chain.convolves and not this.chain.normalizes:
        return None
    link = Link(weight, bias, ())
    return _advance(this, "layer", [*this.links, link], link.tensors())


def _batch_norm(
    this: Pending,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None or eps < 0:
        return None
    norm = Norm(running_mean, running_var, weight, bias, eps)
    links = [*this.links[:-1], this.links[-1]._replace(norm=norm)]
    return _advance(this, "norm", links, [t for t in norm[:4] if t is not None])


def _activation(name: str, *, changes: bool = False) -> Callable[..., Any]:
    def step(this: Pending, inplace: bool = False, approximate: str = "none") -> Any:
        if approximate != "none":
            return None
        links = [*this.links[:-1], this.links[-1]._replace(activation=name)]
        return _advance(this, name, links, inplace=inplace or changes)

    return step


def _hardtanh(this: Pending, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return _activation("relu6")(this, inplace) if (min_val, max_val) == (0, 6) else None


def _mean(this: Pending, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    over_image = isinstance(dim, tuple | list) and sorted(d % 4 for d in dim) == [2, 3]
    return _squeeze(this) if over_image and keepdim and dtype is None else None


def _adaptive_avg_pool2d(this: Pending, output_size: Any) -> Any:
    return _squeeze(this) if output_size in (1, (1, 1), [1, 1]) else None


def _squeeze(this: Pending) -> Any:
    pending = None if this.origin is not None else _advance(this, "mean", this.links)
    if pending is not None:
        pending.origin = this, this.links
    return pending


def _follow(this: Pending, after: After, new: list[Tensor] = [], *, inplace: bool = False) -> Any:  # noqa: B006
    """Return the result of a step that a block with a LayerNorm has behind its last layer so far."""
    link = this.links[-1]
    links = [*this.links[:-1], link._replace(after=(*link.after, after))]
    return _advance(this, AFTER_STEPS[type(after)], links, new, inplace=inplace)


def _permute(this: Pending, *args: Any, dims: Any = None) -> Any:
    order = dims or (args[0] if len(args) == 1 else args)
    known = this.chain.normalizes and isinstance(order, tuple | list) and len(order) == 4
    return _follow(this, Permute(tuple(d % 4 for d in order))) if known else None


def _layer_norm(
    this: Pending, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    # the block's kernel looks at the channels alone
    if not this.chain.normalizes or len(normalized_shape) != 1 or eps < 0:
        return None
    if normalized_shape[0] != this.links[-1].weight.shape[0]:
        return None
    norm = LayerNorm(weight, bias, eps)
    return _follow(this, norm, [t for t in (weight, bias) if t is not None])


def _add(*, inplace: bool) -> Callable[..., Any]:
    def step(this: Pending, other: Any, **options: Any) -> Any:
        adds = other is this.x and not options
        return _follow(this, Residual(inplace), inplace=inplace) if adds else None

    return step


def _mul(this: Pending, other: Any, **options: Any) -> Any:
    """Scale what a mean was taken of, unless it changed since; or multiply by layer scale."""
    if options:
        return None
    if this.chain.normalizes:
        return _follow(this, LayerScale(other), [other]) if type(other) in PLAIN_TYPES else None
    if type(other) is not Pending or other.value is not None:
        return None
    scaled, factors = (this, other) if this.origin is None else (other, this)
    if factors.origin is None or factors.origin[0] is not scaled or factors.origin[1] is not scaled.links:
        return None
    links = [*factors.links[:-1], factors.links[-1]._replace(role="excite")]
    result = _advance(factors, "scale", links)
    if type(result) is Pending:
        result.origin = None
    return result


def _dropout(this: Pending, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return this if p == 0 or (not training and 0 < p <= 1) else None


_DIMENSIONS: set[Any] = {Tensor.dim, Tensor.ndim.__get__}  # type: ignore[attr-defined]
_ADDITIONS = torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__
_PRODUCTS = torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__
_SYMMETRIC = {*_ADDITIONS, *_PRODUCTS}
_STEPS: dict[Any, Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _activation("relu")),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _activation("relu", changes=True)),
    F.gelu: _activation("gelu"),
    F.silu: _activation("silu"),
    F.relu6: _activation("relu6"),
    F.hardtanh: _hardtanh,  # of nn.ReLU6
    F.hardswish: _activation("hardswish"),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid), _activation("sigmoid")),
    **dict.fromkeys((torch.sigmoid_, Tensor.sigmoid_), _activation("sigmoid", changes=True)),
    F.hardsigmoid: _activation("hardsigmoid"),
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    **dict.fromkeys(_PRODUCTS, _mul),
    **dict.fromkeys(_ADDITIONS, _add(inplace=False)),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add(inplace=True)),
    **dict.fromkeys((torch.permute, Tensor.permute), _permute),
    F.layer_norm: _layer_norm,
    **dict.fromkeys((F.dropout, F.dropout2d), _dropout),
}


def conv_link(weight: Tensor, bias: Tensor | None, *geometry: Any) -> Link:
    """Return the link of a convolution, whose stride, padding and dilation may be one number each."""
    *pairs, groups = geometry
    return Link(weight, bias, (*((v, v) if isinstance(v, int) else v for v in pairs), groups))


def _versions(tensors: list[Tensor]) -> list[tuple[Tensor, int]]:
    return [(t, t._version) for t in tensors if not t.is_inference()]


def _check_versions(this: Pending) -> None:
    """Raise if a tensor that a value depends on was changed before the value was computed."""
    if any(t._version != version for t, version in this.versions):
        raise UserError(
            "the input or a weight of a fused layer was changed in place before the layer's result was used, "
            "too late to compute it: use the model as it was before nin.fuse"
        )


def _check_no_function(this: Pending) -> None:
    """Raise if a value is computed in the forward of a custom autograd function that got it as its argument.

    The function was given what has no gradients, and would cut them off without a word.
    """
    forwards, classes = {}, torch.autograd.Function.__subclasses__()
    for cls in classes:
        classes += cls.__subclasses__()
        forwards[getattr(cls.forward, "__code__", None)] = cls.__name__
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code in forwards and any(value is this for value in tree_leaves([*frame.f_locals.values()])):
            raise UserError(
                f"the result of a fused layer went into the autograd function {forwards[frame.f_code]}, and did not "
                "when the model was fused: call nin.fuse again on the model as it is now"
            )
        frame = frame.f_back


def _modes(x: Tensor) -> tuple[Any, ...]:
    """Return what decides about gradients and dtypes besides the tensors."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), casts, dtype


@contextlib.contextmanager
def _restored(modes: tuple[Any, ...], device: str) -> Any:
    """Return to the modes in which the first layer was called."""
    grad, inference, casts, dtype = modes
    with contextlib.ExitStack() as stack:
        if casts != torch.is_autocast_enabled(device) or dtype is not None:
            stack.enter_context(torch.autocast(device, dtype, enabled=casts))
        if inference != torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        yield
