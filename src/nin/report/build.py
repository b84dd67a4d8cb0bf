"""From a run folder to plain data: what a page about the run has to say, and nothing about how it looks."""

from __future__ import annotations

import dataclasses
import html
import math
from pathlib import Path

import torch
from torch import Tensor

from nin import checkpoint, data, models
from nin.errors import UserError
from nin.inference import classifier as prediction
from nin.inference.evaluation import wilson_interval
from nin.profiling import cost as costs
from nin.report.data import ClassMap, ClassMetrics, ConfusedPair, ExamplePrediction, ReportData, RunSummary
from nin.report.html_page import render_report
from nin.runtime.files import write_atomically
from nin.runtime.formatting import format_percent
from nin.runtime.progress import ProgressCallback

BATCH = 64

# Sample images that a page can show before it gets long: one for each class up to this many.
MOST_SAMPLE_CLASSES = 10
MOST_MISTAKES = 24
MOST_CONFUSED = 12

# One sample in this many shows a wrong answer, where there is one.
WRONG_SAMPLE_EVERY = 3


class Report(ReportData):
    """A report that a notebook shows as its page."""

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own: neither its styles nor its policy touch the notebook."""
        page = html.escape(render_report(self), quote=True)
        return f'<iframe srcdoc="{page}" sandbox="" width="100%" height="800" style="border: 0"></iframe>'


def write_report(
    run: str | Path,
    images: data.Data | None = None,
    *,
    device: str = "cpu",
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        run: the folder that `nin.train` or ``nin train`` made.
        images: what it was trained on. None loads them again, as ``config.json`` records them.
        device: where to compute.
        on_progress: called with (what is being done, number done, number of all).

    Returns:
        The path of the file.

    Raises:
        UserError: as `build_report`.
        OSError: the file cannot be written; it is named.
    """
    path = Path(run) / checkpoint.REPORT_FILE
    write_atomically(path, render_report(build_report(run, images, device=device, on_progress=on_progress)))
    return path


def build_report(
    run: str | Path,
    images: data.Data | None = None,
    *,
    samples: int = 8,
    device: str = "cpu",
    on_progress: ProgressCallback | None = None,
) -> Report:
    """Read a run folder, let its network answer all test images, and count.

    Args:
        run: the folder that `nin.train` or ``nin train`` made; its training may have been interrupted.
        images: what it was trained on. None loads them again, as ``config.json`` records them.
        samples: images to show with their maps; at least one for each class is shown, up to ten classes.
        device: where to compute.
        on_progress: called with (what is being done, number done, number of all).

    Returns:
        Plain data, the same for the same run, images and device.

    Raises:
        UserError: the run folder cannot be read, or the images are not those that it was trained on.
    """
    run = Path(run)
    classifier = prediction.load(run, device=device)
    info = classifier.info
    if images is None:
        try:
            images = data.load_from_record(info.data, size=info.preprocessing.size)
        except UserError as error:
            raise UserError(f"{run}: {error}; give the images") from error
    if mismatch := info.mismatch(images, test_images=True):
        raise UserError(f"the images are not those that {run} was tested on: {mismatch}")
    if not len(images.test):
        raise UserError(f"{images.name} has no test images: there is nothing to report")
    curves = checkpoint.read_csv(run / checkpoint.METRICS_FILE)
    probabilities = _probabilities(classifier, images, on_progress)
    labels, answers = images.test.labels, probabilities.argmax(1)
    confusion = _confusion(labels, answers, len(images.classes))
    size, channels = info.preprocessing.size, info.preprocessing.channels
    cost = costs.cost(classifier.model, (1, channels, size, size))
    headline = _headline(info, curves, cost, int(confusion.trace()), len(labels))
    config = info.model.get("config", {})
    return Report(
        data_name=str(info.data.get("name", images.name)),
        model_name=str(config.get("name", info.model.get("kind", "network"))),
        finished=bool(info.result),
        classes=classifier.classes,
        headline=headline,
        curves=curves,
        per_class=tuple(_per_class(classifier.classes, confusion)),
        confusion=tuple(map(tuple, confusion.tolist())),
        confused=_most_confused(confusion),
        mistakes=_mistakes(images, probabilities),
        samples=_samples(classifier, images, probabilities, samples),
        cost=cost,
        skipped=tuple((str(file), str(reason)) for file, reason in info.data.get("skipped", images.skipped)),
        notes=(*images.notes, *_notes(headline, cost)),
        recipe=info.recipe,
        preprocessing=dataclasses.asdict(info.preprocessing),
        environment=info.environment,
    )


@torch.inference_mode()
def _probabilities(
    classifier: prediction.Classifier, images: data.Data, on_progress: ProgressCallback | None
) -> Tensor:
    """Return the network's answers to all test images, (N, classes), float32."""
    count, rows = len(images.test), []
    done = 0
    for pixels, _, _ in data.batches(images.test, torch.arange(count), BATCH, workers=torch.get_num_threads()):
        rows.append(classifier.score_pixels(pixels).softmax(1))
        done += len(pixels)
        if on_progress:
            on_progress("answering the test images", done, count)
    return torch.cat(rows)


def _confusion(labels: Tensor, answers: Tensor, classes: int) -> Tensor:
    """Return counts (true class, answer), int64."""
    return torch.bincount(labels * classes + answers, minlength=classes * classes).view(classes, classes)


