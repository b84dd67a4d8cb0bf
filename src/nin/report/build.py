"""Evaluate the network of a run folder on its test images, and make the report of it: data, and ``report.html``."""

import dataclasses
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nin import checkpoint, data, epoch_metrics, models
from nin.display.numbers import format_number_of, format_percent
from nin.errors import UserError
from nin.inference import metrics
from nin.inference.classifier import Classifier, fitted_temperature, load
from nin.inference.evaluation import wilson_interval
from nin.inference.grad_cam import grad_cam
from nin.profiling.cost import Cost, cost
from nin.report.data import Calibration, ClassMap, ClassMetrics, ConfusedPair, ExamplePrediction, ReportData, RunSummary
from nin.report.html_page import render_report
from nin.report.receptive_field import receptive_field
from nin.runtime.files import write_atomically
from nin.runtime.progress import ProgressCallback
from nin.runtime.shown_progress import shown_progress

EVALUATION_BATCH_SIZE = 64

# Sample images that a page can show before it gets long: one for each class up to this many.
MAX_SAMPLE_CLASSES = 10
MAX_MISTAKES = 24
MAX_CONFUSED_PAIRS = 12

# One sample in this many is a misclassified image, where there is one: readers learn more from those, but only
# misclassified ones would say nothing about what the network recognises.
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
        on_progress: called with (what is being done, number done, number of all); if not given, a bar is shown in a
            notebook and on a terminal.

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
    """Evaluate the network of a run folder on all its test images.

    Args:
        run: the folder that `nin.train` or ``nin train`` made; its training may have been interrupted.
        images: what it was trained on. None loads them again, as ``config.json`` records them.
        samples: images to show with their maps; at least one for each class is shown, up to ten classes.
        device: where to compute.
        on_progress: called with (what is being done, number done, number of all); if not given, a bar is shown in a
            notebook and on a terminal.

    Returns:
        Plain data, the same for the same run, images and device.

    Raises:
        UserError: the run folder cannot be read, or the images are not those that it was trained on.
    """
    run = Path(run)
    classifier = load(run, device=device)
    info, preprocessing = classifier.info, classifier.info.preprocessing
    if images is None:
        try:
            images = data.load_from_record(info.data, preprocessing)
        except UserError as error:
            raise UserError(f"{run}: {error}; give the images") from error
    images = data.with_recorded_parts(images, info.data)
    if mismatch := info.mismatch(images, test_images=True):
        raise UserError(f"the images are not those that {run} was tested on: {mismatch}")
    if not len(images.test):
        raise UserError(f"{images.name} has no test images: there is nothing to report")
    curves = epoch_metrics.read_csv(run / epoch_metrics.METRICS_FILE)
    with shown_progress("answering the test images", on_progress) as show:
        scores = _predict(classifier, images, show)
    labels, probabilities = images.test.labels, scores.softmax(1)
    confusion = metrics.confusion_counts(scores.argmax(1), labels, len(images.classes))
    calibration = _calibrations(info, scores, labels)
    network_cost = cost(classifier.model, (1, preprocessing.channels, preprocessing.size, preprocessing.size))
    figures = metrics.part_figures("test", scores, labels)
    headline = _run_summary(info, curves, network_cost, int(confusion.trace()), figures)
    chosen, maps_problem = _samples(classifier, images, scores, samples)
    class_counts = (confusion.sum(1).tolist(), confusion.sum(0).tolist(), confusion.diag().tolist())
    return Report(
        data_name=str(info.data.get("name", images.name)),
        model_name=models.model_name(info.model),
        finished=bool(info.result),
        classes=classifier.classes,
        headline=headline,
        curves=curves,
        range_test=epoch_metrics.read_csv(run / epoch_metrics.LEARNING_RATE_FILE),
        per_class=tuple(map(ClassMetrics, classifier.classes, *class_counts)),
        confusion=tuple(map(tuple, confusion.tolist())),
        confused=_most_confused(confusion),
        calibration=calibration,
        mistakes=_mistakes(images, probabilities),
        samples=chosen,
        maps_are_exact=not classifier.no_maps_reason,
        map_cells=_map_cells(classifier),
        cost=network_cost,
        skipped=tuple((str(file), str(reason)) for file, reason in info.data.get("skipped", images.skipped)),
        notes=(*images.notes, *_notes(info, headline, network_cost, classifier.no_maps_reason, maps_problem)),
        recipe=info.recipe,
        preprocessing=dataclasses.asdict(preprocessing),
        environment=info.environment,
    )


