"""Link: a layer of a chain as it was called, with what follows it, and the weights into which that is folded."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nin.ops.reference import activate


class Norm(NamedTuple):
    """A BatchNorm with fixed statistics: γ / √(σ² + ε) · (x − μ) + β, each tensor (C,)."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Permute(NamedTuple):
    """A permutation of the axes, as between channels first and channels last."""

    dims: tuple[int, ...]

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the result for ``y``; ``x`` is the chain's input, as in the next three."""
        return y.permute(self.dims)


class LayerNorm(NamedTuple):
    """A LayerNorm over the last axis, the channels; weight and bias are (C,) or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the norm of ``y``."""
        return F.layer_norm(y, (y.shape[-1],), self.weight, self.bias, self.eps)


class LayerScale(NamedTuple):
    """A product with a factor for each channel, in a shape that goes with the order of the axes."""

    factors: Tensor

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y`` scaled."""
        return y * self.factors


class Residual(NamedTuple):
    """The addition of the chain's input."""

    inplace: bool

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y`` plus ``x``."""
        return y.add_(x) if self.inplace else y + x


# What may follow the layers of a block with a LayerNorm, and the names of these steps.
After = Permute | LayerNorm | LayerScale | Residual
AFTER_STEPS: dict[type, str] = {
    Permute: "permute",
    LayerNorm: "layer_norm",
    LayerScale: "layer_scale",
    Residual: "residual",
}
LAST_AXIS, SECOND_AXIS = (0, 2, 3, 1), (0, 3, 1, 2)  # of images: where a permutation moves the channels


class Link(NamedTuple):
    """A convolution or fully connected layer as it was called, with what follows it in the chain.

    Attributes:
        weight: (C_out, C_in / groups, kH, kW), or (C_out, C_in) of a fully connected layer.
        bias: (C_out,), or None.
        geometry: stride, padding, dilation and groups; () for a fully connected layer.
        norm: the BatchNorm, or None.
        activation: "none", "relu", "gelu" or "silu"; in an inverted bottleneck, and after the last layer of a chain,
            "relu6" and "hardswish" too.
        role: "squeeze" and "excite": the two layers of squeeze-and-excitation, of which the first gets the mean over
            the image, and the second's result multiplies what the mean was taken of.
        after: what follows the activation, in a block with a LayerNorm.
    """

    weight: Tensor
    bias: Tensor | None
    geometry: tuple[Any, ...]
    norm: Norm | None = None
    activation: str = "none"
    role: str = ""
    after: tuple[After, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the result depends on, besides the input."""
        after = [value for step in self.after for value in step]
        tensors = [self.weight, self.bias, *(self.norm[:4] if self.norm else ()), *after]
        return [t for t in tensors if isinstance(t, Tensor)]

    def clone(self) -> "Link":
        """Return the layer with copies of its tensors."""

        def copies(values: Any) -> Any:
            return type(values)(*(t.clone() if isinstance(t, Tensor) else t for t in values))

        bias = None if self.bias is None else self.bias.clone()
        after = tuple(copies(step) for step in self.after)
        return self._replace(weight=self.weight.clone(), bias=bias, norm=self.norm and copies(self.norm), after=after)

    def layer_norm(self) -> LayerNorm | None:
        """Return the LayerNorm behind it, or None."""
        return next((step for step in self.after if isinstance(step, LayerNorm)), None)

    def layer_scale(self) -> LayerScale | None:
        """Return the layer scale behind it, or None."""
        return next((step for step in self.after if isinstance(step, LayerScale)), None)

    def optional(self) -> tuple[bool, ...]:
        """Return which of the tensors that may be missing are."""
        values = [self.bias, *(self.norm or ()), *(value for step in self.after for value in step)]
        return tuple(value is None for value in values)


Folded = list[tuple[Tensor, Tensor | None]]  # weight (C_out, C_in, kH, kW) and bias of each link


def run_layers(x: Tensor, links: list[Link]) -> Tensor:
    """Run the layers one after the other, as PyTorch's modules do."""
    scaled = y = x
    for link in links:
        if link.role == "squeeze":
            scaled, y = y, squeeze(y)
        if link.geometry:
            stride, padding, dilation, groups = link.geometry
            y = F.conv2d(y, link.weight, link.bias, stride, padding, dilation, groups)
        else:
            y = F.linear(y, link.weight, link.bias)
        if link.norm is not None:
            mean, variance, weight, bias, eps = link.norm
            y = F.batch_norm(y, mean, variance, weight, bias, training=False, momentum=0.0, eps=eps)
        y = activate(y, link.activation)
        if link.role == "excite":
            y = scaled * y
        for step in link.after:
            y = step(y, x)
    return y


def squeeze(x: Tensor) -> Tensor:
    """Return the mean over an image of each channel, (N, C, 1, 1)."""
    return x.mean((2, 3), keepdim=True)


def scales_channels(factors: Tensor, channels: int, *, last: bool) -> bool:
    """Return whether factors, as they broadcast to images, are one for each channel and nothing else."""
    axis = -1 if last else -3
    return -axis <= factors.dim() <= 4 and factors.shape[axis] == factors.numel() == channels


def behind_folded(links: list[Link]) -> list[list[Tensor]]:
    """Return for each layer the tensors of which its folded weight and bias are made; none where nothing is folded."""
    behind = []
    for before, link in zip((None, *links), links, strict=False):
        norm = None if before is None else before.layer_norm()
        affine = [] if norm is None else [t for t in norm[:2] if t is not None]
        folds = link.norm is not None or link.layer_scale() is not None or affine
        behind.append([*link.tensors(), *affine] if folds else [])
    return behind


def fold(links: list[Link]) -> Folded:
    """Return weight (C_out, C_in, kH, kW) and bias of each layer with the norms and the scale around it.

    BatchNorm: ``γ / √(σ² + ε) · (W x + b − μ) + β``; the LayerNorm before it: ``W (γ ⊙ n + β) + b``; layer scale:
    ``γ ⊙ (W x + b)``.
    """
    folded: Folded = []
    for before, link in zip((None, *links), links, strict=False):
        weight, bias = _fold_batch_norm(link)
        dtype, norm, scale = link.weight.dtype, None if before is None else before.layer_norm(), link.layer_scale()
        if norm is not None or scale is not None:  # sums of products: rounded once, whatever the dtype
            wide = torch.promote_types(dtype, torch.float32)
            weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
        if norm is not None:
            if norm.bias is not None:
                shift = (weight * norm.bias[:, None, None]).sum((1, 2, 3))
                bias = shift if bias is None else bias + shift
            weight = weight if norm.weight is None else weight * norm.weight[:, None, None]
        if scale is not None:
            factors = scale.factors.reshape(-1)
            weight, bias = weight * factors[:, None, None, None], None if bias is None else bias * factors
        folded.append((weight.to(dtype), None if bias is None else bias.to(dtype)))
    return folded


def _fold_batch_norm(link: Link) -> tuple[Tensor, Tensor | None]:
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
    return weight * scale.view(-1, 1, 1, 1), shift
