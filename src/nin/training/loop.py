"""The training loop: epochs, steps, tests and checkpoints."""

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nin import checkpoint, data, folders
from nin.checkpoint import Preprocessing, RunInfo
from nin.epoch_metrics import save_learning_rate_test
from nin.errors import UserError
from nin.inference import metrics
from nin.inference.evaluation import Part, evaluate, gather_scores, wilson_interval
from nin.runtime import distributed
from nin.training import batches
from nin.training.early_stopping import EarlyStopping, best_epoch
from nin.training.event_log import EventLog
from nin.training.head_fit import HeadFit, fit_class_layer, no_fit_reason
from nin.training.learning_rate_test import find_learning_rate
from nin.training.loss_reader import LossReader, loss_read_interval
from nin.training.progress import ProgressReporter, TrainProgress
from nin.training.result import TrainResult, data_record, load_result, network_description, write_run
from nin.training.state import (
    CheckpointOptions,
    Position,
    TrainState,
    load_state,
    save_state,
)
from nin.training.step import TrainStep

# A training goes on without so many files, or a hundredth of all: more are gone only if their disk is.
MAX_LOST_FILES = 10


class Trainer:
    """Trains until the last epoch, tests, and writes the run folder.

    Args:
        images: the data set.
        train_step: the network and its optimiser.
        folder: the run folder, or None.
        options: when the state is saved, and whether to resume.
        on_progress: called after every step and every epoch.
    """

    def __init__(
        self,
        images: data.Data,
        train_step: TrainStep,
        folder: Path | None,
        options: CheckpointOptions,
        on_progress: Callable[[TrainProgress], None],
    ) -> None:
        self.train_step, self.config, self.device = train_step, train_step.config, train_step.device
        self.folder, self.options = folder, options
        self.output = folder if distributed.is_main_process() else None  # one process writes
        self.images = batches.hold_images(images, self.config, self.device)
        if self.config.balance == "weights":
            weights = batches.class_weights(images.train.labels, len(images.classes))
            train_step.class_weights = weights.to(self.device)
        self.network = network_description(train_step.ema_model, folder)
        self.settings = {"recipe": dataclasses.asdict(self.config), "data": data_record(self.images)}
        count = len(images.train)
        self.steps_per_epoch = 1 if self.config.freeze else batches.count_steps_per_epoch(count, self.config.batch_size)
        self.steps = self.steps_per_epoch * self.config.epochs
        event_log = EventLog(self.output) if self.output is not None and options.tensorboard else None
        self.reporter = ProgressReporter(self.steps, self.config.epochs, self.output, event_log, on_progress)
        self.state = TrainState()
        self.early_stopping = EarlyStopping(self.config.patience)
        self.saved_at = time.monotonic()
        self.losses = LossReader(loss_read_interval(self.device), self.output)

    def run(self) -> TrainResult:
        """Train the epochs that are left, with the other processes of the job, and return the result."""
        with contextlib.closing(self.reporter), distributed.process_group(self.device):
            if self.options.resume:
                assert self.folder is not None
                if folders.is_finished(self.folder):
                    return load_result(self.folder, self.info({}))
                self.state = load_state(
                    self.folder, self.train_step, self.early_stopping, self.settings, override=self.options.override
                )
            elif (
                self.config.recipe == "finetune" and not self.config.freeze and not no_fit_reason(self.train_step.model)
            ):
                self.fit_class_layer()
            with self.train_step.data_parallel(min(self.config.batch_size, len(self.images.train))):
                if self.config.finds("learning_rate"):
                    self.find_learning_rate()
                while not self.is_over:
                    self.train_epoch()
                return self.finish()

    @property
    def is_over(self) -> bool:
        """Whether all epochs are trained, or validation says that more are of no use."""
        return self.state.position.epoch >= self.config.epochs or self.early_stopping.is_over(self.state.metrics)

    def train_epoch(self) -> None:
        """Train what is left of an epoch, test, and write the run folder."""
        p = self.state.position
        started, before = time.perf_counter(), p.epoch_seconds
        if self.config.freeze:
            fit = self.fit_class_layer()
            p.step, p.loss_sum, p.hits, p.seen = 1, fit.loss * fit.images, fit.hits, fit.images
        else:
            for x, labels in self.batches(p.epoch, p.step):
                loss = self.take_step(x, labels)
                p.epoch_seconds = before + time.perf_counter() - started
                self.reporter.after_step(self.step, p.epoch + 1, loss)
                self.save_if_due()
            self.read_losses()
        p.epoch_seconds = before + time.perf_counter() - started
        row = self.end_epoch()
        self.state.metrics.append(row)
        self.early_stopping.keep_if_best(self.train_step.ema_model, self.state.metrics)
        self.state.position = Position(epoch=p.epoch + 1, seconds=row["seconds"])
        if self.output is not None:
            self.save(self.output)
            with self.early_stopping.best_weights(self.train_step.ema_model):
                write_run(self.output, self.train_step.ema_model, self.info({}), self.state, self.images)
        self.reporter.after_epoch(
            self.step, self.state.metrics, self.early_stopping.end_note(self.state.metrics, self.config.epochs)
        )
        if self.config.freeze and self.is_to_stop():  # it takes no steps, after which others ask
            raise KeyboardInterrupt

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's part of the batches of an epoch, images and labels."""
        options: dict[str, Any] = {"ahead": self.losses.interval > 1, "on_lost": self.on_lost}
        return batches.epoch_batches(
            self.images, self.config, self.device, epoch=epoch, first_step=first_step, **options
        )

    def fit_class_layer(self) -> HeadFit:
        """Fit the class layer to the features of the other layers, in the trained network and in the averaged one."""
        step, phase = self.train_step, "features of the frozen layers"
        fit = fit_class_layer(
            step.model,
            self.images,
            self.config,
            device=self.device,
            dtype=step.dtype,
            class_weights=step.class_weights,
            on_lost=self.on_lost,
            on_progress=lambda done, count: self.before_steps(phase, done, count, math.nan),
        )
        step.ema_model.load_state_dict(step.model.state_dict())
        return fit

    def find_learning_rate(self) -> None:
        """Find the learning rate by a range test, and write its curve into the run folder."""
        phase = "range test of the learning rate"
        found = find_learning_rate(
            self.train_step,
            self.config,
            itertools.chain.from_iterable(map(self.batches, itertools.count())),
            on_progress=lambda *figures: self.before_steps(phase, *figures),
        )
        self.config = self.train_step.config = dataclasses.replace(self.config, learning_rate=found.learning_rate)
        self.settings["recipe"]["learning_rate"] = found.learning_rate
        if self.output is not None:
            save_learning_rate_test(self.output, found.rates, found.losses)

    def before_steps(self, phase: str, done: int, count: int, loss: float) -> None:
        """Report what comes before the first step.

        Raises:
            KeyboardInterrupt: ``options.stop`` returned True; there is no state yet that could be lost.
        """
        self.reporter.before_steps(phase, done, count, loss)
        if self.options.stop():
            raise KeyboardInterrupt

    @property
    def step(self) -> int:
        """Steps done since the beginning."""
        return self.state.position.epoch * self.steps_per_epoch + self.state.position.step

    def take_step(self, x: Tensor, labels: Tensor) -> float:
        """Take one step of the optimiser; return the last loss that was read."""
        loss, scores = self.train_step(x, labels, self.step, self.steps)
        targets = labels.argmax(1) if labels.dim() == 2 else labels  # of mixed images the larger part
        hits, count = (scores.argmax(1) == targets).sum(), len(labels)
        if distributed.world_size() > 1:
            hits, images = distributed.all_reduce_sum(torch.stack([hits, hits.new_tensor(count)]))
            count = int(images)
        self.state.position.step += 1
        if self.losses.add(loss, hits, count):
            self.read_losses()
        return self.losses.last

    def read_losses(self) -> None:
        """Add the losses and hits of the steps since the last time to the epoch's sums.

        Raises:
            UserError: a loss is no finite number.
        """
        self.losses.read(self.state.position, step=self.step, learning_rate=self.config.learning_rate)

    def end_epoch(self) -> dict[str, float]:
        """Test, and return the epoch's metrics."""
        p, started = self.state.position, time.perf_counter()
        part: Part = "test" if self.images.validation is None else "validation"
        figures = metrics.epoch_figures(*self.scores(part, dtype=self.train_step.dtype))
        for text in distributed.all_gather_text(json.dumps(self.state.lost)):
            self.state.lost |= json.loads(text)
        return {
            "epoch": p.epoch + 1,
            "step": self.step,
            "learning_rate": 0.0 if self.config.freeze else self.train_step.learning_rate(self.step - 1, self.steps),
            "train_loss": p.loss_sum / p.seen,
            "train_accuracy": p.hits / p.seen,
            **{f"{part}_{name}": value for name, value in figures.items()},
            "seconds": p.seconds + p.epoch_seconds + time.perf_counter() - started,
            "images_per_second": p.seen / p.epoch_seconds,
        }

    def scores(self, part: Part, *, dtype: torch.dtype, flip: bool = False) -> tuple[Tensor, Tensor]:
        """Return the scores of the averaged weights for a part of the data set, and the labels, in all processes."""
        images = self.images.test if part == "test" else self.images.validation
        scores, labels = evaluate(
            self.train_step.ema_model,
            self.images,
            part=part,
            device=self.device,
            dtype=dtype,
            flip=flip,
            on_lost=self.on_lost,
        )
        return gather_scores(scores, labels, len(images or ()))

    def on_lost(self, path: str, reason: str) -> None:
        """Record a file that can no longer be read, and go on without it; too many of them end the training.

        Raises:
            UserError: so many are lost that something else must be wrong.
        """
        lost = self.state.lost
        lost[path] = reason
        if len(lost) > max(MAX_LOST_FILES, (len(self.images.train) + len(self.images.test)) // 100):
            raise UserError(
                f"{len(lost)} images cannot be read any more, the last one is {path}: {reason}; bring them back "
                "and go on with --resume"
            )

    def save_if_due(self) -> None:
        """Save the state if it is time.

        Raises:
            KeyboardInterrupt: ``options.stop`` returned True; the state is saved.
        """
        stop = self.is_to_stop()
        if self.output is not None:
            is_due = self.options.is_due(step=self.step, seconds=time.monotonic() - self.saved_at)
            is_last = self.state.position.step == self.steps_per_epoch  # the epoch's end saves it anyway
            if stop or (is_due and not is_last):
                self.save(self.output)
        if stop:
            raise KeyboardInterrupt

    def is_to_stop(self) -> bool:
        """Return whether any process was asked to stop: all end after the same step."""
        stop = self.options.stop()
        if distributed.world_size() > 1:
            stop = bool(distributed.all_reduce_sum(torch.tensor(int(stop), device=self.device)))
        return stop

    def save(self, folder: Path) -> None:
        """Write ``state.safetensors``."""
        self.read_losses()
        save_state(folder, self.train_step, self.early_stopping, self.state, self.settings)
        self.saved_at = time.monotonic()

    def finish(self) -> TrainResult:
        """Test in float32, as the network is used, and with test-time flips where flips are on; write the result."""
        self.early_stopping.restore(self.train_step.ema_model)
        result: dict[str, Any] = {}
        if self.images.validation is not None:
            scores, labels = self.scores("validation", dtype=torch.float32)
            result["temperature"] = metrics.fit_temperature(scores, labels)
            result |= metrics.part_figures("validation", scores, labels)
        scores, labels = self.scores("test", dtype=torch.float32)
        result |= metrics.part_figures("test", scores, labels, temperature=result.get("temperature"))
        result |= metrics.test_details(scores, labels, self.images.classes)
        result["seconds"] = self.state.position.seconds
        if self.config.patience is not None:
            result["best_epoch"] = best_epoch(self.state.metrics)
        if self.config.flip:
            scores, labels = self.scores("test", dtype=torch.float32, flip=True)
            hits = int((scores.argmax(1) == labels).sum())
            result["test_accuracy_flip"] = hits / len(labels)
            result["test_accuracy_flip_interval"] = wilson_interval(hits, len(labels))
        info, model = self.info(result), self.train_step.ema_model
        if self.output is not None:
            write_run(self.output, model, info, self.state, self.images)
            checkpoint.remove_state(self.output)
        return TrainResult(model, info, self.state.metrics, self.folder)

    def info(self, result: dict[str, Any]) -> RunInfo:
        """Return the contents of ``config.json``; ``result`` is empty while training."""
        # not "auto": the results depend on what it became
        precision = "fp32" if self.train_step.dtype == torch.float32 else "bf16"
        overridden = {"overridden": self.state.overridden} if self.state.overridden else {}
        lost = {"lost": list(self.state.lost.items())} if self.state.lost else {}
        environment = {"device": str(self.device), "processes": distributed.world_size()}
        return RunInfo(
            model=self.network,
            classes=self.images.classes,
            preprocessing=Preprocessing.of(self.images),
            recipe={**self.settings["recipe"], "precision": precision, **overridden},
            data={**self.settings["data"], **lost},
            result=result,
            environment={**checkpoint.environment(), **environment},
        )
