"""Figures of a classifier from its scores: accuracy, of each class, balanced, macro-F1, top-5, calibration."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nin.inference.evaluation import wilson_interval

# The accuracy of the five best answers says nothing of fewer classes.
TOP_CLASSES = 5

# Guo et al., section 2.
RELIABILITY_BINS = 15

# config.json holds the counts of no more classes: those of a thousand would be a million numbers.
MAX_CONFUSION_CLASSES = 100

# A network that is no better than guessing asks for an infinite temperature.
TEMPERATURE_RANGE = (0.01, 100.0)


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """The images whose answers have about the same probability.

    Attributes:
        low: the probability where the bin begins.
        high: where it ends; that belongs to it.
        images: their number, at least 1.
        confidence: the mean probability of their answers.
        accuracy: the fraction of them that is right.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def epoch_figures(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the figures that fit in a row of ``metrics.csv``.

    Args:
        scores: before the softmax, (N, classes), N >= 1.
        labels: int64 (N,).

    Returns:
        ``loss``, the mean cross entropy in nats; ``accuracy``; ``balanced_accuracy``, the mean recall of the classes
        that have images; ``macro_f1``, the mean F1 of the classes that have images or are answered.
    """
    predicted = scores.argmax(1)
    of_class = class_figures(predicted, labels, scores.shape[1])
    has_images, is_answered = of_class["images"] > 0, np.bincount(predicted.numpy(), minlength=scores.shape[1]) > 0
    return {
        "loss": F.cross_entropy(scores, labels).item(),
        "accuracy": int((predicted == labels).sum()) / len(labels),
        "balanced_accuracy": float(of_class["recall"][has_images].mean()),
        "macro_f1": float(of_class["f1"][has_images | is_answered].mean()),
    }


def class_figures(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, NDArray[Any]]:
    """Return the figures of each class, arrays (classes,).

    Args:
        predicted: the answers, int64 (N,).
        labels: int64 (N,).
        classes: their number.

    Returns:
        ``precision``, 0 where the class is never answered; ``recall``, 0 where it has no images; ``f1``; ``images``.
    """
    from sklearn.metrics import precision_recall_fscore_support  # takes a second

    # arrays, as scikit-learn 1.6 takes no tensors
    pair, names = (labels.numpy(), predicted.numpy()), np.arange(classes)
    figures = precision_recall_fscore_support(*pair, labels=names, zero_division=0)
    return dict(zip(("precision", "recall", "f1", "images"), figures, strict=True))


def confusion_counts(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the number of images of each (true class, answer), int64 (classes, classes)."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def part_figures(part: str, scores: Tensor, labels: Tensor, *, temperature: float | None = None) -> dict[str, Any]:
    """Return the figures of the test or the validation images, for the ``result`` of ``config.json``.

    Args:
        part: "test" or "validation", with which the names begin.
        scores: before the softmax, (N, classes).
        labels: int64 (N,).
        temperature: that the scores are divided by where probabilities are to be calibrated; None measures without.
    """
    hits, count = int((scores.argmax(1) == labels).sum()), len(labels)
    figures: dict[str, Any] = {
        **epoch_figures(scores, labels),
        "accuracy_interval": wilson_interval(hits, count),
        "images": count,
        "calibration_error": calibration_error(reliability(scores.softmax(1), labels)),
    }
    if scores.shape[1] > TOP_CLASSES:
        figures["top5_accuracy"] = top_accuracy(scores, labels)
    if temperature is not None:
        calibrated = scores / temperature
        figures["calibrated_loss"] = F.cross_entropy(calibrated, labels).item()
        figures["calibrated_calibration_error"] = calibration_error(reliability(calibrated.softmax(1), labels))
    return {f"{part}_{name}": value for name, value in figures.items()}


def test_details(scores: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return figures of each class, confusion counts and reliability, for the ``result`` of ``config.json``.

    Args:
        scores: before the softmax, (N, classes).
        labels: int64 (N,).
        classes: their names.
    """
    predicted, count = scores.argmax(1), len(classes)
    of_class = class_figures(predicted, labels, count)
    names = ("images", "precision", "recall", "f1")
    rows = zip(classes, *(of_class[name].tolist() for name in names), strict=True)
    details: dict[str, Any] = {"test_classes": [dict(zip(("class", *names), row, strict=True)) for row in rows]}
    if count <= MAX_CONFUSION_CLASSES:
        details["test_confusion"] = confusion_counts(predicted, labels, count).tolist()
    details["test_reliability"] = [dataclasses.asdict(one) for one in reliability(scores.softmax(1), labels)]
    return details


def top_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose class is among the `TOP_CLASSES` of the highest scores."""
    from sklearn.metrics import top_k_accuracy_score

    classes = np.arange(scores.shape[1])
    return float(top_k_accuracy_score(labels.numpy(), scores.numpy(), k=TOP_CLASSES, labels=classes))


def reliability(probabilities: Tensor, labels: Tensor, *, bins: int = RELIABILITY_BINS) -> tuple[ReliabilityBin, ...]:
    """Return how often answers are right, by their probability; bins without images are left out.

    Args:
        probabilities: of every class, (N, classes).
        labels: int64 (N,).
        bins: of equal width, from 0 to 1.

    Source:
        Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks, 2017, arXiv 1706.04599, section 2.
    """
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    # a bin holds its upper end, as in the source
    numbers = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = numbers.bincount(minlength=bins)
    confidences, rights = (numbers.bincount(values, minlength=bins) / counts for values in (confidence, right))
    return tuple(
        ReliabilityBin(i / bins, (i + 1) / bins, int(counts[i]), float(confidences[i]), float(rights[i]))
        for i in counts.nonzero().flatten().tolist()
    )


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the expected calibration error: how far probability and accuracy lie apart, in the mean over the images.

    Source:
        Naeini, Cooper, Hauskrecht: Obtaining well calibrated probabilities using Bayesian binning, AAAI 2015.
    """
    return sum(b.images * abs(b.accuracy - b.confidence) for b in bins) / sum(b.images for b in bins)


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """Return the temperature by which dividing the scores makes the labels most probable.

    The mean cross entropy of ``scores / T`` is convex in 1 / T, so its derivative is zero at one place. The images
    count as one more, which could be of any class: without it a few that are all right would ask for T = 0.

    Args:
        scores: before the softmax, (N, classes), of images that the network was not trained on.
        labels: int64 (N,).

    Source:
        Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks, 2017, arXiv 1706.04599, section 4.2.
    """
    scores, share = scores.double(), 1 / (len(labels) + 1)
    wanted = (1 - share) * scores.gather(1, labels[:, None]).squeeze(1) + share * scores.mean(1)
    low, high = (1 / t for t in reversed(TEMPERATURE_RANGE))
    for _ in range(60):  # halves the logarithm: to the last digit
        middle = (low * high) ** 0.5
        slope = ((scores * (middle * scores).softmax(1)).sum(1) - wanted).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 1 / (low * high) ** 0.5
