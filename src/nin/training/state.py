"""The state of a training: what of it is saved, when, and how it is resumed."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nin import checkpoint, data, folders, given, models
from nin.config import TrainConfig
from nin.display.numbers import shorten
from nin.errors import UserError
from nin.runtime import distributed
from nin.runtime.fingerprint import changed_settings
from nin.training.early_stopping import EarlyStopping
from nin.training.step import TrainStep
from nin.value_checks import check_value

# In the data's record, but no setting: sentences.
_REMARKS = ("notes", "flip_reason")

# options of `nin.data.load` in the data's record
_LOAD_OPTIONS = ("data_dir", "size", "test_fraction", "resize", "seed")


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When the state of a training is saved, and whether to resume from it. None of it changes the results.

    Attributes:
        resume: go on with the training that was interrupted in the run folder; begin it where there is none.
        override: resume although settings or data differ; the differences are recorded in ``config.json``.
        minutes: save the state at least this often; it is saved at the end of every epoch too.
        steps: save the state after every so many steps, or None.
        tensorboard: write TensorBoard's event files, too.
        stop: called after every step, and during what comes before the first one; when it returns True, the state is
            saved, if there is one, and the training ends with KeyboardInterrupt.
    """

    resume: bool = False
    override: bool = False
    minutes: float = 5.0
    steps: int | None = None
    tensorboard: bool = False
    stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        """Check the values."""
        check_value("minutes", self.minutes, float, lambda x: x > 0, "above 0")
        if self.steps is not None:
            check_value("steps", self.steps, int, lambda x: x >= 1, "at least 1")

    def is_due(self, *, step: int, seconds: float) -> bool:
        """Return whether to save the state after a step, so many seconds after it was last saved."""
        return (self.steps is not None and step % self.steps == 0) or seconds > 60 * self.minutes


@dataclasses.dataclass
class Position:
    """How far a training is, and the sums over the steps of the current epoch."""

    epoch: int = 0
    step: int = 0  # of the epoch
    loss_sum: float = 0.0
    hits: int = 0
    seen: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0  # of the epochs before


@dataclasses.dataclass
class TrainState:
    """What changes during a training, apart from the tensors of `TrainStep`.

    Attributes:
        position: epoch, step and sums.
        metrics: one row for each epoch that has ended.
        overridden: settings that were changed when it was resumed, in words.
        lost: images that cannot be read any more: the reason by path.
    """

    position: Position = dataclasses.field(default_factory=Position)
    metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)
    overridden: list[str] = dataclasses.field(default_factory=list)
    lost: dict[str, str] = dataclasses.field(default_factory=dict)


def save_state(
    folder: Path,
    train_step: TrainStep,
    early_stopping: EarlyStopping,
    state: TrainState,
    settings: dict[str, dict[str, Any]],
) -> None:
    """Write ``state.safetensors`` into a run folder.

    Args:
        folder: the run folder.
        train_step: whose tensors are saved.
        early_stopping: whose tensors are saved too.
        state: the rest.
        settings: of recipe and data, compared when the training is resumed.
    """
    tensors = {**train_step.optimizer.state_dict(), **early_stopping.state_dict()}
    checkpoint.save_state(folder, tensors, {**dataclasses.asdict(state), **settings})


def load_state(
    folder: Path,
    train_step: TrainStep,
    early_stopping: EarlyStopping,
    settings: dict[str, dict[str, Any]],
    *,
    override: bool,
) -> TrainState:
    """Restore what `save_state` wrote: the tensors into ``train_step`` and ``early_stopping``, the rest as the result.

    Raises:
        UserError: it is damaged, or it has other settings and ``override`` is False.
    """
    tensors, values = checkpoint.load_state(folder)
    now, before = (all_settings(each["recipe"], each["data"]) for each in (settings, values))
    changed = list_changed(now, before)
    if changed and not override:
        raise UserError(
            f"{folder} was begun with {describe_changes(now, before)}: leave that away, or --override to go on anyway"
        )
    train_step.optimizer.load_state_dict(early_stopping.load_state_dict(tensors))
    overridden = [*values["overridden"], *changed]
    return TrainState(Position(**values["position"]), values["metrics"], overridden, dict(values["lost"]))


