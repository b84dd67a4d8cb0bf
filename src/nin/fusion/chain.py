"""Chain: convolutions or fully connected layers of a model, computed as one operator or one by one."""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin.ops import inverted_bottleneck, mlpconv
from nin.ops.cpu import bottleneck as cpu_bottleneck
from nin.ops.cpu import dispatch as cpu_dispatch
from nin.ops.cpu.weight_cache import hash_tensors, mark_constant
from nin.ops.reference import ACTIVATIONS, activate

# How a chain can be computed: all of it as one operator; its first convolution by PyTorch and the rest as one operator;
# each 1×1 layer of an inverted bottleneck as one and the depthwise layer by PyTorch; PyTorch's layers with BatchNorm
# folded into them; PyTorch's layers as they are.
CHAIN_FORMS = ("operator", "operator behind the first", "1×1 operators", "folded", "original")

# The tensors of layers whose values are what they seem; subclasses (quantised, distributed) stay with PyTorch.
PLAIN_TYPES = (Tensor, nn.Parameter, nn.Buffer)


class Norm(NamedTuple):
    """A BatchNorm with fixed statistics: γ / √(σ² + ε) · (x − μ) + β, each tensor (C,)."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Link(NamedTuple):
    """A convolution or fully connected layer as it was called, with the BatchNorm and the activation after it.

    Attributes:
        weight: (C_out, C_in / groups, kH, kW), or (C_out, C_in) of a fully connected layer.
        bias: (C_out,), or None.
        geometry: stride, padding, dilation and groups; () for a fully connected layer.
        norm: the BatchNorm, or None.
        activation: "none", "relu", "gelu" or "silu"; in an inverted bottleneck, and after the last layer of a chain,
            "relu6" and "hardswish" too.
        role: "squeeze" and "excite": the two layers of squeeze-and-excitation, of which the first gets the mean over
            the image, and the second's result multiplies what the mean was taken of.
    """

    weight: Tensor
    bias: Tensor | None
    geometry: tuple[Any, ...]
    norm: Norm | None = None
    activation: str = "none"
    role: str = ""

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the result depends on, besides the input."""
        tensors = [self.weight, self.bias, *(self.norm[:4] if self.norm else ())]
        return [t for t in tensors if t is not None]

    def clone(self) -> "Link":
        """Return the layer with copies of its tensors."""
        norm = self.norm and Norm(*(t.clone() if isinstance(t, Tensor) else t for t in self.norm))  # type: ignore[arg-type]
        bias = None if self.bias is None else self.bias.clone()
        return self._replace(weight=self.weight.clone(), bias=bias, norm=norm)


Folded = list[tuple[Tensor, Tensor | None]]  # weight (C_out, C_in, kH, kW) and bias of each link


@dataclasses.dataclass(frozen=True)
class Place:
    """A module in its parent, to see that it still is there and that no hook looks at it."""

    parent: nn.Module
    name: str
    module: nn.Module

    def is_as_before(self) -> bool:
        """Return whether nobody replaced or hooked the module."""
        return self.parent._modules.get(self.name) is self.module and not is_hooked(self.module)


def is_hooked(module: nn.Module) -> bool:
    """Return whether a hook sees a module's input, its output or their gradients, or something runs in its place.

    That is a ``forward`` set on the module itself, or what ``module.compile()`` made.
    """
    return has_hooks(module) or "forward" in module.__dict__ or module._compiled_call_impl is not None