@torch.inference_mode()
def _predict(classifier: Classifier, images: data.Data, on_progress: ProgressCallback) -> Tensor:
    """Return the scores of all test images, (N, classes), float32."""
    count, done, rows = len(images.test), 0, []
    order, workers = torch.arange(count), torch.get_num_threads()
    for pixels, _, _ in data.batches(images.test, order, EVALUATION_BATCH_SIZE, workers=workers):
        rows.append(classifier.score_pixels(pixels))
        done += len(pixels)
        on_progress("answering the test images", done, count)
    return torch.cat(rows)


def _calibrations(info: checkpoint.RunInfo, scores: Tensor, labels: Tensor) -> tuple[Calibration, ...]:
    """Return the calibration as it is, and with the run's temperature."""
    temperature = fitted_temperature(info)
    temperatures = [1.0] if temperature is None else [1.0, temperature]
    found = [(t, metrics.reliability((scores / t).softmax(1), labels)) for t in temperatures]
    return tuple(Calibration(metrics.calibration_error(bins), bins, t) for t, bins in found)


def _most_confused(confusion: Tensor) -> tuple[ConfusedPair, ...]:
    wrong, of_class = confusion - confusion.diag().diag(), confusion.sum(1)
    # stable: pairs that are equally frequent stay in the order of the classes, on every machine
    order = wrong.flatten().argsort(descending=True, stable=True)[:MAX_CONFUSED_PAIRS]
    return tuple(
        ConfusedPair(true, predicted, int(wrong[true, predicted]), float(wrong[true, predicted] / of_class[true]))
        for true, predicted in (divmod(int(i), len(wrong)) for i in order)
        if wrong[true, predicted]
    )


def _run_summary(
    info: checkpoint.RunInfo,
    curves: tuple[dict[str, float], ...],
    network_cost: Cost,
    right: int,
    figures: dict[str, Any],
) -> RunSummary:
    result, last = info.result, curves[-1] if curves else {}
    seconds, count = result.get("seconds", last.get("seconds")), figures["test_images"]
    flip = result.get("test_accuracy_flip")
    return RunSummary(
        accuracy=result.get("test_accuracy", right / count),
        accuracy_interval=tuple(result.get("test_accuracy_interval", wilson_interval(right, count))),
        accuracy_flip=flip,
        accuracy_flip_interval=None if flip is None else tuple(result["test_accuracy_flip_interval"]),
        counted_accuracy=right / count,
        balanced_accuracy=figures["test_balanced_accuracy"],
        macro_f1=figures["test_macro_f1"],
        top5_accuracy=figures.get("test_top5_accuracy"),
        calibration_error=figures["test_calibration_error"],
        train_images=info.data.get("train_images"),
        test_images=count,
        epochs=int(last.get("epoch", 0)),
        planned_epochs=info.recipe.get("epochs"),
        minutes=None if seconds is None else seconds / 60,
        parameters=network_cost.parameters,
        macs=network_cost.macs,
        share_1x1=network_cost.fraction_1x1,
    )


def _notes(
    info: checkpoint.RunInfo, headline: RunSummary, network_cost: Cost, no_maps_reason: str, maps_problem: str
) -> list[str]:
    notes = []
    if "best_epoch" in info.result:
        best = info.result["best_epoch"]
        notes.append(f"The weights are those of epoch {best}, the best one by the validation images.")
        if headline.epochs < (headline.planned_epochs or 0):
            notes.append(
                f"The training ended early, after {headline.epochs} of {headline.planned_epochs} epochs: "
                f"{format_number_of(headline.epochs - best, 'epoch')} without a better one by the validation images "
                f"(patience {info.recipe.get('patience')})."
            )
    # the training may evaluate in bfloat16, which can tip an image between two classes; the report is in float32
    if not math.isclose(headline.accuracy, headline.counted_accuracy, abs_tol=1e-9):
        right, count = round(headline.counted_accuracy * headline.test_images), headline.test_images
        notes.append(
            f"The accuracy is the one that the training counted; counted again here, as for the tables, the network is "
            f"right on {right:,} of {count:,} images ({format_percent(right / count, 2)})."
        )
    if no_maps_reason:
        instead = f"Nor are they approximated: {maps_problem}" if maps_problem else "Grad-CAM approximates them"
        notes.append(f"There are no exact class maps: {no_maps_reason}. {instead}.")
    if network_cost.uncounted:
        notes.append(f"The MACs leave out {', '.join(network_cost.uncounted)}.")
    return notes


