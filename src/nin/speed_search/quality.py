"""How good a combination's answers are: accuracy where there are labels, agreement with the original where not."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Quality:
    """The answers of a combination beside those of the original.

    Attributes:
        images: that were answered.
        agreement: fraction of the images with the same most probable class as the original's.
        divergence: mean Kullback-Leibler divergence of the probabilities from the original's, in nats.
        accuracy: fraction of right answers; None without labels.
        lost: points of accuracy that are lost; without labels, of agreement, which is an upper bound of them.
        lost_error: half of the 95 % interval of ``lost``, in points: both networks see the same images.
    """

    images: int
    agreement: float
    divergence: float
    accuracy: float | None
    lost: float
    lost_error: float


def compare(scores: Tensor, reference: Tensor, labels: Tensor | None) -> Quality:
    """Return the quality of scores (N, classes) beside the original's.

    Args:
        scores: of the combination.
        reference: of the original.
        labels: (N,), or None.

    Source:
        The interval of a difference of two proportions on the same images: Newcombe, 1998, method 10 without its
        correction, the normal approximation of McNemar's table.
    """
    answers, expected = scores.argmax(1), reference.argmax(1)
    same = answers == expected
    logs, reference_logs = (F.log_softmax(values.double(), 1) for values in (scores, reference))
    divergence = F.kl_div(logs, reference_logs, reduction="batchmean", log_target=True).item()
    n = len(scores)
    if labels is None:
        worse, better = int((~same).sum()), 0
        accuracy = None
    else:
        right, was_right = answers == labels, expected == labels
        worse, better = int((was_right & ~right).sum()), int((right & ~was_right).sum())
        accuracy = right.double().mean().item()
    lost = (worse - better) / n
    error = 1.96 * math.sqrt(max(0.0, worse + better - n * lost * lost)) / n
    agreement = same.double().mean().item()
    return Quality(n, agreement, max(0.0, divergence), accuracy, 100 * lost, 100 * error)


def scores_differ(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tables of scores, relative to the largest score."""
    return float(((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item())


def load_scores(path: Path) -> Tensor:
    """Return the scores in a file that a worker wrote."""
    return torch.from_numpy(np.load(path))