def has_hooks(module: nn.Module) -> bool:
    """Return whether a hook sees a module's input, its output or their gradients."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Chain:
    """Convolutions, 1×1 from the second on, an inverted bottleneck, or fully connected layers on every pixel.

    It holds no weights: its layers are called as the model calls them, and `Pending` collects what they are called
    with, see there. Weights with BatchNorm folded into them are kept until a byte of a tensor behind them changes.

    Args:
        steps: what follows each other: "layer" (a convolution or fully connected layer), "norm", an activation, and of
            squeeze-and-excitation "mean" before its first layer and "scale" after its second.
        training: the mode in which it is computed as a chain.
        places: the modules of the chain, and those around them that hold a part of it.
        callers: the code of the forwards that call the first layer, from the nearest to the one that holds the chain.
        form: one of `forms`.
        bottleneck: whether it is [a 1×1 layer,] a depthwise layer, [squeeze-and-excitation,] and a 1×1 layer.
    """

    def __init__(
        self,
        steps: tuple[str, ...],
        *,
        training: bool = False,
        places: tuple[Place, ...] = (),
        callers: tuple[Any, ...] = (),
        convolves: bool = True,
        form: str = "operator",
        bottleneck: bool = False,
    ) -> None:
        self.steps, self.training, self.places, self.callers = steps, training, places, callers
        self.convolves, self.form, self.bottleneck = convolves, form, bottleneck
        self.seen: tuple[Tensor, list[Link]] | None = None  # the last input and links, while `fuse` measures
        self.watches = False  # whether to note them
        self._folded: tuple[object, Folded] | None = None  # with what it was computed from

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be computed again, for pickles and copies."""
        return {**vars(self), "seen": None, "watches": False, "_folded": None}

    @property
    def forms(self) -> tuple[str, ...]:
        """Those of `CHAIN_FORMS` in which this chain can be computed."""
        splits = self.steps.count("layer") > 1 and self.convolves and not self.bottleneck
        without = {"operator behind the first": not splits, "1×1 operators": not self.bottleneck}
        return tuple(form for form in CHAIN_FORMS if not without.get(form))

    def forms_for(self, x: Tensor) -> tuple[str, ...]:
        """Those of `forms` that differ for an input: a block that has no kernel as a whole runs as "1×1 operators"."""
        same = self.bottleneck and not cpu_bottleneck.serves(x)
        return tuple(form for form in self.forms if not (same and form == "operator"))

    def run(self, x: Tensor, links: list[Link]) -> Tensor:
        """Return the result of the links for ``x``: (N, C, H, W), or (…, C) for fully connected layers."""
        if self.watches:
            self.seen = x.clone(), links
        if self.form == "original" or not self._supports(x, links):
            return run_layers(x, links)
        weights = self._weights(links)
        if self.form == "folded":
            plain = [
                link._replace(weight=w.view_as(link.weight), bias=b, norm=None)
                for link, (w, b) in zip(links, weights, strict=True)
            ]
            return run_layers(x, plain)
        if self.convolves:
            return self._run_operator(x, links, weights)
        pixels = x.reshape(-1, x.shape[-1])  # (P, C), to become one image of P × 1 pixels in channels_last
        y = self._run_operator(pixels[None, :, None].permute(0, 3, 1, 2), links, weights)  # (1, C', P, 1)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], y.shape[1])

    def _supports(self, x: Tensor, links: list[Link]) -> bool:
        """Return whether the operator computes what the layers compute; if not, they run as they are."""
        return _is_plain(x, links) and (_is_bottleneck(x, links) if self.bottleneck else _is_chain(x, links))

    def _run_operator(self, x: Tensor, links: list[Link], weights: Folded) -> Tensor:
        """Run the layers as one operator, or as the form says; an inverted bottleneck by the operators with kernels."""
        if self.bottleneck:
            if self.form != "operator" or not cpu_bottleneck.serves(x):
                return _run_pointwise_operators(x, links, weights)
            geometry = dict(zip(("stride", "padding", "dilation"), _parts(links)[1].geometry, strict=False))
            names = [link.activation for link in links]
            return inverted_bottleneck(
                x, [w for w, _ in weights], [b for _, b in weights], activation=names, **geometry
            )
        geometry = {}
        if self.convolves and self.form == "operator":
            geometry = dict(zip(("stride", "padding", "dilation"), links[0].geometry, strict=False))
        elif self.convolves:
            x = activate(F.conv2d(x, *weights[0], *links[0].geometry), links[0].activation)
            links, weights = links[1:], weights[1:]
        activations = [link.activation for link in links]
        last = "none"
        if activations[-1] not in ACTIVATIONS:
            last, activations[-1] = activations[-1], "none"
        y = mlpconv(x, [w for w, _ in weights], [b for _, b in weights], activation=activations, **geometry)
        return activate(y, last)

    def _weights(self, links: list[Link]) -> Folded:
        """Return weight (C_out, C_in, kH, kW) and bias (C_out,) of each layer, with BatchNorm folded into them."""
        behind = [t for link in links if link.norm is not None for t in link.tensors()]
        if not behind or (torch.is_grad_enabled() and any(t.requires_grad for t in behind)):
            return [_fold(link) for link in links]
        kernels = cpu_dispatch.KERNELS
        content = None if kernels is None else hash_tensors(kernels, behind)
        if (
            kernels is None or content is None
        ):  # on a GPU: the few small kernels of folding are launched faster than values come back
            return [_fold(link) for link in links]
        state = content, tuple(link.norm and (link.norm.eps, _which(link)) for link in links)
        kept = self._folded
        if kept is None or kept[0] != state:
            # ordinary tensors, whoever asks first: those made in inference mode could not be used outside it
            with torch.inference_mode(False), torch.no_grad():
                # another thread may write to the tensors meanwhile, and back: what is folded must be what was hashed
                copies = [link.clone() for link in links]
                folded = [(w.contiguous(memory_format=_format(w)), b) for w, b in map(_fold, copies)]
            kept = state, folded
            copied = [t for link in copies if link.norm is not None for t in link.tensors()]
            if hash_tensors(kernels, behind, copied) == content:
                for link, (weight, _) in zip(links, folded, strict=True):
                    if link.norm is not None:
                        mark_constant(weight)
                self._folded = kept
        # layers without BatchNorm as they are now, the others as they were folded
        return [_fold(link) if link.norm is None else f for link, f in zip(links, kept[1], strict=True)]

    def __repr__(self) -> str:
        """Return the steps and the form."""
        return f"Chain({' → '.join(self.steps)}, {self.form})"


