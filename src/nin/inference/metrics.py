"""Figures of a classifier from its scores: accuracy, of each class, balanced, macro-F1, top-5."""

from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nin.inference.evaluation import wilson_interval

# The accuracy of the five best answers says nothing of fewer classes.
TOP_CLASSES = 5


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

    figures = precision_recall_fscore_support(labels, predicted, labels=np.arange(classes), zero_division=0)
    return dict(zip(("precision", "recall", "f1", "images"), figures, strict=True))


def test_figures(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the figures of the test images for the ``result`` of ``config.json``; the arguments are as above."""
    figures = epoch_figures(scores, labels)
    hits, count = int((scores.argmax(1) == labels).sum()), len(labels)
    return {
        "test_accuracy": hits / count,
        "test_accuracy_interval": wilson_interval(hits, count),
        "test_images": count,
        "test_loss": figures["loss"],
        "test_balanced_accuracy": figures["balanced_accuracy"],
        "test_macro_f1": figures["macro_f1"],
    }
