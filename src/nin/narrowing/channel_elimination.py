"""Channel pruning by optimal brain surgeon: the order in which input channels can go, and the error after each."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from nin.narrowing.linalg import RIDGE, cholesky


@dataclasses.dataclass(frozen=True)
class ChannelElimination:
    """Units of channels in the order in which they are removed.

    Attributes:
        order: (units - least,) numbers of units.
        losses: of each layer that takes them, (units - least + 1,) errors after 0, 1, … of them are removed, as
            fractions of the variance of its output.
    """

    order: tuple[int, ...]
    losses: tuple[tuple[float, ...], ...]

    def kept(self, count: int, units: int) -> Tensor:
        """Return the units that stay when ``count`` of ``units`` do, ascending."""
        removed = set(self.order[: units - count])
        return torch.tensor([unit for unit in range(units) if unit not in removed])


class ConsumerFit:
    """A layer whose input channels are removed, the rest refitted by least squares after each.

    With ``H = C⁻¹`` of the channels that are left and B their coefficients, removing channels g adds the error
    ``tr(G · B_g H_gg⁻¹ B_gᵀ)``, and the rest become ``B - B_g H_gg⁻¹ H_g:`` and ``H - H_:g H_gg⁻¹ H_g:``.

    Args:
        weight: A (C_out, C_in · k²).
        xx: C.
        taps: k².
        sqrt: the square root of G.
        parts: (units, parts) the input channels that each unit is; every channel is a unit if not given.

    Source:
        The step is that of optimal brain surgeon, with one layer's exact quadratic error: Hassibi, Stork, Wolff:
        Optimal brain surgeon and general network pruning, 1993.
    """

    def __init__(self, weight: Tensor, xx: Tensor, taps: int, sqrt: Tensor, parts: Tensor | None = None) -> None:
        parts = torch.arange(xx.shape[0] // taps)[:, None] if parts is None else parts
        units = patch_indices(parts.flatten().to(xx.device), taps)
        # of channels that are no unit H and B are not needed
        self.inverse = torch.cholesky_inverse(cholesky(xx, RIDGE))[units][:, units]
        self.coefficients = (sqrt @ weight)[:, units]
        self.variance = float((sqrt @ weight @ xx @ weight.mT @ sqrt).trace()) or 1.0
        self.values = torch.arange(len(units), device=xx.device).view(len(parts), -1)  # (units, parts · k²)

    def saliencies(self) -> Tensor:
        """Return the error that removing each unit would add, as a fraction of the variance: (units,)."""
        blocks = self.inverse[self.values[:, :, None], self.values[:, None, :]]
        taken = self.coefficients[:, self.values].permute(1, 2, 0)  # (units, parts · k², C_out)
        return (taken * torch.linalg.solve(blocks, taken)).sum((1, 2)) / self.variance

    def remove(self, units: Tensor) -> float:
        """Remove units, and return the error that this adds; they stay as zeros until `compact`."""
        values, inverse, coefficients = self.values[units].flatten(), self.inverse, self.coefficients
        block, taken = inverse[values][:, values], coefficients[:, values]
        lost = taken @ torch.linalg.solve(block, taken.mT)
        solved = torch.linalg.solve(block, inverse[values])  # (values, all values)
        coefficients.addmm_(taken, solved, alpha=-1)
        inverse.addmm_(inverse[:, values], solved, alpha=-1)
        coefficients[:, values] = inverse[:, values] = inverse[values] = 0
        inverse[values, values] = 1
        return float(lost.trace()) / self.variance

    def compact(self, left: Tensor) -> None:
        """Copy what is left: a mask of the units."""
        rest = torch.ones(len(self.inverse), dtype=torch.bool, device=left.device)
        rest[self.values[~left].flatten()] = False
        self.inverse, self.coefficients = self.inverse[rest][:, rest], self.coefficients[:, rest]
        self.values = (rest.cumsum(0) - 1)[self.values[left]]


def eliminate_channels(fits: list[ConsumerFit], least: int = 1, weights: Iterable[float] = ()) -> ChannelElimination:
    """Remove units greedily, those that add the least error to all layers that take them.

    Of more than 128 units several are removed at a time, which changes little and takes a fraction of the time.

    Args:
        fits: the layers; they are used up.
        least: units that stay in the end.
        weights: of the layers' errors; 1 if not given.
    """
    weights = tuple(weights) or (1.0,) * len(fits)
    alive = torch.arange(len(fits[0].values), device=fits[0].values.device)
    left = torch.ones_like(alive, dtype=torch.bool)  # removed ones stay as zeros until it pays to copy the rest
    remaining, chunk = len(alive), _chunk(len(alive), max(fit.values.shape[1] for fit in fits))
    order: list[int] = []
    losses = [[0.0] for _ in fits]
    while remaining > least:
        total = sum(weight * fit.saliencies() for weight, fit in zip(weights, fits, strict=True))
        assert isinstance(total, Tensor)
        count = min(chunk, remaining - least)
        removed = total.masked_fill(~left, torch.inf).topk(count, largest=False).indices
        for fit, so_far in zip(fits, losses, strict=True):
            before, added = so_far[-1], fit.remove(removed)
            so_far += [before + added * (i + 1) / count for i in range(count)]  # spread evenly within a chunk
        left[removed], remaining = False, remaining - count
        order += alive[removed].tolist()
        if remaining <= 0.75 * len(left):
            for fit in fits:
                fit.compact(left)
            alive, left = alive[left], left[left]
    return ChannelElimination(tuple(order), tuple(map(tuple, losses)))


def patch_indices(channels: Tensor, taps: int) -> Tensor:
    """Return where the values of these input channels lie in a patch: int64 (channels · k²,)."""
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).flatten()


def _chunk(units: int, values: int) -> int:
    """Return how many units of so many values of a patch to remove at a time."""
    if units <= 128:
        return 1
    return max(1, units // (32 if units * values > 2000 else 64))
