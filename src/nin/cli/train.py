"""`nin train`: train a network on images, and write the run folder with its report."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

import nin
from nin import folders, names
from nin.cli.check import show_findings
from nin.cli.console import (
    ProgressBar,
    catch_stop_signals,
    messages,
    print_json,
    print_table,
    results,
    silence_other_ranks,
)
from nin.config import TrainConfig
from nin.display.numbers import format_number_of, format_percent, format_percent_range
from nin.errors import UserError
from nin.runtime import torchrun

if TYPE_CHECKING:
    from nin.training import TrainProgress, TrainResult
    from nin.training.progress_lines import ProgressLines


def train(
    data: str,
    /,
    *,
    out: Path,
    data_dir: Path | None = None,
    size: int | None = None,
    resize: Literal["crop", "squash", "letterbox"] | None = None,
    test_fraction: float | None = None,
    config: Annotated[TrainConfig | None, Parameter(name="*", negative=None)] = None,
    folds: int | None = None,
    resume: bool = False,
    override: bool = False,
    checkpoint_minutes: float = 5.0,
    checkpoint_steps: int | None = None,
    overwrite: bool = False,
    tensorboard: bool = False,
    strict: bool = False,
    trust: bool = False,
    json: bool = False,
) -> None:
    """Train a Network in Network on images, test it, and write a run folder with a report.

    Args:
        data: "digits" (comes along), an image folder (DIR/CLASS/*, or DIR/train and DIR/test), WebDataset shards (a
            folder or a pattern of tar files), or mnist, fashion-mnist, cifar10, cifar100, svhn.
        out: The run folder to make: model.safetensors, config.json, metrics.csv, timings.csv, report.html.
        data_dir: Where the files of mnist to svhn lie; without it they are downloaded to ~/.cache/nin.
        size: Height and width that images are brought to, in pixels. If not given, that of the weights that the
            training begins with, else chosen from the images.
        resize: How images become squares: crop (the centre square), squash (the whole image, distorted) or letterbox
            (the whole image, with grey bars); if not given, as for the weights that the training begins with, else
            crop. Kept in the run, for every image that it is given later.
        test_fraction: Share of each class that is held out for testing, where the data have no test images of their
            own.
        config: The recipe.
        folds: Cross-validate instead, where there are few images: divide the training images into so many parts, train
            without one at a time, and test on it. The run folders are fold-1 … in the one that is given, which gets
            folds.json with mean and spread; the test images are left alone.
        resume: Go on with the training in the run folder that was interrupted; the result is that of one never
            stopped. Options that are not given are as they were. Where there is none yet, begin it.
        override: Resume although settings or data are not those of the run; what differs is recorded in config.json.
        checkpoint_minutes: Write the state at least this often.
        checkpoint_steps: Write the state after every so many steps, too.
        overwrite: Remove the run that lies in the run folder before the training begins; a folder that holds anything
            else is refused.
        tensorboard: Write TensorBoard's event files, with the figures of metrics.csv, into the folder tensorboard of
            the run folder.
        strict: Stop at the first file that cannot be read, instead of leaving it out.
        trust: Import the module that makes the network of the run that is resumed, where that is somebody's own code
            and --model does not name it again.
        json: Print the result as JSON on standard output.
    """
    if not checkpoint_minutes > 0 or (checkpoint_steps is not None and checkpoint_steps < 1):
        raise UserError(
            f"checkpoint_minutes must be above 0 and checkpoint_steps at least 1, got {checkpoint_minutes} and "
            f"{checkpoint_steps}"
        )
    settings: TrainConfig = config or TrainConfig()
    # what needs no PyTorch, whose import takes seconds
    if torchrun.rank() == 0:  # which the others may find begun
        check_folder = folders.check_run if folds is None else folders.check_folds
        check_folder(out, resume=resume, overwrite=overwrite)
    names.check_source(data)
    if settings.model is not None:
        names.check_network(settings.model)
    from nin import training
    from nin.runtime.device import choose_device

    with nin.models.trust() if trust else contextlib.nullcontext():
        loading: dict[str, Any] = {"size": size, "resize": resize, "test_fraction": test_fraction, "data_dir": data_dir}
        loading["seed"] = None
        if resume:  # what is not given is as the training was begun
            settings = training.with_recorded_settings(settings, out)
            loading = training.with_recorded_loading(loading, out)
        choose_device(settings.device)  # before the images, so that a mistake shows at once
        silence_other_ranks()
        start = training.starting_point(settings, resumed=out if resume and folders.has_begun(out) else None)
        settings = start.config
        was_finished = resume and folders.is_finished(out)
        if resume and folds is None and not folders.has_begun(out):
            messages.print(f"{out} holds nothing to resume yet: the training begins.")
        resumes = resume and folders.has_begun(out)
        training.check_before_images(start, data, resumes=resumes, tensorboard=tensorboard)
        asked = {name: loading.pop(name) for name in ("size", "resize", "test_fraction")}
        loading |= start.load_options(data, **asked)
        if loading["seed"] is None:
            loading["seed"] = settings.seed
        images = load_data(data, photos=settings.augment != "none", strict=strict, **loading)
        if resume and settings.flip is None:
            images = training.with_recorded_augmentation(images, out)
        messages.print(flip_text(images, settings))
        if folds is None:
            seed = start.validation_seed(images, settings)
            images = nin.data.split_validation(images, settings.validation, seed=seed)
            if images.validation is not None:
                of_own = settings.validation is None
                which = "images of the validation part are" if of_own else "of the images to train on are set apart"
                messages.print(
                    f"{len(images.validation):,} {which} to choose by; the test images are looked at once, at the end"
                )
        keeping: dict[str, Any] = {"override": override, "minutes": checkpoint_minutes, "steps": checkpoint_steps}
        keeping |= {"tensorboard": tensorboard, "overwrite": overwrite}
        if folds is not None:
            command = resume_command(data, out, folds)
            train_folds(images, settings, folds=folds, out=out, command=command, json=json, resume=resume, **keeping)
            return
        command = resume_command(data, out, None)
        result = train_with_progress(images, settings, out=out, command=command, resume=resume, **keeping)
        if was_finished:  # with other settings it is refused
            messages.print(f"{out} is finished; this is its result.")
        if torchrun.rank() > 0:
            return
        with nin.models.trust(result.info.recipe["model"]):
            page = write_report(out, images)
        if json:
            print_json({"run": str(out), **result.info.result, "model": result.info.recipe["model"]})
            return
        show_result(result)
        messages.print(f"Look at what it learned: {page}\nUse it:                  nin predict {out} IMAGE…")


def resume_command(data: str, out: Path, folds: int | None) -> str:
    """Return what resumes a training: its settings are in the run folder."""
    if torchrun.world_size() > 1:
        return f"the same torchrun command and --resume ({out})"
    options = ["--out", str(out), *(["--folds", str(folds)] if folds else []), "--resume"]
    return f"nin train {shlex.join([data, *options])}"


def load_data(source: str, *, load: Callable[..., nin.data.Data] | None = None, **options: Any) -> nin.data.Data:
    """Load a data set with a progress bar, by `nin.data.load` if not given, and print what was left out."""
    with ProgressBar(f"Reading {source}") as bar:
        images = (load or nin.data.load)(source, on_progress=bar.on_progress, **options)
    for note in images.notes:
        messages.print(note)
    show_findings(images.findings)
    to_choose_by = "" if images.validation is None else f"{len(images.validation):,} to choose by, "
    size = f"{images.size}×{images.size} {'grey' if images.channels == 1 else 'colour'}"
    messages.print(
        f"{images.name}: {format_number_of(len(images.train), 'image')} to train on, "
        f"{to_choose_by}{len(images.test):,} to test, {size}, {len(images.classes)} classes"
    )
    return images


def flip_text(images: nin.data.Data, config: TrainConfig) -> str:
    """Return in one line whether images are mirrored, why, and how to change it."""
    given = False if config.augment == "none" else config.flip
    flip = images.flip if given is None else given
    reason = f"{images.flip_reason} (--{'no-' if flip else ''}flip changes it)" if given is None else "as asked"
    return f"{'Half of the images are mirrored in each epoch' if flip else 'No image is mirrored'}: {reason}"


def train_with_progress(
    images: nin.data.Data,
    config: TrainConfig,
    *,
    out: Path,
    command: str,
    overwrite: bool = False,
    **checkpoint_options: Any,
) -> TrainResult:
    """Train with a bar on a terminal and a line for every epoch; Ctrl-C and SIGTERM stop it after the step.

    Args:
        images: to train on and to test.
        config: the recipe.
        out: the run folder to make.
        command: what resumes the training, to be printed when it was stopped.
        overwrite: whether to remove a run that lies there.
        **checkpoint_options: of `nin.training.CheckpointOptions`.
    """
    from nin import training

    with training_bar(out, command) as (bar, stop):
        keeping = training.CheckpointOptions(**checkpoint_options, stop=stop)
        return training.train(
            images,
            config,
            out=out,
            keeping=keeping,
            on_progress=bar.show,
            on_note=bar.line,
            overwrite=overwrite,
        )


def train_folds(
    images: nin.data.Data,
    config: TrainConfig,
    *,
    folds: int,
    out: Path,
    command: str,
    json: bool,
    overwrite: bool,
    **checkpoint_options: Any,
) -> None:
    """Cross-validate with a bar on a terminal, and print the figures of each fold, their mean and their spread."""
    from nin import training

    with training_bar(out, command) as (bar, stop):
        keeping = training.CheckpointOptions(**checkpoint_options, stop=stop)
        result = training.cross_validate(
            images,
            config,
            folds=folds,
            out=out,
            keeping=keeping,
            overwrite=overwrite,
            on_fold=lambda number, fold: bar.line(
                f"fold {number} of {folds}: {accuracy_text(fold.info.result, 'test_accuracy')}"
            ),
            on_note=bar.line,
            on_progress=lambda number, p: bar.show(p, f"fold {number}/{folds}  "),
        )
    if torchrun.rank() > 0:
        return
    if json:
        print_json({"run": str(out), **result.to_dict()})
        return
    columns = [["fold", *(str(number) for number in range(1, folds + 1)), "mean", "spread"]]
    for name, figure in result.figures.items():
        values = (*figure["values"], figure["mean"], figure["std"])
        cells = [f"{value:.3f}" if name == "test_loss" else format_percent(value, 1) for value in values]
        columns.append([name.removeprefix("test_").replace("_", " "), *cells])
    print_table(zip(*columns, strict=True), left=1, title=f"{folds} folds of {len(images.train):,} images")
    messages.print(
        f"The spread is the standard deviation over the folds. The {len(images.test):,} test images were left alone.\n"
        f"What a fold looks like: nin report {out / 'fold-1'}"
    )


class TrainingBar(ProgressBar):
    """A progress bar with the lines of a training, and of each fold's."""

    def __init__(self) -> None:
        super().__init__("Training")
        self.lines: dict[str, ProgressLines] = {}

    def show(self, p: TrainProgress, prefix: str = "") -> None:
        """Show how far a training is."""
        from nin.training.progress_lines import ProgressLines

        lines = self.lines.setdefault(prefix, ProgressLines())
        for line in lines.after(p):
            self.line(f"{prefix}{line}")
        self.update(p.step, p.steps, f"{prefix}{lines.text(p)}", seconds_left=p.seconds_left)


@contextlib.contextmanager
def training_bar(out: Path, command: str) -> Iterator[tuple[TrainingBar, Callable[[], bool]]]:
    """Yield a bar and what tells whether to stop; Ctrl-C and SIGTERM stop a training after the step.

    Args:
        out: the folder to make.
        command: what resumes the training, to be printed when it was stopped.
    """
    with TrainingBar() as bar, catch_stop_signals() as received:
        try:
            yield bar, lambda: bool(received)
        except KeyboardInterrupt:
            bar.line(f"Go on with: {command}" if out.is_dir() else "Nothing was written.")
            raise


def show_result(result: TrainResult) -> None:
    """Print the test accuracy with its interval, the model, its size and the time it took."""
    from nin.profiling.cost import count_parameters

    r, recipe = result.info.result, result.info.recipe
    parameters = count_parameters(result.model)
    if "validation_accuracy" in r:
        epoch = f"epoch {r['best_epoch']} is the best by the validation images, " if "best_epoch" in r else ""
        text = f"{accuracy_text(r, 'validation_accuracy')}, {format_number_of(r['validation_images'], 'image')}"
        messages.print(f"{epoch}validation accuracy {text}")
    results.print(f"test accuracy {accuracy_text(r, 'test_accuracy')}, {format_number_of(r['test_images'], 'image')}")
    if "test_classes" in r:  # runs of version 0.1 have none
        worst = min(r["test_classes"], key=lambda row: (row["images"] == 0, row["f1"]))
        results.print(
            f"  balanced accuracy {format_percent(r['test_balanced_accuracy'], 2)}, macro-F1 "
            f"{format_percent(r['test_macro_f1'], 2)}; the lowest F1 is that of {worst['class']}, "
            f"{format_percent(worst['f1'], 2)}"
        )
    if "test_accuracy_flip" in r:
        results.print(f"  with a mirrored second view of each: {accuracy_text(r, 'test_accuracy_flip')}")
    seconds = r["seconds"]
    duration = format_number_of(round(seconds), "second") if seconds < 120 else f"{seconds / 60:.1f} minutes"
    early = f", {len(result.metrics)} of {recipe['epochs']} epochs" if len(result.metrics) < recipe["epochs"] else ""
    messages.print(
        f"{recipe['model']}, {parameters:,} parameters, trained for {duration} in {recipe['precision']}{early}"
    )


def accuracy_text(result: dict[str, Any], name: str) -> str:
    """Return an accuracy of a run's result with its interval, in percent."""
    interval = format_percent_range(result[f"{name}_interval"], 2)
    return f"{format_percent(result[name], 2)} (95 % interval {interval})"


def write_report(run: Path, images: nin.data.Data | None) -> Path:
    """Write the report with a progress bar: it predicts all test images."""
    from nin import report

    with ProgressBar("Writing the report") as bar:
        return report.write_report(run, images, on_progress=bar.on_progress)
