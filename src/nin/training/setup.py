"""`train`: from images and a `nin.config.TrainConfig` to a result; what is decided before the first step."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from nin import data, folders, given
from nin.config import TrainConfig
from nin.errors import UserError
from nin.runtime import torchrun
from nin.runtime.device import choose_device, keep_freed_memory, use_threads
from nin.training import batches
from nin.training.batch_size_test import check_batch_size_test, find_batch_size
from nin.training.early_checks import check_before_images, raise_for_patience
from nin.training.loop import Trainer
from nin.training.progress import TrainProgress
from nin.training.progress_lines import shown_progress
from nin.training.result import TrainResult
from nin.training.starting_point import starting_point
from nin.training.state import (
    CheckpointOptions,
    check_run_folder,
    run_folder,
    with_recorded_augmentation,
    with_recorded_loading,
    with_recorded_settings,
)
from nin.training.step import TrainStep


def train(
    source: Any,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    keeping: CheckpointOptions | None = None,
    network: Callable[[], nn.Module] | None = None,
    on_progress: Callable[[TrainProgress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    progress: bool | None = None,
    overwrite: bool = False,
) -> TrainResult:
    """Train a network on images and test it.

    Args:
        source: a `nin.data.Data`, or whatever `nin.data.load` takes: "digits", a folder, arrays.
        config: the training settings; what is None is chosen from the data.
        out: the run folder to make: ``model.safetensors``, ``config.json``, ``metrics.csv``, ``timings.csv``.
            None writes nothing.
        keeping: how often the state is saved, and whether to resume.
        network: returns the network, the same after the same seed; if not given, the one that the settings name. A run
            folder holds networks of `nin.models` only.
        on_progress: called after every step and every epoch.
        on_note: called with lines for people: which of the weights that it begins with fit, and whether they have
            learned images that are to measure the network.
        progress: show a bar and a line for each epoch. If not given, they are shown in a notebook and on a terminal,
            unless ``on_progress`` is given.
        overwrite: remove the run that lies in ``out`` before this training begins, as for a notebook's cell that is run
            again. A folder that holds anything else is refused.

    Returns:
        The network with averaged weights, and its test accuracy with a 95 % interval.

    Raises:
        UserError: the data, the model and the settings do not fit together, or the loss is no number any more; one
            line that says what to do.
        OSError: the run folder cannot be written; it names the file.

    Example:
        >>> nin.train("digits", nin.TrainConfig(epochs=1)).info.result["test_images"]
        451
    """
    config = config or TrainConfig()
    folder, options = None if out is None else Path(out), keeping or CheckpointOptions()
    if folder is None and options.resume:
        raise UserError("resume goes on in a run folder: give out=")
    folders.check_resume_or_overwrite(resume=options.resume, overwrite=overwrite)
    # a supervisor says each time that it resumes, the first time too; torchrun restarts without saying so
    resume = (options.resume or torchrun.is_restarted()) and folder is not None and folders.has_begun(folder)
    options = dataclasses.replace(options, resume=resume)
    if folder is not None and resume:
        config = with_recorded_settings(config, folder)
    check_batch_size_test(config, choose_device(config.device))  # before the images, so that a mistake shows at once
    start = starting_point(config, resumed=folder if resume else None)
    config = start.config
    check_run_folder(folder, resume=resume, overwrite=overwrite and not resume)
    if isinstance(source, data.Data):
        images = source
    else:
        if network is None:
            check_before_images(start, source, resumes=resume, tensorboard=options.tensorboard)
        loading: dict[str, Any] = dict.fromkeys(("size", "resize", "test_fraction", "data_dir", "seed"))
        if folder is not None and resume:
            loading = with_recorded_loading(loading, folder)
        loading |= start.load_options(source, **{name: loading[name] for name in ("size", "resize", "test_fraction")})
        loading = {name: value for name, value in loading.items() if value is not None}
        images = data.load(source, photos=config.augment != "none", **loading)
    images = start.normalised(images)
    if folder is not None and options.resume:
        images = with_recorded_augmentation(images, folder)
    images = data.split_validation(images, config.validation, seed=start.validation_seed(images, config))
    for note in filter(None, (start.learned_note(images), config.unused_note())):
        if on_note is not None:
            on_note(note)
    if config.patience is not None and images.validation is None:
        raise_for_patience()
    of_images: Any = {"images": len(images.train), "image_size": images.size}
    of_images |= {"flip": images.flip, "shift": images.shift}
    resolved = config.resolve(**of_images)
    keep_freed_memory()
    if folder is not None and images.channels not in (1, 3):
        raise UserError(
            f"images: a run folder is for grey or RGB images, got {images.channels} channels: leave out= away and keep "
            "the result's model"
        )
    with use_threads(resolved.threads):
        make = network or start.make_model(resolved, images, resumes=resume, on_note=on_note or (lambda text: None))
        if resolved.finds("batch_size"):
            size = find_batch_size(resolved, images, make, choose_device(config.device))
            resolved = given.replace(config, batch_size=size).resolve(**of_images)
        batches.check_batch_size(resolved, len(images.train))
        train_step = TrainStep(make, resolved)
        with shown_progress(progress, on_progress) as report:
            trainer = Trainer(images, train_step, folder, options, report)
            with run_folder(folder, resume=options.resume, overwrite=overwrite):
                return trainer.run()
