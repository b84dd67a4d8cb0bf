"""Low-rank factorisation of a layer from covariances: PCA of its output, and Tucker-2 with 1×1 convolutions."""

import torch
from torch import Tensor

from nin.narrowing.linalg import MatrixRoots, cholesky


def output_factors(yy: Tensor, roots: MatrixRoots, rank: int) -> tuple[Tensor, Tensor]:
    """Project an output onto its first principal components: the global optimum of a linear layer of that rank.

    Args:
        yy: Cov(y), (C_out, C_out).
        roots: of G, which weighs the directions of y.
        rank: number of components.

    Returns:
        (U, V) of shapes (C_out, rank) and (rank, C_out): ``ŷ = U V y``.
    """
    _, vectors = torch.linalg.eigh(roots.sqrt @ yy @ roots.sqrt)  # ascending
    kept = vectors.flip(1)[:, :rank]
    return roots.inverse_sqrt @ kept, kept.mT @ roots.sqrt


def output_losses(yy: Tensor, sqrt: Tensor) -> Tensor:
    """Return the errors of `output_factors` with 0, 1, … C_out components: (C_out + 1,).

    Args:
        yy: Cov(y), (C_out, C_out).
        sqrt: the square root of G.
    """
    values = torch.linalg.eigvalsh(sqrt @ yy @ sqrt).clamp_min(0)  # ascending
    return torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)


def input_directions(weight: Tensor, xx: Tensor, taps: int, sqrt: Tensor) -> Tensor:
    """Return directions of the input channels for `InputProjection`, the largest part of the output first.

    ``V`` = left singular vectors of ``Σ^½ W₍I₎``, with Σ the covariance of the channels and W₍I₎ (C_in, C_out · k²);
    the rows of ``Vᵀ Σ^-½``. ``sqrt`` is the square root of G.
    """
    channels = xx.shape[0] // taps
    sigma = xx.view(channels, taps, channels, taps).diagonal(dim1=1, dim2=3).sum(-1)  # (C_in, C_in)
    values, vectors = torch.linalg.eigh(sigma)
    values = values.clamp_min(values[-1].clamp_min(1e-30) * 1e-7)  # channels that are always zero have no variance
    unfolded = (sqrt @ weight).view(-1, channels, taps).transpose(0, 1).reshape(channels, -1)
    shaped = (vectors * values.sqrt()) @ (vectors.mT @ unfolded)
    _, left = torch.linalg.eigh(shaped @ shaped.mT)
    return left.flip(1).mT @ (vectors * values.rsqrt()) @ vectors.mT


class InputProjection:
    """A layer as a 1×1 convolution to fewer channels and a k×k one behind it, for every rank at once.

    On ``q = P ∗ x`` with orthonormal rows of P: ``A₀ = W Pᵀ`` are the weights on q at full rank. Behind the first
    ``rank`` channels, ``Â = A₁ + A₂ Q₂₁ (Q₁₁ + εI)⁻¹``, the regression of the others on them with ``Q = Cov(q)``; in
    directions without samples W stays, and at full rank it is W again. One Cholesky decomposition ``Q + εI = L Lᵀ``
    serves all ranks: with ``Z = Lᵀ A₀ᵀ``, ``Â L₁₁ = Z₁ᵀ`` and ``Cov(Â q) = Z₁ᵀ Z₁``, where Z₁ are Z's first
    ``rank · k²`` rows.

    Args:
        weight: (C_out, C_in · k²).
        xx: covariance of the patches.
        taps: k².
        sqrt: the square root of G.
    """

    def __init__(self, weight: Tensor, xx: Tensor, taps: int, sqrt: Tensor) -> None:
        channels = xx.shape[0] // taps
        self.taps = taps
        # orthonormal, so that A₀ is W Pᵀ: of the directions only the spaces that the first of them span matter
        self.directions = torch.linalg.qr(input_directions(weight, xx, taps, sqrt).mT).Q.mT
        px = (self.directions @ xx.view(channels, -1)).view(channels * taps, -1)
        q = (self.directions @ px.mT.reshape(channels, -1)).view(channels * taps, -1)
        self.lower = cholesky((q + q.mT) / 2, 1e-9)
        on_q = (self.directions @ weight.mT.reshape(channels, -1)).view(channels * taps, -1)  # A₀ᵀ
        self.solved = self.lower.mT @ on_q  # Z (C_in · k², C_out)

    def output_covariance(self, rank: int) -> Tensor:
        """Return ``Cov(Â q)``, (C_out, C_out), behind ``rank`` channels."""
        z = self.solved[: rank * self.taps]
        return z.mT @ z

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return P (rank, C_in) and Â (C_out, rank · k²)."""
        size = rank * self.taps
        core = torch.linalg.solve_triangular(self.lower[:size, :size].mT, self.solved[:size], upper=True)
        return self.directions[:rank], core.mT


def balance_scales(matrices: list[Tensor]) -> list[Tensor]:
    """Return the factors of a chain of layers with equal norms on both sides of every channel between them.

    The first is (r₁, C_in), each following one (rₙ₊₁, rₙ · taps). Their product stays. Without it G's scale would be in
    one layer and its inverse in the next, and no learning rate would suit both.
    """
    matrices = list(matrices)
    for i in [*range(len(matrices) - 1)] * 3:  # balancing one pair disturbs the next a little
        rank = len(matrices[i])
        after = matrices[i + 1].view(len(matrices[i + 1]), rank, -1)
        scale = (after.norm(dim=(0, 2)) / matrices[i].norm(dim=1).clamp_min(1e-300)).sqrt()
        scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
        matrices[i] = matrices[i] * scale[:, None]
        matrices[i + 1] = (after / scale[None, :, None]).reshape(len(after), -1)
    return matrices