def run_layers(x: Tensor, links: list[Link]) -> Tensor:
    """Run the layers one after the other, as PyTorch's modules do."""
    scaled = x
    for link in links:
        if link.role == "squeeze":
            scaled, x = x, squeeze(x)
        if link.geometry:
            stride, padding, dilation, groups = link.geometry
            x = F.conv2d(x, link.weight, link.bias, stride, padding, dilation, groups)
        else:
            x = F.linear(x, link.weight, link.bias)
        if link.norm is not None:
            mean, variance, weight, bias, eps = link.norm
            x = F.batch_norm(x, mean, variance, weight, bias, training=False, momentum=0.0, eps=eps)
        x = activate(x, link.activation)
        if link.role == "excite":
            x = scaled * x
    return x


def squeeze(x: Tensor) -> Tensor:
    """Return the mean over an image of each channel, (N, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True)


def _run_pointwise_operators(x: Tensor, links: list[Link], weights: Folded) -> Tensor:
    """Run an inverted bottleneck's 1×1 layers as an operator each, and the depthwise layer between them by PyTorch."""
    depthwise, scaled = _parts(links)[1], x
    for link, (weight, bias) in zip(links, weights, strict=True):
        name = link.activation
        if link.role == "squeeze":
            scaled, x = x, squeeze(x)
        if link is depthwise:
            x = F.conv2d(x, weight, bias, *link.geometry)
        else:
            inside, name = (name, "none") if name in ACTIVATIONS else ("none", name)
            x = mlpconv(x, [weight], [bias], activation=inside)
        x = activate(x, name)
        if link.role == "excite":
            x = scaled * x
    return x


