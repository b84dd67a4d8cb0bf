"""Chain: convolutions or fully connected layers of a model, computed as one operator or as they are."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin.ops import ACTIVATIONS, mlpconv

# How a chain can be computed: all of it as one operator; its first convolution by PyTorch and the rest as one operator;
# PyTorch's layers with BatchNorm folded into them; PyTorch's layers as they are.
CHAIN_FORMS = ("operator", "operator behind the first", "folded", "original")


@dataclasses.dataclass
class Link:
    """A convolution or fully connected layer with the BatchNorm and the activation after it.

    Attributes:
        layer: ``nn.Conv2d`` or ``nn.Linear``.
        norm: the BatchNorm behind it, or None.
        activation: "none", "relu", "gelu" or "silu".
    """

    layer: nn.Conv2d | nn.Linear
    norm: nn.BatchNorm2d | None = None
    activation: str = "none"


class Chain(nn.Module):
    """Convolutions, 1×1 from the second on, or fully connected layers on every pixel, as one operator.

    It owns no parameters: it refers to the layers, which stay registered where the model has them. Weights with
    BatchNorm folded into them are cached, and computed again when one of the tensors that they depend on has changed.

    Args:
        links: the layers, in their order.
        path: name of this module in the whole model.
        form: one of `forms`.
    """

    def __init__(self, links: list[Link], path: str = "", form: str = "operator") -> None:
        super().__init__()
        self.links = links  # in a plain list, so that the layers are not registered a second time
        self.path, self.form = path, form
        self._folded: list[tuple[Tensor, Tensor | None]] = []
        self._folded_key: tuple[object, ...] = ()

    @property
    def forms(self) -> tuple[str, ...]:
        """Those of `CHAIN_FORMS` in which this chain can be computed."""
        splits = len(self.links) > 1 and isinstance(self.links[0].layer, nn.Conv2d)
        return tuple(form for form in CHAIN_FORMS if splits or form != "operator behind the first")

    def forward(self, x: Tensor) -> Tensor:
        """Return the result of the layers for ``x``: (N, C, H, W), or (…, C) for fully connected ones."""
        convolves = isinstance(self.links[0].layer, nn.Conv2d)
        norms = [link.norm for link in self.links if link.norm is not None]
        updates_statistics = any(norm.training for norm in norms)
        unsupported_shape = x.dim() != 4 if convolves else x.numel() == 0
        # A compiled graph cannot cache folded weights, and would fold and pack them in every call (ResNet-50 at batch
        # 1: 68 ms, 31 without the chains); the compiler fuses BatchNorm and ReLU into one pass itself.
        compiled_norms = bool(norms) and torch.compiler.is_compiling()
        if self.form == "original" or updates_statistics or unsupported_shape or compiled_norms:
            return self.run_original(x)
        weights = self.weights()
        if self.form == "folded":
            return self.run_folded(x, weights)
        if convolves:
            return self.run_operator(x, weights)
        pixels = x.reshape(-1, x.shape[-1])  # (P, C), to become one image of P × 1 pixels in channels_last
        y = self.run_operator(pixels[None, :, None].permute(0, 3, 1, 2), weights)  # (1, C', P, 1)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], y.shape[1])

    def run_original(self, x: Tensor) -> Tensor:
        """Run the layers one after the other."""
        for link in self.links:
            x = link.layer(x)
            # without the activation that a subclass such as timm's BatchNormAct2d applies: the link has it
            x = ACTIVATIONS[link.activation](x if link.norm is None else nn.BatchNorm2d.forward(link.norm, x))
        return x

    def run_folded(self, x: Tensor, weights: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Run the layers one after the other, with BatchNorm folded into their weights."""
        for link, (weight, bias) in zip(self.links, weights, strict=True):
            if isinstance(link.layer, nn.Conv2d):
                x = link.layer._conv_forward(x, weight, bias)
            else:
                x = F.linear(x, weight.flatten(1), bias)
            x = ACTIVATIONS[link.activation](x)
        return x

    def run_operator(self, x: Tensor, weights: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Run the layers as one operator, without the first in the form "operator behind the first"."""
        first, links = self.links[0].layer, self.links
        geometry = {}
        if isinstance(first, nn.Conv2d) and self.form == "operator":
            geometry = {"stride": first.stride, "padding": first.padding, "dilation": first.dilation}
        elif isinstance(first, nn.Conv2d):
            x = ACTIVATIONS[links[0].activation](first._conv_forward(x, *weights[0]))
            links, weights = links[1:], weights[1:]
        activations = [link.activation for link in links]
        return mlpconv(x, [w for w, _ in weights], [b for _, b in weights], activation=activations, **geometry)  # type: ignore[arg-type]

    def weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return weight (C_out, C_in, kH, kW) and bias (C_out,) of each layer, with BatchNorm folded into them."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return [_fold(link) for link in self.links]
        tensors = [t for link in self.links for t in _tensors(link)]
        # the version counts in-place changes, the pointer and the id tell of assignments, the dtype of .to()
        key = tuple((id(t), t.data_ptr(), t._version, t.dtype) for t in tensors)
        if key != self._folded_key:
            self._folded, self._folded_key = [_fold(link) for link in self.links], key
        return self._folded

    def extra_repr(self) -> str:
        """Return the widths and the form, for ``print``."""
        widths = [self.links[0].layer.weight.shape[1], *(link.layer.weight.shape[0] for link in self.links)]
        return f"{' → '.join(map(str, widths))}, {self.form}"


def _tensors(link: Link) -> list[Tensor]:
    """Return the tensors that the folded weights depend on."""
    tensors = [link.layer.weight, link.layer.bias]
    if link.norm is not None:
        tensors += [link.norm.weight, link.norm.bias, link.norm.running_mean, link.norm.running_var]
    return [t for t in tensors if t is not None]


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
