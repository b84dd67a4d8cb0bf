"""The search space: the factorisations and the channel counts that each layer may get, and the loss of each."""

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from nin.models.layer_spec import LayerSpec, factorised_layers
from nin.narrowing.channel_elimination import ConsumerFit, eliminate_channels
from nin.narrowing.channel_flow import ChannelGroup
from nin.narrowing.linalg import MatrixRoots, matrix_roots, weighted_variance
from nin.narrowing.low_rank import InputProjection, output_losses
from nin.narrowing.moments import Moments

# A layer of fewer than 128 channels is tried at so many ranks and widths.
SIZES = 16

# A layer keeps at most so many factorisations, evenly spaced on its Pareto front: the knapsack tries each of them in
# every sweep.
MAX_FACTORISATIONS = 24


@dataclasses.dataclass(frozen=True)
class Factorisation:
    """One way to factorise a layer.

    Attributes:
        form: as in `LayerPlan`.
        rank_in: as in `LayerPlan`.
        rank_out: as in `LayerPlan`.
        loss: fraction of the output's variance, weighted by the Fisher information, that is lost.
    """

    form: str = "keep"
    rank_in: int | None = None
    rank_out: int | None = None
    loss: float = 0.0

    def layers(self, spec: LayerSpec, *, inputs: int, outputs: int) -> tuple[LayerSpec, ...]:
        """Return the chain of layers in the place of one, with the channels that pruning leaves of it."""
        return factorised_layers(spec, self.form, self.rank_in, self.rank_out, inputs=inputs, outputs=outputs)


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The choices among which a budget decides.

    Attributes:
        factorisations: by layer; the first is to keep it, the others follow by falling cost.
        widths: by the producer of a group of channels and a consumer of it, the consumer's loss by the number of units
            left, descending.
    """

    factorisations: dict[str, tuple[Factorisation, ...]]
    widths: dict[tuple[str, str], dict[int, float]]

    def weighted(self, weights: dict[str, float]) -> "SearchSpace":
        """Return the choices with the losses of some layers multiplied, by the layer's name."""
        factorisations = {
            name: tuple(dataclasses.replace(f, loss=f.loss * weights.get(name, 1.0)) for f in choices)
            for name, choices in self.factorisations.items()
        }
        widths = {
            pair: {n: loss * weights.get(pair[1], 1.0) for n, loss in losses.items()}
            for pair, losses in self.widths.items()
        }
        return SearchSpace(factorisations, widths)

    def to_json(self) -> str:
        """Return the choices as JSON, for the cache."""
        forms = {name: [dataclasses.astuple(f) for f in value] for name, value in self.factorisations.items()}
        widths = [[*pair, list(losses.items())] for pair, losses in self.widths.items()]
        return json.dumps({"forms": forms, "widths": widths})

    @classmethod
    def from_json(cls, text: str) -> "SearchSpace":
        """Return the choices that `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        factorisations = {name: tuple(Factorisation(*f) for f in value) for name, value in values["forms"].items()}
        widths = {(p, c): {int(n): float(loss) for n, loss in losses} for p, c, losses in values["widths"]}
        return cls(factorisations, widths)


def candidate_sizes(channels: int) -> list[int]:
    """Return the ranks or widths to try below ``channels``, descending.

    Example:
        >>> candidate_sizes(16)[:3], candidate_sizes(512)[:3]
        ([15, 14, 13], [480, 448, 416])
    """
    steps = ((512, 32), (256, 16), (128, 8))  # multiples of 8, which vector instructions like; coarser in wider layers
    step = next((step for width, step in steps if channels >= width), max(1, channels // SIZES))
    return [n for n in range(channels - 1, 0, -1) if n % step == 0]


def factorisation_candidates(
    spec: LayerSpec, weight: Tensor, moments: Moments, sensitivity: Tensor
) -> tuple[Factorisation, ...]:
    """Return the factorisations of a layer on the Pareto front of cost and loss.

    The loss is ``tr(G Cov(y - ŷ)) / tr(G Cov(y))``: G weighs the directions of y, but not one layer against another.
    With the Fisher information's own scale a CIFAR ResNet-20 at 0.6 of its multiply-accumulates kept 75.3 % of right
    answers, with these fractions 79.2 %, with fractions without G 76.9 % (81.3 % before): the Fisher information of a
    layer does not see errors that go on through many positions and layers.

    Args:
        spec: the layer's geometry.
        weight: (C_out, C_in / groups · kH · kW).
        moments: of its patches.
        sensitivity: G (groups, C_out / groups, C_out / groups).
    """
    groups, width = spec.groups, spec.out_channels // spec.groups
    weights = weight.double().view(groups, width, -1)
    xx = moments.shrunk_covariance() if moments.has_patch_covariance else None
    yy = weights @ xx @ weights.mT if xx is not None else moments.covariance("yy")
    roots = [matrix_roots(g) for g in sensitivity]
    variance = weighted_variance(yy, roots) or 1.0
    found = [Factorisation()]
    losses = torch.stack([output_losses(y, g.sqrt) for y, g in zip(yy, roots, strict=True)]).sum(0)
    ranks = candidate_sizes(min(width, spec.patch))
    found += [Factorisation("output", None, rank, float(losses[rank]) / variance) for rank in ranks]
    if xx is not None and groups == 1 and spec.taps > 1:
        found += _input_factorisations(spec, weights[0], xx[0], roots[0], variance)
    return tuple(_pareto_front(spec, found))


def _input_factorisations(
    spec: LayerSpec, weight: Tensor, xx: Tensor, roots: MatrixRoots, variance: float
) -> list[Factorisation]:
    """Return the factorisations that begin with a 1×1 convolution: "input" and "tucker"."""
    projection = InputProjection(weight, xx, spec.taps, roots.sqrt)
    found = []
    ranks_in = candidate_sizes(spec.in_channels)
    for rank_in in ranks_in[:: max(1, len(ranks_in) // 8)]:  # eight of them: each is combined with all output ranks
        kept = output_losses(projection.output_covariance(rank_in), roots.sqrt)
        losses = (variance - kept[0] + kept).clamp_min(0)  # kept[0] is all the variance behind the projection
        found.append(Factorisation("input", rank_in, None, float(losses[-1]) / variance))
        ranks_out = candidate_sizes(min(spec.out_channels, rank_in * spec.taps))
        found += [Factorisation("tucker", rank_in, rank, float(losses[rank]) / variance) for rank in ranks_out]
    return found


def _pareto_front(spec: LayerSpec, factorisations: list[Factorisation]) -> list[Factorisation]:
    """Return those that no other beats in both cost and loss, the layer as it is first, then by falling cost."""

    def cost(factorisation: Factorisation) -> float:
        chain = factorisation.layers(spec, inputs=spec.in_channels, outputs=spec.out_channels)
        # parameters decide between equal multiply-accumulates
        return sum(layer.macs for layer in chain) + 1e-3 * sum(layer.parameters for layer in chain)

    keep, *others = factorisations
    cheaper = [f for f in others if cost(f) < cost(keep)]
    front: list[Factorisation] = []
    for factorisation in sorted(cheaper, key=lambda f: (f.loss, cost(f))):
        if not front or cost(factorisation) < cost(front[-1]):
            front.append(factorisation)
    stride = max(1, -(-len(front) // MAX_FACTORISATIONS))
    return [keep, *front[::stride]]


def width_candidates(
    group: ChannelGroup,
    specs: dict[str, LayerSpec],
    weights: dict[str, Tensor],
    moments: dict[str, Moments],
    sensitivities: dict[str, Tensor],
) -> dict[str, dict[int, float]]:
    """Return the loss of each consumer of a group by how many of its units are left, as in `factorisation_candidates`.

    The units are removed in one order for all consumers.

    Args:
        group: of channels.
        specs: the geometry of the consumers.
        weights: of the consumers, (C_out, C_in · kH · kW).
        moments: of their patches.
        sensitivities: G (1, C_out, C_out) of each.
    """
    sizes = candidate_sizes(group.units)
    if not sizes or not all(moments[name].has_patch_covariance for name in group.consumers):
        return {name: {} for name in group.consumers}
    fits = [
        ConsumerFit(
            weights[name].double(),
            moments[name].shrunk_covariance()[0],
            specs[name].taps,
            matrix_roots(sensitivities[name][0]).sqrt,
            torch.tensor(group.inputs[name]),
        )
        for name in group.consumers
    ]
    losses = eliminate_channels(fits, least=sizes[-1]).losses
    return {
        name: {n: of_name[group.units - n] for n in sizes}
        for name, of_name in zip(group.consumers, losses, strict=True)
    }