def _per_class(classes: tuple[str, ...], confusion: Tensor) -> list[ClassMetrics]:
    counts = (confusion.sum(1).tolist(), confusion.sum(0).tolist(), confusion.diag().tolist())
    return [ClassMetrics(*row) for row in zip(classes, *counts, strict=True)]


def _most_confused(confusion: Tensor) -> tuple[ConfusedPair, ...]:
    wrong = confusion - confusion.diag().diag()
    order = wrong.flatten().argsort(descending=True, stable=True)[:MOST_CONFUSED]
    of_class = confusion.sum(1)
    pairs = [(int(i) // len(wrong), int(i) % len(wrong)) for i in order]
    return tuple(
        ConfusedPair(true, answer, int(wrong[true, answer]), float(wrong[true, answer] / of_class[true]))
        for true, answer in pairs
        if wrong[true, answer]
    )


def _headline(
    info: checkpoint.RunInfo, curves: tuple[dict[str, float], ...], cost: costs.Cost, hits: int, count: int
) -> RunSummary:
    result, last = info.result, curves[-1] if curves else {}
    seconds = result.get("seconds", last.get("seconds"))
    flip = result.get("test_accuracy_flip")
    return RunSummary(
        accuracy=result.get("test_accuracy", hits / count),
        accuracy_interval=tuple(result.get("test_accuracy_interval", wilson_interval(hits, count))),
        accuracy_flip=flip,
        accuracy_flip_interval=None if flip is None else tuple(result["test_accuracy_flip_interval"]),
        counted_accuracy=hits / count,
        train_images=info.data.get("train_images"),
        test_images=count,
        epochs=int(last.get("epoch", 0)),
        planned_epochs=info.recipe.get("epochs"),
        minutes=None if seconds is None else seconds / 60,
        parameters=cost.parameters,
        macs=cost.macs,
        share_1x1=cost.share_1x1,
    )


def _notes(headline: RunSummary, cost: costs.Cost) -> list[str]:
    notes = []
    if not math.isclose(headline.accuracy, headline.counted_accuracy, abs_tol=1e-9):
        right, count = round(headline.counted_accuracy * headline.test_images), headline.test_images
        notes.append(
            f"The accuracy is the one that the training counted; counted again here, as for the tables, the network is "
            f"right on {right:,} of {count:,} images ({format_percent(right / count, 2)})."
        )
    if cost.uncounted:
        notes.append(f"The MACs leave out {', '.join(cost.uncounted)}.")
    return notes


def _mistakes(images: data.Data, probabilities: Tensor) -> tuple[ExamplePrediction, ...]:
    confidence, answers = probabilities.max(1)
    wrong = (answers != images.test.labels).nonzero().flatten()
    order = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MOST_MISTAKES]
    return _answers(images, probabilities, order)


def _samples(
    classifier: prediction.Classifier, images: data.Data, probabilities: Tensor, count: int
) -> tuple[ExamplePrediction, ...]:
    chosen = _choose_samples(images.test.labels, probabilities.argmax(1), len(images.classes), count)
    answers = _answers(images, probabilities, chosen)
    if not isinstance(classifier.model, models.Network) or not answers:
        return answers
    with torch.inference_mode():
        maps = classifier.model.maps(classifier.inputs(images.test.fetch(chosen))).float().cpu()
    return tuple(
        dataclasses.replace(answer, maps=_shown_maps(answer, image_maps))
        for answer, image_maps in zip(answers, maps, strict=True)
    )


def _choose_samples(labels: Tensor, answers: Tensor, classes: int, count: int) -> Tensor:
    """Return positions of images: classes in turn, of each the first right answers, every third one a wrong one."""
    count = max(count, min(classes, MOST_SAMPLE_CLASSES))
    # Where there are more classes than places, those that are shown lie evenly among all.
    turn = [i * classes // count for i in range(count)] if classes > count else [i % classes for i in range(count)]
    chosen: list[int] = []
    for i, label in enumerate(turn):
        places = (labels == label).nonzero().flatten()
        is_right = answers[places] == label
        kinds = [places[is_right].tolist(), places[~is_right].tolist()]
        if i % WRONG_SAMPLE_EVERY == WRONG_SAMPLE_EVERY - 1:
            kinds.reverse()
        free = [place for kind in kinds for place in kind if place not in chosen]
        chosen += free[:1]
    return torch.tensor(chosen, dtype=torch.int64)


def _answers(images: data.Data, probabilities: Tensor, indices: Tensor) -> tuple[ExamplePrediction, ...]:
    if not len(indices):
        return ()
    names, rows = images.test.names, []
    for index, pixels in zip(indices.tolist(), images.test.fetch(indices), strict=True):
        row, true = probabilities[index], int(images.test.labels[index])
        answer = int(row.argmax())
        file = None if names is None else names[index]
        rows.append(ExamplePrediction(index, file, pixels.numpy(), true, answer, float(row[answer]), float(row[true])))
    return tuple(rows)


def _shown_maps(answer: ExamplePrediction, maps: Tensor) -> tuple[ClassMap, ...]:
    """Return the maps to show of one image; ``maps`` is (classes, h, w)."""
    scores = maps.mean((1, 2))
    probabilities = scores.softmax(0)
    other = answer.true
    if answer.right:
        other = next(int(i) for i in scores.argsort(descending=True) if int(i) != answer.predicted)
    return tuple(
        ClassMap(label, float(scores[label]), float(probabilities[label]), maps[label].numpy())
        for label in (answer.predicted, other)
    )
