"""Chain: convolutions or fully connected layers of a model, computed as one operator or one by one."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin.fusion.link import (
    LAST_AXIS,
    SECOND_AXIS,
    Folded,
    LayerNorm,
    LayerScale,
    Link,
    Permute,
    Residual,
    behind_folded,
    fold,
    run_layers,
    scales_channels,
    squeeze,
)
from nin.ops import inverted_bottleneck, mlpconv
from nin.ops.arguments import output_size
from nin.ops.bottleneck_reference import normalize
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
        steps: what follows each other: "layer" (a convolution or fully connected layer), "norm", an activation, of
            squeeze-and-excitation "mean" before its first layer and "scale" after its second, and in ConvNeXt's order
            the names of `AFTER_STEPS`.
        training: the mode in which it is computed as a chain.
        places: the modules of the chain, and those around them that hold a part of it.
        callers: the code of the forwards that call the first layer, from the nearest to the one that holds the chain.
        form: one of `forms`.
        bottleneck: whether it is [a 1×1 layer,] a depthwise layer, [squeeze-and-excitation,] and a 1×1 layer; or a
            depthwise layer, LayerNorm and two 1×1 or fully connected layers.
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
    def normalizes(self) -> bool:
        """Whether it has ConvNeXt's order, with a LayerNorm."""
        return "layer_norm" in self.steps

    @property
    def forms(self) -> tuple[str, ...]:
        """Those of `CHAIN_FORMS` in which this chain can be computed."""
        splits = self.steps.count("layer") > 1 and self.convolves and not self.bottleneck
        without = {"operator behind the first": not splits, "1×1 operators": not self.bottleneck}
        without["folded"] = self.normalizes
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
        weights = self.folded(links)
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
        if not _is_plain(x, links):
            return False
        if self.normalizes:
            return _is_normalized_block(x, links)
        return _is_bottleneck(x, links) if self.bottleneck else _is_chain(x, links)

    def _run_operator(self, x: Tensor, links: list[Link], weights: Folded) -> Tensor:
        """Run the layers as one operator, or as the form says; an inverted bottleneck by the operators with kernels."""
        if self.normalizes:
            whole = self.form == "operator" and cpu_bottleneck.serves(x)
            return _run_normalized_block(x, links, weights, whole=whole)
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

    def folded(self, links: list[Link]) -> Folded:
        """Return weight (C_out, C_in, kH, kW) and bias (C_out,) of each layer, with BatchNorm folded into them."""
        behind_each = behind_folded(links)
        behind = [t for tensors in behind_each for t in tensors]
        if not behind or (torch.is_grad_enabled() and any(t.requires_grad for t in behind)):
            return fold(links)
        kernels = cpu_dispatch.KERNELS
        content = None if kernels is None else hash_tensors(kernels, behind)
        if (
            kernels is None or content is None
        ):  # on a GPU: the few small kernels of folding are launched faster than values come back
            return fold(links)
        state = content, tuple((link.norm and link.norm.eps, link.optional()) for link in links)
        kept = self._folded
        if kept is None or kept[0] != state:
            # ordinary tensors, whoever asks first: those made in inference mode could not be used outside it
            with torch.inference_mode(False), torch.no_grad():
                # another thread may write to the tensors meanwhile, and back: what is folded must be what was hashed
                copies = [link.clone() for link in links]
                folded = [(w.contiguous(memory_format=_format(w)), b) for w, b in fold(copies)]
            kept = state, folded
            copied = [t for tensors in behind_folded(copies) for t in tensors]
            if hash_tensors(kernels, behind, copied) == content:
                for tensors, (weight, _) in zip(behind_each, folded, strict=True):
                    if tensors:
                        mark_constant(weight)
                self._folded = kept
        # layers into which nothing is folded as they are now, the others as they were folded
        now = [(_four_axes(link.weight), link.bias) for link in links]
        return [f if tensors else n for n, f, tensors in zip(now, kept[1], behind_each, strict=True)]

    def __repr__(self) -> str:
        """Return the steps and the form."""
        return f"Chain({' → '.join(self.steps)}, {self.form})"


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


