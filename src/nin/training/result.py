"""The result of a training: the network, its test accuracy, and the files of the run folder."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from nin import checkpoint, data, epoch_metrics, models
from nin.checkpoint import RunInfo
from nin.errors import UserError
from nin.runtime.files import write_atomically
from nin.training.state import TrainState, all_settings, describe_changes


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `nin.train` returns.

    Attributes:
        model: the averaged weights, in evaluation mode.
        info: what ``config.json`` says; its ``result`` has the test accuracy and its interval.
        metrics: one row per epoch, as in ``metrics.csv`` and ``timings.csv``.
        out: the run folder, or None.
    """

    model: nn.Module
    info: RunInfo
    metrics: list[dict[str, float]]
    out: Path | None


def load_result(folder: Path, expected: RunInfo) -> TrainResult:
    """Return the result of a training that has ended in the folder.

    Args:
        folder: the run folder.
        expected: of a training with the settings and data that were asked for.

    Raises:
        UserError: it was trained with other settings or data.
    """
    with models.trust(str(expected.model.get("name"))):  # the person has named it again
        model, info = checkpoint.load_model(folder)
    changes = describe_changes(*(all_settings(each.recipe, each.data) for each in (expected, info)))
    if changes:
        raise UserError(
            f"{folder} is finished, with {changes}: leave that away to see its result, or give another --out"
        )
    metrics = epoch_metrics.read_csv(folder / epoch_metrics.METRICS_FILE)
    timings = epoch_metrics.read_csv(folder / epoch_metrics.TIMINGS_FILE)
    return TrainResult(model, info, [row | timing for row, timing in zip(metrics, timings, strict=True)], folder)


def write_run(folder: Path, model: nn.Module, info: RunInfo, state: TrainState, images: data.Data) -> None:
    """Write the weights, ``config.json``, the metrics so far, and what was found wrong with the image files."""
    if images.findings:
        write_atomically(folder / checkpoint.FINDINGS_FILE, data.findings_csv(images.findings))
    checkpoint.save_model(folder, model, info)
    epoch_metrics.save_metrics(folder, state.metrics)


def data_record(images: data.Data) -> dict[str, Any]:
    """Return the ``data`` of ``config.json``: name, counts, what was left out, and where the images came from."""
    return {
        "name": images.name,
        "train_images": len(images.train),
        "test_images": len(images.test),
        **({} if images.validation is None else {"validation_images": len(images.validation)}),
        "skipped": [list(pair) for pair in images.skipped],
        "notes": list(images.notes),
        "flip_reason": images.flip_reason,
        **images.origin,
    }


def network_description(model: nn.Module, folder: Path | None) -> dict[str, Any]:
    """Return the ``model`` of ``config.json``; without a run folder any network has one.

    Raises:
        UserError: a run folder could not build it again.
    """
    if isinstance(model, models.Network):
        return checkpoint.model_description(model)
    kind = type(model).__name__
    if folder is not None:
        raise UserError(
            f"network: a run folder holds networks of nin.models, got {kind}: leave out= away and keep the result's "
            "model"
        )
    return {"kind": kind}
