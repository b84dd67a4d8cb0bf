"""The data of a report as dataclasses, and as plain data for JSON."""

import base64
import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nin.inference.metrics import ReliabilityBin
from nin.profiling.cost import Cost


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """The figures at the top of a report.

    Attributes:
        accuracy: on the test images, as the training recorded it; as counted for the report where it recorded none.
        accuracy_interval: its 95 % interval.
        accuracy_flip: with the scores averaged over each image and its mirror image; None where not measured.
        accuracy_flip_interval: its 95 % interval.
        counted_accuracy: as counted for the report, in float32, like `nin.Classifier.predict`.
        balanced_accuracy: mean recall of the classes; counted for the report, as the next three.
        macro_f1: mean F1 of the classes.
        top5_accuracy: fraction of images whose class is among the five best answers; None for up to five classes.
        calibration_error: expected calibration error of the probabilities.
        train_images: their number; None where not recorded.
        test_images: their number.
        epochs: that were trained.
        planned_epochs: that the recipe asks for; None where not recorded.
        minutes: that the training took; None where not recorded.
        parameters: of the network, as it is used.
        macs: multiply-accumulates for one image.
        share_1x1: fraction of the MACs that 1×1 convolutions make.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    accuracy_flip: float | None
    accuracy_flip_interval: tuple[float, float] | None
    counted_accuracy: float
    balanced_accuracy: float
    macro_f1: float
    top5_accuracy: float | None
    calibration_error: float
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
    """Counts, recall and precision of one class on the test images.

    Attributes:
        name: of the class.
        images: test images of the class.
        predicted: test images that the network named so.
        right: test images of the class that the network named so.
    """

    name: str
    images: int
    predicted: int
    right: int

    @property
    def recall(self) -> float | None:
        """Fraction of the class's images that were named rightly; None where there are none."""
        return self.right / self.images if self.images else None

    @property
    def precision(self) -> float | None:
        """Fraction of the predictions of this class that were right; None where it was never predicted."""
        return self.right / self.predicted if self.predicted else None

    @property
    def f1(self) -> float | None:
        """The harmonic mean of recall and precision; None where both have no images."""
        both = self.images + self.predicted
        return 2 * self.right / both if both else None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How far probabilities can be trusted.

    Attributes:
        error: expected calibration error.
        bins: accuracy by probability.
        temperature: that the scores are divided by; 1 for none.
    """

    error: float
    bins: tuple[ReliabilityBin, ...]
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class ConfusedPair:
    """A true class and the class that it was mistaken for.

    Attributes:
        true: label of the true class.
        predicted: label of the predicted class.
        images: their number.
        share: their fraction of the images of the true class.
    """

    true: int
    predicted: int
    images: int
    share: float


@dataclasses.dataclass(frozen=True, eq=False)
class ClassMap:
    """The class-confidence map of one class for one image.

    Attributes:
        label: of the class.
        score: the mean of the map, where it is exact.
        probability: after the softmax over all classes.
        values: float32 (h, w), in units of the score; of Grad-CAM from 0 to 1.
    """

    label: int
    score: float
    probability: float
    values: NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class ExamplePrediction:
    """A test image with the network's prediction.

    Attributes:
        index: its position in the test images.
        file: its path relative to the data's folder, or None.
        pixels: uint8 (C, H, W).
        true: label of the true class.
        predicted: label of the predicted class.
        confidence: probability of the predicted class.
        true_confidence: probability of the true class.
        maps: of the predicted class, and of the true class, or of the runner-up where the prediction is right; empty
            where the network makes none, and for images that are shown without.
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
        """Whether the predicted class is the true one."""
        return self.predicted == self.true


@dataclasses.dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that the report of a run shows. Labels are positions in ``classes``.

    Attributes:
        data_name: name of the data set.
        model_name: name of the architecture.
        finished: whether the training came to its end.
        classes: their names.
        headline: the main figures.
        curves: the rows of ``metrics.csv``.
        range_test: the rows of ``learning_rate.csv``; none where the learning rate was given.
        per_class: figures of each class.
        confusion: counts (true class, predicted class).
        confused: the most frequent confusions, the most frequent first.
        calibration: of the probabilities as they are, and with the temperature that the training fitted, where it did.
        mistakes: the misclassified images of the highest confidence, the highest first.
        samples: images with their class-confidence maps.
        maps_are_exact: whether the maps are exact; else they are Grad-CAM's, from 0 to 1.
        map_cells: what a cell of the maps can show and what it cannot, in sentences; empty where there are no maps.
        cost: the table of layers.
        skipped: (file, reason) of the images that could not be read.
        notes: warnings and remarks, in sentences.
        recipe: the settings of the training.
        preprocessing: from image to input.
        environment: versions, and the machine.
    """

    data_name: str
    model_name: str
    finished: bool
    classes: tuple[str, ...]
    headline: RunSummary
    curves: tuple[dict[str, float], ...]
    range_test: tuple[dict[str, float], ...]
    per_class: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    confused: tuple[ConfusedPair, ...]
    calibration: tuple[Calibration, ...]
    mistakes: tuple[ExamplePrediction, ...]
    samples: tuple[ExamplePrediction, ...]
    maps_are_exact: bool
    map_cells: str
    cost: Cost
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    recipe: dict[str, Any]
    preprocessing: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; arrays as {"shape", "dtype", "base64"}, in C order."""
        values = dataclasses.asdict(self, dict_factory=_plain_dict)
        values["cost"] = self.cost.to_dict()
        for row, of_class in zip(values["per_class"], self.per_class, strict=True):
            row |= {"recall": of_class.recall, "precision": of_class.precision, "f1": of_class.f1}
        return values


def _plain_dict(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a dataclass, with arrays as text."""
    return {name: _encode(value) if isinstance(value, np.ndarray) else value for name, value in fields}


def _encode(array: NDArray[Any]) -> dict[str, Any]:
    content = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "base64": content}