def all_settings(recipe: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a training and of its data in one, where the seed of the test images has another name."""
    return {**recipe, **{"split_seed" if name == "seed" else name: value for name, value in data.items()}}


def list_changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Return the settings that are not what they were, in words; what was only said of them may be said otherwise."""
    changed = [row for row in changed_settings(now, before) if row[0] not in _REMARKS]
    return [f"{name}={old}, now {name}={new}" for name, old, new in changed]


def describe_changes(now: dict[str, Any], before: dict[str, Any]) -> str:
    """Return the settings that are not what they were, for a message: by the names of their options, and shortened."""
    options = {field.name for field in dataclasses.fields(TrainConfig)} | {*_LOAD_OPTIONS}
    texts = []
    for name, old, new in changed_settings(now, before):
        if name in _REMARKS:
            continue
        label = f"--{name.replace('_', '-')}" if name in options else name.replace("_", " ")
        values = ["not given" if value is None else shorten(str(value)) for value in (old, new)]
        texts.append(f"{label} {values[0]}, now {values[1]}")
    most = 5
    return "; ".join([*texts[:most], *([f"{len(texts) - most} more"] if len(texts) > most else [])])


def recorded_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe and the data's record of the training in a run folder; two empty ones where there is none.

    Raises:
        UserError: what is there is damaged.
    """
    if (folder / checkpoint.STATE_FILE).exists():
        values = checkpoint.load_state(folder)[1]
        return values["recipe"], values["data"]
    if (folder / checkpoint.CONFIG_FILE).exists():
        info = checkpoint.load_info(folder)
        return info.recipe, info.data
    return {}, {}


def with_recorded_settings(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return the settings of the training in a run folder, where there is one, in the place of those not given.

    Those that go by the images are in `with_recorded_augmentation`.

    Raises:
        UserError: what is in the folder is damaged, or the network is made by somebody's module that is neither named
            again nor trusted.
    """
    recipe = recorded_settings(folder)[0]
    untouched = {field.name for field in dataclasses.fields(config)} - config.given
    # what the training found for "auto"
    found = {name for name in ("learning_rate", "batch_size") if getattr(config, name) == "auto"}
    names = ((untouched | found) & recipe.keys()) - {"flip", "shift"}
    model = recipe.get("model")
    if "model" in names and isinstance(model, str) and not models.is_trusted(model):
        raise UserError(
            f"{folder} was begun with {model}, code that is not nin's: if you trust it, name it again with --model "
            f"{model}, or give --trust, in Python with nin.models.trust()"
        )
    return given.replace(config, **{name: recipe[name] for name in names})


def with_recorded_loading(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return options of `nin.data.load`, those that are None as the training in a run folder has them."""
    record = recorded_settings(folder)[1]
    recorded = {name: record.get(name) for name in _LOAD_OPTIONS}
    if isinstance(recorded["resize"], dict):
        recorded["resize"] = recorded["resize"].get("mode")
    return {name: recorded.get(name) if value is None else value for name, value in options.items()}


def with_recorded_augmentation(images: data.Data, folder: Path) -> data.Data:
    """Return the images with the flip and the shift of the training in a run folder, where there is one.

    Raises:
        UserError: what is there is damaged.
    """
    recipe = recorded_settings(folder)[0]
    flip, shift = recipe.get("flip", images.flip), recipe.get("shift", images.shift)
    if not isinstance(flip, bool) or not isinstance(shift, int) or (flip, shift) == (images.flip, images.shift):
        return images
    reason = images.flip_reason if flip == images.flip else "the training was begun so"
    return dataclasses.replace(images, flip=flip, shift=shift, flip_reason=reason)


def check_run_folder(out: Path | None, *, resume: bool, overwrite: bool = False) -> None:
    """Check that a training may write its run folder, before anything is read or computed.

    Raises:
        UserError: it holds an unfinished run that is not to be resumed, or something else; or it is to be resumed and
            overwritten.
    """
    folders.check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    if out is not None and distributed.is_main_process():
        folders.check_run(out, resume=resume, overwrite=overwrite)


def run_folder(out: Path | None, *, resume: bool, overwrite: bool = False) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a training writes its run folder, see `nin.checkpoint.output_folder`.

    Raises:
        UserError: as `check_run_folder`.
    """
    if out is not None and overwrite and not resume and distributed.is_main_process():
        folders.remove_run(out)
    check_run_folder(out, resume=resume)
    return checkpoint.output_folder(out, may_contain=None if resume else folders.LEFT_BEHIND)
