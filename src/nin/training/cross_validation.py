"""Cross-validation: a run for each fold of the training images, and mean and spread of their figures."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nin import data, folders
from nin.config import TrainConfig
from nin.runtime import distributed
from nin.runtime.files import write_atomically
from nin.training.progress import TrainProgress
from nin.training.result import TrainResult
from nin.training.setup import train
from nin.training.state import CheckpointOptions
from nin.value_checks import check_value

# Of the results' figures those that are averaged.
FIGURES = (
    "test_accuracy",
    "test_accuracy_flip",
    "test_top5_accuracy",
    "test_balanced_accuracy",
    "test_macro_f1",
    "test_loss",
    "test_calibration_error",
)


@dataclasses.dataclass(frozen=True)
class FoldsResult:
    """What `cross_validate` returns.

    Attributes:
        results: of the folds, in their order.
        figures: mean, sample standard deviation and values of each figure over the folds, by its name.
    """

    results: list[TrainResult]
    figures: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data for JSON."""
        return {"folds": len(self.results), "figures": self.figures}


def cross_validate(
    images: data.Data,
    config: TrainConfig,
    *,
    folds: int,
    out: Path,
    keeping: CheckpointOptions | None = None,
    overwrite: bool = False,
    on_fold: Callable[[int, TrainResult], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_progress: Callable[[int, TrainProgress], None] | None = None,
) -> FoldsResult:
    """Train as often as there are folds, each time without one of them, on which the network is then tested.

    The folds divide the training images, with as many images of each class in each. The test images of the data set
    are looked at in none: they measure the network that is trained afterwards, with the settings that were chosen.

    Args:
        images: the data set.
        config: the training settings; its seed decides the folds too.
        folds: their number, at least 2.
        out: the folder to make, with a run folder ``fold-1`` … for each, and ``folds.json``.
        keeping: as for `nin.train`. Resuming keeps the folds that are finished, and goes on with the one that is not.
        overwrite: remove the folds that lie in ``out`` before this training begins, as `nin.train` does with a run.
        on_fold: called with the number of a fold, from 1, and its result.
        on_note: called with lines for people, as that of `nin.train`; what holds for several folds comes once.
        on_progress: called with the number of the fold and its progress, as that of `nin.train`.

    Returns:
        The results, and mean and spread of their figures.

    Raises:
        UserError: a class has fewer images than there are folds, or what `nin.train` raises.
    """
    check_value("folds", folds, int, lambda x: x >= 2, "at least 2")
    keeping = keeping or CheckpointOptions()
    check_folds_folder(out, resume=keeping.resume, overwrite=overwrite)
    parts = [data.take_fold(images, number, folds=folds, seed=config.seed) for number in range(1, folds + 1)]
    for folder in sorted(out.glob("fold-*")) if overwrite and distributed.is_main_process() else []:
        folders.remove_run(folder)
        folder.rmdir()
    results, said = [], set[str]()

    def note_once(text: str) -> None:
        if on_note is not None and text not in said:
            on_note(text)
        said.add(text)

    for number, part in enumerate(parts, 1):
        result = train(
            part,
            config,
            out=fold_folder(out, number),
            keeping=keeping,
            on_note=note_once,
            on_progress=on_progress and functools.partial(on_progress, number),
            progress=None if on_progress is None else False,
        )
        results.append(result)
        if on_fold is not None:
            on_fold(number, result)
    summary = FoldsResult(results, summarize([result.info.result for result in results]))
    if distributed.is_main_process():
        write_atomically(out / folders.FOLDS_FILE, json.dumps(summary.to_dict(), indent=2))
    return summary


def check_folds_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a cross-validation may write its folder, before anything is read or computed.

    Raises:
        UserError: it holds folds that are neither to be resumed nor overwritten, or something else; or it is a file.
    """
    folders.check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    if distributed.is_main_process():  # which may have begun meanwhile
        folders.check_folds(out, resume=resume, overwrite=overwrite)


def fold_folder(out: Path, number: int) -> Path:
    """Return the run folder of a fold."""
    return out / f"fold-{number}"


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean, sample standard deviation and values of each figure that all results have."""
    columns = {name: [result[name] for result in results] for name in FIGURES if all(name in r for r in results)}
    return {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values), "values": values}
        for name, values in columns.items()
    }