def _mistakes(images: data.Data, probabilities: Tensor) -> tuple[ExamplePrediction, ...]:
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != images.test.labels).nonzero().flatten()
    order = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MAX_MISTAKES]
    return _examples(images, probabilities, order)


def _samples(
    classifier: Classifier, images: data.Data, scores: Tensor, count: int
) -> tuple[tuple[ExamplePrediction, ...], str]:
    """Return images with their maps, exact ones or Grad-CAM's, and why there are none, or ""."""
    chosen = _choose_samples(images.test.labels, scores.argmax(1), len(images.classes), count)
    examples = _examples(images, scores.softmax(1), chosen)
    if not examples:
        return examples, ""
    x, labels = classifier.inputs(images.test.fetch(chosen)), _shown_labels(examples, scores[chosen])
    if classifier.no_maps_reason:
        try:
            maps = torch.stack([grad_cam(classifier.model, x, list(each)) for each in zip(*labels, strict=True)], 1)
        except UserError as error:
            return examples, str(error)
    else:
        with torch.inference_mode():
            everything = cast(models.Network, classifier.model).maps(x).float().cpu()
        maps = torch.stack([rows[list(each)] for rows, each in zip(everything, labels, strict=True)])
    shown = zip(examples, labels, maps, scores[chosen], strict=True)
    return tuple(dataclasses.replace(example, maps=_class_maps(*rest)) for example, *rest in shown), ""


def _map_cells(classifier: Classifier) -> str:
    """Return what a cell of the class maps can show; nothing where the network makes none."""
    model, p = classifier.model, classifier.info.preprocessing
    if not isinstance(model, models.Network) or not getattr(model, "maps_are_exact", True):
        return ""
    return str(receptive_field(model, (p.channels, p.size, p.size)))


def _choose_samples(labels: Tensor, predicted: Tensor, classes: int, count: int) -> Tensor:
    """Return indices of images: classes in turn, of each the first right ones, every third one a wrong one."""
    count = max(count, min(classes, MAX_SAMPLE_CLASSES))
    # Where there are more classes than samples, those that are shown lie evenly among all.
    turn = [i * classes // count for i in range(count)] if classes > count else [i % classes for i in range(count)]
    chosen: list[int] = []
    for i, label in enumerate(turn):
        indices = (labels == label).nonzero().flatten()
        is_right = predicted[indices] == label
        groups = [indices[is_right].tolist(), indices[~is_right].tolist()]
        if i % WRONG_SAMPLE_EVERY == WRONG_SAMPLE_EVERY - 1:
            groups.reverse()
        chosen += [index for group in groups for index in group if index not in chosen][:1]
    return torch.tensor(chosen, dtype=torch.int64)


def _examples(images: data.Data, probabilities: Tensor, indices: Tensor) -> tuple[ExamplePrediction, ...]:
    names, examples = images.test.names, []
    for index, pixels in zip(indices.tolist(), images.test.fetch(indices), strict=True):
        row, true = probabilities[index], int(images.test.labels[index])
        predicted, file = int(row.argmax()), None if names is None else names[index]
        confidences = (float(row[predicted]), float(row[true]))
        examples.append(ExamplePrediction(index, file, pixels.numpy(), true, predicted, *confidences))
    return tuple(examples)


def _shown_labels(examples: Sequence[ExamplePrediction], scores: Tensor) -> list[tuple[int, int]]:
    """Return the classes whose maps are shown: the predicted one, and the true one or the runner-up."""
    labels = []
    for example, row in zip(examples, scores, strict=True):
        other = example.true
        if example.right:
            other = next(int(i) for i in row.argsort(descending=True) if int(i) != example.predicted)
        labels.append((example.predicted, other))
    return labels


def _class_maps(labels: tuple[int, int], maps: Tensor, scores: Tensor) -> tuple[ClassMap, ...]:
    probabilities = scores.softmax(0)
    return tuple(
        ClassMap(label, float(scores[label]), float(probabilities[label]), values.numpy())
        for label, values in zip(labels, maps, strict=True)
    )
