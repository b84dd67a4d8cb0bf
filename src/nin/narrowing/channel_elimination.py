"""Channel pruning by optimal brain surgeon: the order in which input channels can go, and the error after each."""

import dataclasses

import torch
from torch import Tensor

from nin.narrowing.linalg import RIDGE, cholesky


@dataclasses.dataclass(frozen=True)
class ChannelElimination:
    """Channels in the order in which they are removed.

    Attributes:
        order: (C_in - least,) channel numbers.
        losses: (C_in - least + 1,) errors after 0, 1, … of them are removed.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]

    def kept(self, count: int, channels: int) -> Tensor:
        """Return the channels that stay when ``count`` of ``channels`` do, ascending."""
        removed = set(self.order[: channels - count])
        return torch.tensor([c for c in range(channels) if c not in removed])


def eliminate_channels(weight: Tensor, xx: Tensor, taps: int, sqrt: Tensor, least: int = 1) -> ChannelElimination:
    """Remove input channels greedily, refitting the rest by least squares after each.

    With ``H = C⁻¹`` of the channels that are left and B their coefficients, removing channel g adds the error
    ``tr(G · B_g H_gg⁻¹ B_gᵀ)``, and the rest become ``B - B_g H_gg⁻¹ H_g:`` and ``H - H_:g H_gg⁻¹ H_g:``. Of more than
    128 channels several are removed at a time, which changes little and takes a fraction of the time.

    Args:
        weight: A (C_out, C_in · k²).
        xx: C.
        taps: k².
        sqrt: the square root of G.
        least: channels that stay in the end.

    Source:
        The step is that of optimal brain surgeon, with one layer's exact quadratic error: Hassibi, Stork, Wolff:
        Optimal brain surgeon and general network pruning, 1993.
    """
    inverse = torch.cholesky_inverse(cholesky(xx, RIDGE))
    coefficients = sqrt @ weight
    alive = torch.arange(xx.shape[0] // taps, device=xx.device)
    left = torch.ones_like(alive, dtype=torch.bool)  # removed ones stay as zeros until it pays to copy the rest
    remaining, chunk = len(alive), _chunk(len(alive), taps)
    order: list[int] = []
    losses = [0.0]
    while remaining > least:
        removed = _least_salient(inverse, coefficients, left, taps, min(chunk, remaining - least))
        values = patch_indices(removed, taps)
        block, taken = inverse[values][:, values], coefficients[:, values]
        lost = taken @ torch.linalg.solve(block, taken.mT)
        solved = torch.linalg.solve(block, inverse[values])  # (values, all values)
        coefficients.addmm_(taken, solved, alpha=-1)
        inverse.addmm_(inverse[:, values], solved, alpha=-1)
        coefficients[:, values] = inverse[:, values] = inverse[values] = 0
        inverse[values, values] = 1
        left[removed], remaining = False, remaining - len(removed)
        before, after = losses[-1], losses[-1] + float(lost.trace())
        # within a chunk the loss is spread evenly
        losses += [before + (after - before) * (i + 1) / len(removed) for i in range(len(removed))]
        order += alive[removed].tolist()
        if remaining <= 0.75 * len(left):
            rest = left.repeat_interleave(taps)
            inverse, coefficients = inverse[rest][:, rest], coefficients[:, rest]
            alive, left = alive[left], left[left]
    return ChannelElimination(tuple(order), tuple(losses))


def patch_indices(channels: Tensor, taps: int) -> Tensor:
    """Return where the values of these input channels lie in a patch: int64 (channels · k²,)."""
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).flatten()


def _chunk(channels: int, taps: int) -> int:
    """Return how many channels to remove at a time."""
    if channels <= 128:
        return 1
    return max(1, channels // (32 if channels * taps > 2000 else 64))


def _least_salient(inverse: Tensor, coefficients: Tensor, left: Tensor, taps: int, count: int) -> Tensor:
    """Return the positions of the ``count`` channels of least saliency, the error that removing each would add."""
    total = len(left)
    blocks = inverse.view(total, taps, total, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (total, k², k²)
    parts = coefficients.view(-1, total, taps).permute(1, 2, 0)  # (total, k², C_out)
    saliencies = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return saliencies.masked_fill(~left, torch.inf).topk(count, largest=False).indices
