"""The mathematics of narrowing: the best low-rank forms and the best channels, from covariances in float64.

Throughout, ``x`` is a patch with covariance ``C``, ``y = A x`` what a layer should give, and the error that is made
least is ``tr(G · Cov(y - ŷ))``, where G says how much the network's result depends on each direction of y.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nin.errors import UserError

# Covariances of fewer samples than values are singular; a share of their mean variance is added to the diagonal.
RIDGE = 1e-5

# Times the mean variance, which no rounding error of a finite covariance reaches.
LARGEST_RIDGE = 1e12

# The least weight of a direction of y, as a share of the mean: no direction is free to be lost.
LEAST_WEIGHT = 0.01

# A layer that a fit would bring nearer by a smaller share of its variance is left as it is: float32 rounds as much in a
# deep network, and in directions that the images hardly show a fit to it would be many times as large.
ROUNDING = 1e-9


def with_ridge(covariance: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return C + ridge · mean(|diag C|) · I."""
    level = covariance.diagonal().abs().mean().clamp_min(1e-30)
    return covariance + ridge * level * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def fit(weight: Tensor, xx: Tensor, yx: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the least-squares map from x to y, drawn towards ``weight`` where the samples do not say.

    ``A = W + (Cov(y, x) - W C) (C + εI)⁻¹``; W where y is W x but for rounding.
    """
    given = weight @ xx
    missing = yx - given
    change = torch.cholesky_solve(missing.mT, cholesky(xx, ridge)).mT
    if float((missing * change).sum()) <= ROUNDING * float((given * weight).sum()):
        return weight
    return weight + change


def root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric root of G, with the least weight added, and its inverse."""
    level = gram.diagonal().mean().clamp_min(1e-300)
    values, vectors = torch.linalg.eigh(gram / level)
    values = values.clamp_min(0) + LEAST_WEIGHT
    scale = level.sqrt()
    return (vectors * values.sqrt()) @ vectors.mT * scale, (vectors * values.rsqrt()) @ vectors.mT / scale


@dataclasses.dataclass(frozen=True)
class OutputForm:
    """The spectrum of a layer's weighted result; see `output_form`."""

    vectors: Tensor  # (C_out, C_out), the strongest direction first
    unweighted: Tensor  # the inverse root of G

    def bases(self, rank: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (U, V) of shapes (C_out, rank) and (rank, C_out): ``ŷ = U V y``."""
        kept = self.vectors[:, :rank]
        return self.unweighted @ kept, kept.mT @ weights


def output_form(yy: Tensor, roots: tuple[Tensor, Tensor]) -> OutputForm:
    """Return the principal components of a result: the global optimum of a rank-r linear layer.

    Args:
        yy: Cov(y), (C_out, C_out).
        roots: the root of G and its inverse.
    """
    _, vectors = torch.linalg.eigh(roots[0] @ yy @ roots[0])
    return OutputForm(vectors.flip(1), roots[1])


def output_losses(yy: Tensor, weights: Tensor) -> Tensor:
    """Return what `output_form` loses by keeping 0, 1, … C_out directions: (C_out + 1,).

    Args:
        yy: Cov(y), (C_out, C_out).
        weights: the root of G.
    """
    values = torch.linalg.eigvalsh(weights @ yy @ weights).clamp_min(0)  # ascending
    return torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)


def input_directions(weight: Tensor, xx: Tensor, taps: int, weights: Tensor) -> Tensor:
    """Return directions of the input channels, the most useful first, for `InputForm`.

    ``V`` = left singular vectors of ``Σ^½ W₍I₎``, with Σ the covariance of the channels and W₍I₎ (C_in, C_out · k²);
    the rows of ``Vᵀ Σ^-½``.
    """
    channels = xx.shape[0] // taps
    sigma = xx.view(channels, taps, channels, taps).diagonal(dim1=1, dim2=3).sum(-1)  # (C_in, C_in)
    values, vectors = torch.linalg.eigh(sigma)
    values = values.clamp_min(values[-1].clamp_min(1e-30) * 1e-7)
    unfolded = (weights @ weight).view(-1, channels, taps).transpose(0, 1).reshape(channels, -1)
    shaped = (vectors * values.sqrt()) @ (vectors.mT @ unfolded)
    _, left = torch.linalg.eigh(shaped @ shaped.mT)
    return left.flip(1).mT @ (vectors * values.rsqrt()) @ vectors.mT


def balance(matrices: list[Tensor]) -> list[Tensor]:
    """Return the matrices of a chain of layers with the channels between two of them at the same scale on both sides.

    The first is (r₁, C_in), each following one (rₙ₊₁, rₙ · taps). What a chain gives stays; without it G's scale
    would be in one layer and its inverse in the next, and no learning rate would suit both.
    """
    matrices = list(matrices)
    for i in [*range(len(matrices) - 1)] * 3:  # what balances one pair disturbs the next a little
        rank = len(matrices[i])
        after = matrices[i + 1].view(len(matrices[i + 1]), rank, -1)
        scale = (after.norm(dim=(0, 2)) / matrices[i].norm(dim=1).clamp_min(1e-300)).sqrt()
        scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
        matrices[i] = matrices[i] * scale[:, None]
        matrices[i + 1] = (after / scale[None, :, None]).reshape(len(after), -1)
    return matrices


class InputForm:
    """The best layers behind a 1×1 convolution, for every number of channels that it may leave.

    On ``q = P ∗ x`` with orthonormal rows of P: ``A₀ = W Pᵀ`` are the weights on q when no channel is left out. Behind
    the first ``rank`` channels, ``Â = A₁ + A₂ Q₂₁ (Q₁₁ + εI)⁻¹``, which lets them stand in for the others as far as
    ``Q = Cov(q)`` says that they can; where the images say nothing, W stays, and at full rank it is W again. One
    Cholesky decomposition ``Q + εI = L Lᵀ`` serves all ranks: with ``Z = Lᵀ A₀ᵀ``, ``Â L₁₁ = Z₁ᵀ`` and
    ``Cov(Â q) = Z₁ᵀ Z₁``, where Z₁ are Z's first ``rank · k²`` rows.

    Args:
        weight: (C_out, C_in · k²).
        xx: covariance of the patches.
        taps: k².
        directions: from `input_directions`.
    """

    def __init__(self, weight: Tensor, xx: Tensor, taps: int, directions: Tensor) -> None:
        channels = xx.shape[0] // taps
        self.taps = taps
        self.directions = torch.linalg.qr(directions.mT).Q.mT  # only the space that the rows span matters
        px = (self.directions @ xx.view(channels, -1)).view(channels * taps, -1)
        q = (self.directions @ px.mT.reshape(channels, -1)).view(channels * taps, -1)
        self.lower = cholesky((q + q.mT) / 2, 1e-9)
        on_q = (self.directions @ weight.mT.reshape(channels, -1)).view(channels * taps, -1)  # A₀ᵀ
        self.solved = self.lower.mT @ on_q  # Z (C_in · k², C_out)

    def fitted(self, rank: int) -> Tensor:
        """Return ``Cov(Â q)``, (C_out, C_out), behind ``rank`` channels."""
        z = self.solved[: rank * self.taps]
        return z.mT @ z

    def layers(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return P (rank, C_in) and Â (C_out, rank · k²)."""
        size = rank * self.taps
        core = torch.linalg.solve_triangular(self.lower[:size, :size].mT, self.solved[:size], upper=True)
        return self.directions[:rank], core.mT


def cholesky(covariance: Tensor, ridge: float) -> Tensor:
    """Return L of ``C + εI = L Lᵀ``: ε is ``ridge`` times the mean variance, or ten times as much until it succeeds.

    The difference of two large numbers can leave nothing but rounding errors of a variance, and more of them beside the
    diagonal than on it: then ε becomes larger than the mean variance, and what is fitted stays as it was.

    Raises:
        UserError: C has values that are not finite.
    """
    while ridge < LARGEST_RIDGE:
        lower, failed = torch.linalg.cholesky_ex(with_ridge(covariance, ridge))
        if not int(failed):
            return lower
        ridge *= 10
    raise UserError("a covariance must be finite, got NaN or infinity: check the model and the images")


@dataclasses.dataclass(frozen=True)
class Elimination:
    """Channels in the order in which they can be spared, the first to go first.

    Attributes:
        order: (C_in - least,) channel numbers.
        losses: (C_in - least + 1,) what is lost after 0, 1, … of them are gone.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]

    def kept(self, count: int, channels: int) -> Tensor:
        """Return the channels that are left when ``count`` of ``channels`` stay, ascending."""
        gone = set(self.order[: channels - count])
        return torch.tensor([c for c in range(channels) if c not in gone])


def eliminate(weight: Tensor, xx: Tensor, taps: int, weights: Tensor, least: int = 1) -> Elimination:
    """Take away input channels one after the other, refitting the rest by least squares each time.

    With ``H = C⁻¹`` of the channels that are left and B their coefficients, taking away channel g loses
    ``tr(G · B_g H_gg⁻¹ B_gᵀ)``, and the rest become ``B - B_g H_gg⁻¹ H_g:`` and ``H - H_:g H_gg⁻¹ H_g:``. Of more than
    128 channels several go at a time, which changes little and takes a fraction of the time.

    Args:
        weight: A (C_out, C_in · k²).
        xx: C.
        taps: k².
        weights: the root of G.
        least: channels that are left in the end.

    Source:
        The step is that of optimal brain surgeon, with one layer's exact quadratic error: Hassibi, Stork, Wolff:
        Optimal brain surgeon and general network pruning, 1993.
    """
    inverse = torch.cholesky_inverse(cholesky(xx, RIDGE))
    coefficients = weights @ weight
    alive = torch.arange(xx.shape[0] // taps, device=xx.device)
    left = torch.ones_like(alive, dtype=torch.bool)  # those that are gone stay as zeros until it pays to move the rest
    remaining, chunk = len(alive), _chunk(len(alive), taps)
    order: list[int] = []
    losses = [0.0]
    while remaining > least:
        going = _least_missed(inverse, coefficients, left, taps, min(chunk, remaining - least))
        gone = (going[:, None] * taps + torch.arange(taps, device=going.device)).flatten()
        block, taken = inverse[gone][:, gone], coefficients[:, gone]
        lost = taken @ torch.linalg.solve(block, taken.mT)
        solved = torch.linalg.solve(block, inverse[gone])  # (gone, all)
        coefficients.addmm_(taken, solved, alpha=-1)
        inverse.addmm_(inverse[:, gone], solved, alpha=-1)
        coefficients[:, gone] = inverse[:, gone] = inverse[gone] = 0
        inverse[gone, gone] = 1
        left[going], remaining = False, remaining - len(going)
        before, after = losses[-1], losses[-1] + float(lost.trace())
        # within a chunk the loss is laid out evenly
        losses += [before + (after - before) * (i + 1) / len(going) for i in range(len(going))]
        order += alive[going].tolist()
        if remaining <= 0.75 * len(left):
            values = left.repeat_interleave(taps)
            inverse, coefficients = inverse[values][:, values], coefficients[:, values]
            alive, left = alive[left], left[left]
    return Elimination(tuple(order), tuple(losses))


def _chunk(channels: int, taps: int) -> int:
    """Return how many channels go at a time."""
    if channels <= 128:
        return 1
    return max(1, channels // (32 if channels * taps > 2000 else 64))


def _least_missed(inverse: Tensor, coefficients: Tensor, left: Tensor, taps: int, count: int) -> Tensor:
    """Return the positions of the channels whose loss the others make up for best."""
    total = len(left)
    blocks = inverse.view(total, taps, total, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (total, k², k²)
    parts = coefficients.view(-1, total, taps).permute(1, 2, 0)  # (total, k², C_out)
    scores = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return scores.masked_fill(~left, torch.inf).topk(count, largest=False).indices
