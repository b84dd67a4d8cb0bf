"""Linear algebra on covariances in float64: regularised Cholesky, least squares, the weighted error.

Throughout narrowing, ``x`` is an input patch with covariance ``C``, ``y = W x`` the output that is wanted, and the
error that is minimised ``tr(G · Cov(y - ŷ))``, where the Fisher information G weighs each direction of y.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nin.errors import UserError

# Covariances of fewer samples than values are singular; this fraction of their mean variance goes onto the diagonal.
RIDGE = 1e-5

# Times the mean variance, which no rounding error of a finite covariance reaches.
LARGEST_RIDGE = 1e12

# The least weight of a direction of y, as a fraction of the mean: no direction is free to be lost.
LEAST_WEIGHT = 0.01

# A layer whose fit would gain a smaller fraction of its variance keeps its weights: float32 rounds as much in a deep
# network, and in directions that the images hardly show a fit to rounding errors would be many times as large.
ROUNDING = 1e-9


def add_ridge(covariance: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return C + ridge · mean(|diag C|) · I."""
    level = covariance.diagonal().abs().mean().clamp_min(1e-30)
    return covariance + ridge * level * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def cholesky(covariance: Tensor, ridge: float) -> Tensor:
    """Return L of ``C + εI = L Lᵀ``: ε is ``ridge`` times the mean variance, or ten times as much until it succeeds.

    The difference of two large numbers can leave only rounding errors of a variance, with larger ones beside the
    diagonal than on it: then ε becomes larger than the mean variance, and a fit keeps the weights.

    Raises:
        UserError: C has values that are not finite.
    """
    while ridge < LARGEST_RIDGE:
        lower, failed = torch.linalg.cholesky_ex(add_ridge(covariance, ridge))
        if not int(failed):
            return lower
        ridge *= 10
    raise UserError("a covariance must be finite, got NaN or infinity: check the model and the images")


def shrink(covariance: Tensor, shrinkage: Tensor | float) -> Tensor:
    """Return ``(1 - ρ) C + ρ diag(C)``: covariances (…, n, n) of few images, nearer to the truth than C."""
    share = torch.as_tensor(shrinkage, dtype=covariance.dtype, device=covariance.device)[..., None]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1) * share
    return covariance * (1 - share[..., None]) + torch.diag_embed(diagonal)


def least_squares(
    weight: Tensor, xx: Tensor, yx: Tensor, shrinkage: Tensor | float = 0.0, ridge: float = RIDGE
) -> Tensor:
    """Return the least-squares map from x to y, regularised towards ``weight``.

    ``A = W + (1 - ρ) (Cov(y, x) - W C) (C_ρ + εI)⁻¹`` with ``C_ρ = (1 - ρ) C + ρ diag(C)``, see
    `nin.narrowing.moments.Moments.shrinkage`; W itself where y is W x up to rounding.
    """
    expected = weight @ xx
    residual = (yx - expected) * (1 - shrinkage)
    change = torch.cholesky_solve(residual.mT, cholesky(shrink(xx, shrinkage), ridge)).mT
    if float((residual * change).sum()) <= ROUNDING * float((expected * weight).sum()):
        return weight
    return weight + change


class MatrixRoots(NamedTuple):
    """The symmetric square root of a matrix and its inverse."""

    sqrt: Tensor
    inverse_sqrt: Tensor


def matrix_roots(gram: Tensor) -> MatrixRoots:
    """Return the square roots of G with `LEAST_WEIGHT` added to its eigenvalues."""
    level = gram.diagonal().mean().clamp_min(1e-300)
    values, vectors = torch.linalg.eigh(gram / level)
    values = values.clamp_min(0) + LEAST_WEIGHT
    scale = level.sqrt()
    return MatrixRoots((vectors * values.sqrt()) @ vectors.mT * scale, (vectors * values.rsqrt()) @ vectors.mT / scale)


def weighted_variance(covariances: Tensor, roots: list[MatrixRoots]) -> float:
    """Return ``tr(G · Cov)``, summed over the groups of a layer: covariances (groups, width, width)."""
    return sum(float((g.sqrt @ c @ g.sqrt).trace()) for g, c in zip(roots, covariances, strict=True))
