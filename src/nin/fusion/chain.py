"""One chain of layers that runs as one operator, beside the layers that it stands for."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin.ops import mlpconv

# How a chain can be computed: one operator; its first convolution by PyTorch and the rest as one operator; PyTorch's
# layers with BatchNorm folded into them; PyTorch's layers as they are.
FORMS = ("operator", "operator behind the first", "folded", "original")

_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclasses.dataclass
class Link:
    """A convolution or fully connected layer, with what follows it up to the next one.

    Attributes:
        layer: ``nn.Conv2d`` or ``nn.Linear``.
        norm: the BatchNorm behind it, or None.
        activation: "none", "relu", "gelu" or "silu".
    """

    layer: nn.Conv2d | nn.Linear
    norm: nn.BatchNorm2d | None = None
    activation: str = "none"


class Chain(nn.Module):
    """Convolutions, 1×1 from the second on, or fully connected layers at every place, as one operator.

    It owns no parameters: the layers stay where the model has them, with their names, and this module looks at them.
    BatchNorm is folded into weights that are computed again when one of the tensors behind them has changed.

    Args:
        links: the layers, in their order.
        path: under which the model has this chain, from the top.
        form: one of `forms`.
    """

    def __init__(self, links: list[Link], path: str = "", form: str = "operator") -> None:
        super().__init__()
        self.links = links  # in a plain list: not registered a second time
        self.path, self.form = path, form
        self._folded: list[tuple[Tensor, Tensor | None]] = []
        self._folded_from: tuple[object, ...] = ()

    @property
    def forms(self) -> tuple[str, ...]:
        """Those of `FORMS` that this chain has."""
        splits = len(self.links) > 1 and isinstance(self.links[0].layer, nn.Conv2d)
        return tuple(form for form in FORMS if splits or form != "operator behind the first")

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers would return for ``x``: (N, C, H, W), or (…, C) for fully connected ones."""
        convolves = isinstance(self.links[0].layer, nn.Conv2d)
        norms = [link.norm for link in self.links if link.norm is not None]
        learns_statistics = any(norm.training for norm in norms)
        odd_input = x.dim() != 4 if convolves else x.numel() == 0
        # A compiled graph cannot keep folded weights from call to call, and they would be packed anew in each
        # (ResNet-50 at batch 1: 68 ms, compiled alone 31); the compiler makes one pass of BatchNorm and ReLU itself.
        compiled_norms = bool(norms) and torch.compiler.is_compiling()
        if self.form == "original" or learns_statistics or odd_input or compiled_norms:
            return self.run_original(x)
        weights = self.weights()
        if self.form == "folded":
            return self.run_folded(x, weights)
        if convolves:
            return self.run_operator(x, weights)
        places = x.reshape(-1, x.shape[-1])  # (P, C): an image of P × 1 pixels with its channels side by side
        y = self.run_operator(places[None, :, None].permute(0, 3, 1, 2), weights)  # (1, C', P, 1)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], y.shape[1])

    def run_original(self, x: Tensor) -> Tensor:
        """Run the layers one after the other."""
        for link in self.links:
            x = link.layer(x)
            # as its base class does it: a subclass may have the activation in it
            x = _ACTIVATIONS[link.activation](x if link.norm is None else nn.BatchNorm2d.forward(link.norm, x))
        return x

    def run_folded(self, x: Tensor, weights: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Run the layers one after the other, BatchNorm folded."""
        for link, (weight, bias) in zip(self.links, weights, strict=True):
            if isinstance(link.layer, nn.Conv2d):
                x = link.layer._conv_forward(x, weight, bias)
            else:
                x = F.linear(x, weight.flatten(1), bias)
            x = _ACTIVATIONS[link.activation](x)
        return x

    def run_operator(self, x: Tensor, weights: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Run all layers as one operator, or all but the first."""
        first, links = self.links[0].layer, self.links
        geometry = {}
        if isinstance(first, nn.Conv2d) and self.form == "operator":
            geometry = {"stride": first.stride, "padding": first.padding, "dilation": first.dilation}
        elif isinstance(first, nn.Conv2d):
            x = _ACTIVATIONS[links[0].activation](first._conv_forward(x, *weights[0]))
            links, weights = links[1:], weights[1:]
        activations = [link.activation for link in links]
        return mlpconv(x, [w for w, _ in weights], [b for _, b in weights], activation=activations, **geometry)  # type: ignore[arg-type]

    def weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return (C_out, C_in, kH, kW) and (C_out,) of each layer, BatchNorm folded into them."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return [_fold(link) for link in self.links]
        tensors = [t for link in self.links for t in _tensors(link)]
        now = tuple((id(t), t.data_ptr(), t._version, t.dtype) for t in tensors)
        if now != self._folded_from:
            self._folded, self._folded_from = [_fold(link) for link in self.links], now
        return self._folded

    def extra_repr(self) -> str:
        """Return what ``print`` shows between the brackets."""
        widths = [_widths(self.links[0].layer)[0], *(_widths(link.layer)[1] for link in self.links)]
        return f"{' → '.join(map(str, widths))}, {self.form}"


def _widths(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _tensors(link: Link) -> list[Tensor]:
    """Return everything that the folded weights depend on."""
    found = [link.layer.weight, link.layer.bias]
    if link.norm is not None:
        found += [link.norm.weight, link.norm.bias, link.norm.running_mean, link.norm.running_var]
    return [t for t in found if t is not None]


def _fold(link: Link) -> tuple[Tensor, Tensor | None]:
    """Return weight (C_out, C_in, kH, kW) and bias of a layer with its BatchNorm: γ / √(σ² + ε) · (W x + b − μ) + β."""
    weight, bias, norm = link.layer.weight, link.layer.bias, link.norm
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = (0 if bias is None else bias) - norm.running_mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)
