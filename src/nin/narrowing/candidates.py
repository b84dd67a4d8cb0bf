"""What could be done to each layer, and what it would lose: the choices among which a budget decides."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from nin.models.layer_shape import LayerShape, factors
from nin.narrowing.dependency_graph import Edge
from nin.narrowing.low_rank import InputForm, eliminate, input_directions, output_losses, root
from nin.narrowing.moments import Moments

# Ranks and widths are tried in this many steps, but no finer than `step`.
STEPS = 16

# A layer keeps at most this many low-rank candidates: the cheapest for what they lose.
MOST_FORMS = 24


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to factorise a layer.

    Attributes:
        form: as in `LayerPlan`.
        rank_in: as in `LayerPlan`.
        rank_out: as in `LayerPlan`.
        loss: share of the layer's variance, weighted by what it matters, that is lost.
    """

    form: str = "keep"
    rank_in: int | None = None
    rank_out: int | None = None
    loss: float = 0.0


@dataclasses.dataclass(frozen=True)
class Candidates:
    """All choices.

    Attributes:
        forms: by layer; the first is to keep it.
        widths: by edge (producer and consumer): the consumer's loss by the number of channels left, descending.
    """

    forms: dict[str, tuple[Form, ...]]
    widths: dict[tuple[str, str], dict[int, float]]

    def to_json(self) -> str:
        """Return the choices as JSON, for a cache."""
        forms = {name: [dataclasses.astuple(f) for f in value] for name, value in self.forms.items()}
        widths = [[*edge, list(losses.items())] for edge, losses in self.widths.items()]
        return json.dumps({"forms": forms, "widths": widths})

    @classmethod
    def from_json(cls, text: str) -> Candidates:
        """Return the choices that `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        forms = {name: tuple(Form(*f) for f in value) for name, value in values["forms"].items()}
        widths = {(p, c): {int(n): float(loss) for n, loss in losses} for p, c, losses in values["widths"]}
        return cls(forms, widths)


def step(channels: int) -> int:
    """Return the distance of the widths that are tried: multiples of 8 for wide layers, which processors like."""
    if channels >= 512:
        return 32
    if channels >= 256:
        return 16
    return 8 if channels >= 128 else max(1, channels // STEPS)


def counts(channels: int) -> list[int]:
    """Return the widths that are tried below ``channels``, descending.

    Example:
        >>> counts(16)[:3], counts(512)[:3]
        ([15, 14, 13], [480, 448, 416])
    """
    size = step(channels)
    return [n for n in range(channels - 1, 0, -1) if n % size == 0]


def find_forms(shape: LayerShape, weight: Tensor, moments: Moments, sensitivity: Tensor) -> tuple[Form, ...]:
    """Return the factorisations of a layer that cost less, with what each would lose.

    The loss is ``tr(G Cov(y - ŷ)) / tr(G Cov(y))``: G says which directions of y matter, but not how much one layer
    matters beside another. With the Fisher information's own sizes a CIFAR ResNet-20 at 0.6 of its
    multiply-accumulates kept 75.3 % of right answers, with these shares 79.2 %, with shares without G 76.9 %
    (81.3 % before): what a network loses by errors that go on through many places and layers is not in them.

    Args:
        shape: the layer's geometry.
        weight: (C_out, C_in / groups · kH · kW).
        moments: of its patches.
        sensitivity: G (groups, C_out / groups, C_out / groups).
    """
    groups, width = shape.groups, shape.out_channels // shape.groups
    blocks = weight.double().view(groups, width, -1)
    xx = moments.covariance("xx") if moments.full else None
    yy = blocks @ xx @ blocks.mT if xx is not None else moments.covariance("yy")
    roots = [root(sensitivity[g]) for g in range(groups)]
    whole = sum(float((roots[g][0] @ yy[g] @ roots[g][0]).trace()) for g in range(groups)) or 1.0
    found = [Form()]
    spectra = [output_losses(yy[g], roots[g][0]) for g in range(groups)]
    lost = torch.stack(spectra).sum(0)
    found += [Form("output", None, r, float(lost[r]) / whole) for r in counts(min(width, shape.patch))]
    if xx is not None and groups == 1 and shape.taps > 1:
        found += _input_forms(shape, blocks[0], xx[0], roots[0], whole)
    return tuple(_worthwhile(shape, found))


def _input_forms(
    shape: LayerShape, weight: Tensor, xx: Tensor, roots: tuple[Tensor, Tensor], whole: float
) -> list[Form]:
    """Return the forms that begin with a 1×1 convolution."""
    behind = InputForm(weight, xx, shape.taps, input_directions(weight, xx, shape.taps, roots[0]))
    found = []
    tried = counts(shape.in_channels)
    for rank in tried[:: max(1, len(tried) // 8)]:
        kept = output_losses(behind.fitted(rank), roots[0])
        lost = (whole - kept[0] + kept).clamp_min(0)
        found.append(Form("input", rank, None, float(lost[-1]) / whole))
        found += [
            Form("tucker", rank, r, float(lost[r]) / whole) for r in counts(min(shape.out_channels, rank * shape.taps))
        ]
    return found


def _worthwhile(shape: LayerShape, forms: list[Form]) -> list[Form]:
    """Return the forms that no other beats in both multiply-accumulates and loss, the layer as it is first."""

    def price(form: Form) -> float:
        chain = factors(
            shape, form.form, form.rank_in, form.rank_out, inputs=shape.in_channels, outputs=shape.out_channels
        )
        return sum(piece.macs for piece in chain) + 1e-3 * sum(piece.parameters for piece in chain)

    limit = price(forms[0])
    best: list[Form] = []
    for form in sorted((f for f in forms[1:] if price(f) < limit), key=lambda f: (f.loss, price(f))):
        if not best or price(form) < price(best[-1]):
            best.append(form)
    stride = max(1, -(-len(best) // MOST_FORMS))
    return [forms[0], *best[::stride]]


def find_widths(
    edge: Edge, consumer: LayerShape, weight: Tensor, moments: Moments, sensitivity: Tensor
) -> dict[int, float]:
    """Return what is lost by leaving out channels between two layers, by how many are left; see `find_forms`.

    Args:
        edge: the two layers.
        consumer: geometry of the one that looks at the channels.
        weight: of the consumer, (C_out, C_in · kH · kW).
        moments: of the consumer's patches.
        sensitivity: G of the consumer, (1, C_out, C_out).
    """
    if not moments.full:
        return {}
    tried = counts(consumer.in_channels)
    if not tried:
        return {}
    weights = root(sensitivity[0])[0]
    weight, xx = weight.double(), moments.covariance("xx")[0]
    path = eliminate(weight, xx, consumer.taps, weights, least=tried[-1])
    whole = float((weights @ weight @ xx @ weight.mT @ weights).trace()) or 1.0
    return {n: path.losses[consumer.in_channels - n] / whole for n in tried}