def _run_normalized_block(x: Tensor, links: list[Link], weights: Folded, *, whole: bool) -> Tensor:
    """Run a block in ConvNeXt's order, whose weights hold LayerNorm's and the scale.

    Args:
        x: its input.
        links: its layers.
        weights: folded.
        whole: as one operator, else the two layers behind the norm as one.
    """
    depthwise, last = links[0], links[-1]
    geometry = dict(zip(("stride", "padding", "dilation"), depthwise.geometry, strict=False))
    names = [link.activation for link in links]
    norm, scale = depthwise.layer_norm(), last.layer_scale()
    assert norm is not None  # as `_is_normalized_block` saw
    sums = [step for step in last.after if isinstance(step, Residual)]
    casts = torch.is_autocast_enabled(x.device.type)  # x may be of another dtype than the result
    ws, bs = [w for w, _ in weights], [b for _, b in weights]
    if whole:
        added = bool(sums) and not casts
        y = inverted_bottleneck(x, ws, bs, activation=names, residual=added, norm_eps=norm.eps, **geometry)
        sums = [] if added else sums
    else:
        y = activate(F.conv2d(x, ws[0], bs[0], *depthwise.geometry), names[0])
        y = normalize(y, norm.eps)
        inside, name = (names[1], "none") if names[1] in ACTIVATIONS else ("none", names[1])
        if name == "none":
            y = mlpconv(y, ws[1:], bs[1:], activation=(inside, "none"))
        else:
            y = activate(mlpconv(y, ws[1:2], bs[1:2], activation="none"), name)
            y = mlpconv(y, ws[2:], bs[2:], activation="none")
        y = activate(y, names[2])
    if casts and scale is not None:
        y = y.to(torch.promote_types(y.dtype, scale.factors.dtype))
    for step in sums:
        y = step(y, x)
    return y


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


def _is_normalized_block(x: Tensor, links: list[Link]) -> bool:
    """Return whether the layers are a block in ConvNeXt's order, with the channels where each of its steps has them."""
    depthwise, up, down = links
    channels, out = x.shape[1], down.weight.shape[0]
    if (
        depthwise.geometry[3] != channels
        or depthwise.weight.shape[:2] != (channels, 1)
        or not _reaches(x, depthwise)
        or up.weight.shape[1] != channels
        or down.weight.shape[1] != up.weight.shape[0]
        or down.activation != "none"
        or any(link.norm is not None for link in links)
    ):
        return False
    is_last, norms = False, 0
    for i, link in enumerate(links):
        if i > 0 and (bool(link.geometry) == is_last or (link.geometry and not _is_pointwise(link))):
            return False
        for step in link.after:
            match step:
                case Permute(dims) if dims == (SECOND_AXIS if is_last else LAST_AXIS):
                    is_last = not is_last
                case LayerNorm(weight, bias) if is_last and i == 0:
                    norms += 1
                    if any(t is not None and t.shape != (channels,) for t in (weight, bias)):
                        return False
                case LayerScale(factors) if i == 2 and scales_channels(factors, out, last=is_last):
                    pass
                case Residual() if i == 2 and not is_last and step is link.after[-1]:
                    if channels != out or not _keeps_size(x, depthwise):
                        return False
                case _:
                    return False
    return not is_last and norms == 1


def _keeps_size(x: Tensor, link: Link) -> bool:
    """Return whether a convolution's result has as many lines and columns as its input."""
    sizes = zip(x.shape[2:], link.weight.shape[2:], *link.geometry[:3], strict=True)
    return all(output_size(size, k, *geometry) == size for size, k, *geometry in sizes)


def _four_axes(weight: Tensor) -> Tensor:
    """Return the weight of a layer as a convolution's."""
    return weight[:, :, None, None] if weight.dim() == 2 else weight


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


def _format(weight: Tensor) -> torch.memory_format:
    """Return the memory format of a weight, in which its packed copy can be kept."""
    return torch.contiguous_format if weight.is_contiguous() else torch.channels_last