def _is_plain(x: Tensor, links: list[Link]) -> bool:
    """Return whether all tensors are ones of PyTorch's that an operator may be given together."""
    if not x.is_floating_point() or (x.numel() == 0 and not links[0].geometry):
        return False
    casts = torch.is_autocast_enabled(x.device.type)
    for link in links:
        for t in link.tensors():
            same = t.device == x.device and (casts or t.dtype == x.dtype) and t.layout == torch.strided
            if type(t) not in PLAIN_TYPES or not same or 0 in t.shape:
                return False
        if (link.bias is not None and link.bias.dim() != 1) or not all(
            isinstance(value, tuple) and len(value) == 2 for value in link.geometry[:3]
        ):
            return False
    return True


def _is_chain(x: Tensor, links: list[Link]) -> bool:
    """Return whether the layers are a chain of `nin.mlpconv`."""
    channels = x.shape[1] if links[0].geometry else x.shape[-1]
    for i, link in enumerate(links):
        if link.weight.shape[1] != channels:
            return False
        channels = link.weight.shape[0]
        if link.geometry and (link.geometry[3] != 1 or not (_reaches(x, link) if i == 0 else _is_pointwise(link))):
            return False
    return True


def _is_bottleneck(x: Tensor, links: list[Link]) -> bool:
    """Return whether the layers are an inverted bottleneck."""
    up, depthwise, excitation, down = _parts(links)
    channels = up[0].weight.shape[0] if up else x.shape[1]
    return (
        all(_is_pointwise(link) and link.geometry[3] == 1 for link in (*up, *excitation, down))
        and all(link.weight.shape[1] == x.shape[1] for link in up)
        and depthwise.geometry[3] == channels == down.weight.shape[1]
        and depthwise.weight.shape[:2] == (channels, 1)
        and _reaches(x, depthwise)
        and (not excitation or _excites(excitation, channels))
    )


def _parts(links: list[Link]) -> tuple[list[Link], Link, list[Link], Link]:
    """Return the layers of an inverted bottleneck: [up], depthwise, [squeeze, excite], down."""
    *up, depthwise, down = [link for link in links if not link.role]
    return up, depthwise, [link for link in links if link.role], down


def _excites(links: list[Link], channels: int) -> bool:
    """Return whether two layers lead from a depthwise layer's channels to a factor for each."""
    first, second = (link.weight.shape for link in links)
    return first[1] == second[0] == channels and first[0] == second[1]


def _is_pointwise(link: Link) -> bool:
    """Return whether a convolution is 1×1, on every pixel and without a border."""
    return ((*link.weight.shape[2:],), *link.geometry[:2]) == ((1, 1), (1, 1), (0, 0))


def _reaches(x: Tensor, link: Link) -> bool:
    """Return whether the padded image is as large as a convolution's kernel."""
    _, padding, dilation, _ = link.geometry
    sizes = zip(x.shape[2:], padding, dilation, link.weight.shape[2:], strict=True)
    return all(size + 2 * p > d * (k - 1) for size, p, d, k in sizes)


def _which(link: Link) -> tuple[bool, ...]:
    """Return which of the optional tensors a link has."""
    norm = link.norm
    return (link.bias is None, *(() if norm is None else (norm.weight is None, norm.bias is None)))


def _format(weight: Tensor) -> torch.memory_format:
    """Return the memory format of a weight, in which its packed copy can be kept."""
    return torch.contiguous_format if weight.is_contiguous() else torch.channels_last


def _fold(link: Link) -> tuple[Tensor, Tensor | None]:
    """Return weight (C_out, C_in, kH, kW) and bias of a layer with its BatchNorm: γ / √(σ² + ε) · (W x + b − μ) + β."""
    weight, bias, norm = link.weight, link.bias, link.norm
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    if norm is None:
        return weight, bias
    scale = torch.rsqrt(norm.variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = (0 if bias is None else bias) - norm.mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)
