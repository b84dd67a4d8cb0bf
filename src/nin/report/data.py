"""What a report holds: plain data, without any thought of how it looks."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nin.profiling import cost as costs


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """The figures that a reader looks for first.

    Attributes:
        accuracy: share of test images that are answered right, as the training recorded it; as counted here where
            it recorded none.
        accuracy_interval: its 95 % interval.
        accuracy_flip: with the scores averaged over each image and its mirror image; None where not measured.
        accuracy_flip_interval: its 95 % interval.
        counted_accuracy: as counted for this report, in float32, like `nin.Classifier.predict`.
        train_images: how many it learned from; None where not recorded.
        test_images: how many it was tested on.
        epochs: passes over the training images that were made.
        planned_epochs: that the recipe asks for; None where not recorded.
        minutes: that the training took; None where not recorded.
        parameters: of the network, as it is used.
        macs: multiply-accumulates for one image.
        share_1x1: share of the MACs that 1×1 convolutions make.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    accuracy_flip: float | None
    accuracy_flip_interval: tuple[float, float] | None
    counted_accuracy: float
    train_images: int | None
    test_images: int
    epochs: int
    planned_epochs: int | None
    minutes: float | None
    parameters: int
    macs: int
    share_1x1: float


@dataclasses.dataclass(frozen=True)
class ClassMetrics:
    """How one class fared on the test images.

    Attributes:
        name: of the class.
        images: test images of the class.
        predicted: test images that were answered with the class.
        right: those that are both.
    """

    name: str
    images: int
    predicted: int
    right: int

    @property
    def recall(self) -> float | None:
        """Share of the class's images that were found: the accuracy on this class. None where there are none."""
        return self.right / self.images if self.images else None

    @property
    def precision(self) -> float | None:
        """Share of the answers with this class that were right. None where it was never the answer."""
        return self.right / self.predicted if self.predicted else None


@dataclasses.dataclass(frozen=True)
class ConfusedPair:
    """Images of one class that were taken for another.

    Attributes:
        true: label of what they are.
        predicted: label of what they were taken for.
        images: how many.
        share: of the images of the true class.
    """

    true: int
    predicted: int
    images: int
    share: float


@dataclasses.dataclass(frozen=True, eq=False)
class ClassMap:
    """The evidence for one class at each place of one image.

    Attributes:
        label: of the class.
        score: the mean of the map.
        probability: after the softmax over all classes.
        values: float32 (h, w), in units of the score.
    """

    label: int
    score: float
    probability: float
    values: NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class ExamplePrediction:
    """One test image and what the network says of it.

    Attributes:
        index: its position in the test images.
        file: its path relative to the data's folder, or None.
        pixels: uint8 (C, H, W).
        true: label of what it is.
        predicted: label of the answer.
        confidence: probability of the answer.
        true_confidence: probability of the true class.
        maps: of the answer, and of the true class, or of the runner-up where the answer is right; empty where the
            network makes none, and for images that are shown without.
    """

    index: int
    file: str | None
    pixels: NDArray[np.uint8]
    true: int
    predicted: int
    confidence: float
    true_confidence: float
    maps: tuple[ClassMap, ...] = ()

    @property
    def right(self) -> bool:
        """Whether the answer is the true class."""
        return self.predicted == self.true


@dataclasses.dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that a page about a run shows. Labels are positions in ``classes``.

    Attributes:
        data_name: what the images are called.
        model_name: what the architecture is called.
        finished: whether the training came to its end.
        classes: their names.
        headline: the main figures.
        curves: the rows of ``metrics.csv``.
        per_class: figures of each class.
        confusion: counts (true class, answer).
        confused: the pairs that were mixed up most, the most frequent first.
        mistakes: the wrong answers with the highest confidence, the highest first.
        samples: images with their class-confidence maps.
        cost: the table of layers.
        skipped: (file, reason) of the images that could not be read.
        notes: what else a reader must know, in sentences.
        recipe: the settings of the training.
        preprocessing: from image to input.
        environment: versions and machine.
    """

    data_name: str
    model_name: str
    finished: bool
    classes: tuple[str, ...]
    headline: RunSummary
    curves: tuple[dict[str, float], ...]
    per_class: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    confused: tuple[ConfusedPair, ...]
    mistakes: tuple[ExamplePrediction, ...]
    samples: tuple[ExamplePrediction, ...]
    cost: costs.Cost
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    recipe: dict[str, Any]
    preprocessing: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; arrays as {"shape", "dtype", "base64"}, in C order."""
        values: dict[str, Any] = _plain(self)
        values["cost"] = self.cost.to_dict()
        for row, figures in zip(values["per_class"], self.per_class, strict=True):
            row |= {"recall": figures.recall, "precision": figures.precision}
        return values


def _plain(value: Any) -> Any:
    """Return dataclasses as dicts and arrays as text, all the way down."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"shape": list(value.shape), "dtype": str(value.dtype), "base64": content}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
