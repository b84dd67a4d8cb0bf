"""Training: one loop, from `nin.data` and a `nin.config.TrainConfig` to a run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import checkpoint, data, models
from nin.checkpoint import Preprocessing, RunInfo
from nin.config import ResolvedConfig, TrainConfig
from nin.errors import UserError
from nin.inference.evaluation import evaluate, wilson_interval
from nin.runtime import device as machine
from nin.runtime import distributed, torchrun
from nin.runtime.files import write_atomically
from nin.training import metrics
from nin.training.step import TrainStep, make_model

# So many files may vanish while a training runs, or a hundredth of all, before it stops.
MOST_LOST_FILES = 10

# So many places of an epoch's order are held at a time.
ORDER_PIECE = 2**24

# On a GPU: steps between two looks at the loss, images that are augmented together, bytes of images that it holds.
READ_EVERY, AUGMENTED_TOGETHER, MOST_HELD_BYTES = 50, 8192, 4 << 30


@dataclasses.dataclass(frozen=True)
class TrainProgress:
    """Where a training is; what `train` tells its ``on_progress`` after every step and every epoch.

    Attributes:
        step: steps done, of ``steps``.
        steps: in the whole training.
        epoch: the current one, from 1, of ``epochs``.
        epochs: in the whole training.
        loss: of the last step.
        row: the figures of the epoch where one has just ended (see `nin.training.metrics`), else None.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    row: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training left.

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


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When and how a training is kept, and gone on with. None of it changes the numbers.

    Attributes:
        resume: go on with the training that was interrupted in the run folder.
        override: resume although settings or data differ; what differs is recorded in ``config.json``.
        minutes: write the state after so much time, at most; every epoch's end writes it too.
        steps: write the state after every so many steps, or None.
        stop: asked after every step; when it says True, the state is written and the training ends with
            KeyboardInterrupt.
    """

    resume: bool = False
    override: bool = False
    minutes: float = 5.0
    steps: int | None = None
    stop: Callable[[], bool] = lambda: False


def train(
    source: Any,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    keeping: CheckpointOptions | None = None,
    network: Callable[[], nn.Module] | None = None,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> TrainResult:
    """Train a network on images and test it.

    Args:
        source: a `nin.data.Data`, or whatever `nin.data.load` takes: "digits", a folder, arrays.
        config: the recipe; the default one chooses what is None from the data.
        out: the run folder to make: ``model.safetensors``, ``config.json``, ``metrics.csv``, ``timings.csv``.
            None writes nothing.
        keeping: how often the state is written, and whether to resume.
        network: makes the network, the same after the same seed; if not given, the one that the recipe names. A run
            folder holds networks of `nin.models` only.
        on_progress: called after every step and every epoch.

    Returns:
        The network with averaged weights, and its test accuracy with a 95 % interval.

    Raises:
        UserError: the data, the model and the recipe do not fit together, the loss is no number any more, or there
            is nothing to resume; one line that says what to do.
        OSError: the run folder cannot be written; it names the file.

    Example:
        >>> nin.train("digits", nin.TrainConfig(epochs=1)).info.result["test_images"]
        451
    """
    images = source if isinstance(source, data.Data) else data.load(source)
    recipe = (config or TrainConfig()).resolve(
        images=len(images.train), image_size=images.size, flip=images.flip, shift=images.shift
    )
    check_share(recipe, len(images.train))
    machine.keep_freed_memory()
    folder = None if out is None else Path(out)
    if folder is not None and images.channels not in (1, 3):
        raise UserError(
            f"images: a run folder is for grey or RGB images, got {images.channels} channels: leave out= away and keep "
            "the result's model"
        )
    keeping = keeping or CheckpointOptions()
    if folder is not None and torchrun.is_restarted() and has_begun(folder):
        keeping = dataclasses.replace(keeping, resume=True)
    with machine.use_threads(recipe.threads):
        sizes = {"channels": images.channels, "classes": len(images.classes), "size": images.size}
        train_step = TrainStep(network or (lambda: make_model(recipe, **sizes)), recipe)
        run = _Run(images, train_step, folder, keeping, on_progress or (lambda progress: None))
        if folder is None or not distributed.is_main_process():
            return run.train_together()
        prepare_folder(folder, resume=run.keeping.resume)
        try:
            return run.train_together()
        finally:
            if not any(folder.iterdir()):  # stopped before anything was written
                folder.rmdir()


@dataclasses.dataclass
class _Position:
    """How far a training is: plain numbers, and the sums over the epoch that is under way."""

    epoch: int = 0
    step: int = 0  # in the epoch
    loss_sum: float = 0.0
    hits: int = 0
    seen: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0  # of the epochs before


class _Run:
    """One training: where it is, what it writes and when."""

    def __init__(
        self,
        images: data.Data,
        train_step: TrainStep,
        folder: Path | None,
        keeping: CheckpointOptions,
        on_progress: Callable[[TrainProgress], None],
    ) -> None:
        config = train_step.config
        self.config, self.folder = config, folder
        self.keeping, self.on_progress = keeping, on_progress
        self.train_step = train_step
        self.images = hold_images(images, config, train_step.device)
        self.description = describe(train_step.ema_model, folder)
        self.steps_per_epoch = max(1, len(images.train) // config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.position = _Position()
        self.metrics: list[dict[str, float]] = []
        self.overridden: list[str] = []
        self.lost: dict[str, str] = {}
        self.saved = time.monotonic()
        # A GPU is waited for after so many steps only; what they gave is read together.
        self.read_every = READ_EVERY if runs_ahead(self.train_step.device) else 1
        self.unread: list[tuple[Tensor, Tensor, int]] = []
        self.last_loss = math.nan

    def train_together(self) -> TrainResult:
        """Train with the other processes of the job, where there are others."""
        with distributed.process_group(self.train_step.device):
            try:
                return self.train()
            finally:
                self.train_step.unwrap_ddp()

    def train(self) -> TrainResult:
        """Do what is left, and write the result."""
        if self.keeping.resume:
            assert self.folder is not None
            if is_finished(self.folder):
                return self.load_result(self.folder)
            self.load_state(self.folder)
        self.train_step.wrap_in_ddp(min(self.config.batch_size, len(self.images.train)))
        while self.position.epoch < self.config.epochs:
            self.train_epoch()
        return self.finish()

    def train_epoch(self) -> None:
        """Make the rest of one pass over the training images, test, and write what there is."""
        p, epochs = self.position, self.config.epochs
        started, before = time.perf_counter(), p.epoch_seconds
        for x, labels in self.batches():
            loss = self.take_step(x, labels)
            p.epoch_seconds = before + time.perf_counter() - started
            self.on_progress(TrainProgress(self.step, self.steps, p.epoch + 1, epochs, loss))
            self.keep()
        self.read()
        p.epoch_seconds = before + time.perf_counter() - started
        row = self.end_epoch()
        self.metrics.append(row)
        self.position = _Position(epoch=p.epoch + 1, seconds=row["seconds"])
        if self.writes:
            assert self.folder is not None
            self.save_state(self.folder)
            self.save_model(self.folder, self.info({}))
        self.on_progress(TrainProgress(self.step, self.steps, p.epoch + 1, epochs, row["train_loss"], row))

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder: one does."""
        return self.folder is not None and distributed.is_main_process()

    @property
    def step(self) -> int:
        """Steps done since the beginning."""
        return self.position.epoch * self.steps_per_epoch + self.position.step

    def take_step(self, x: Tensor, labels: Tensor) -> float:
        """Take one step and count it; return the last loss that is known."""
        loss, scores = self.train_step(x, labels, self.step, self.steps)
        hits, count = (scores.argmax(1) == labels).sum(), len(labels)
        if distributed.world_size() > 1:
            hits, images = distributed.all_reduce_sum(torch.stack([hits, hits.new_tensor(count)]))
            count = int(images)
        self.unread.append((loss, hits, count))
        self.position.step += 1
        if len(self.unread) >= self.read_every:
            self.read()
        return self.last_loss

    def read(self) -> None:
        """Wait for the steps that were taken, and count what they gave.

        Raises:
            UserError: a loss is no finite number.
        """
        p, unread = self.position, self.unread
        self.unread = []
        if not unread:
            return
        rows = torch.stack([torch.stack((loss.double(), hits.double())) for loss, hits, _ in unread]).tolist()
        for i, ((loss, hits), (_, _, count)) in enumerate(zip(rows, unread, strict=True)):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} at step {self.step - len(unread) + i + 1} (epoch {p.epoch + 1}); what was "
                    f"written before is kept. Try a lower learning_rate than {self.config.learning_rate}"
                )
            p.loss_sum += loss * count
            p.hits += int(hits)
            p.seen += count
            self.last_loss = loss

    def end_epoch(self) -> dict[str, float]:
        """Test, and return the epoch's figures."""
        p, testing = self.position, time.perf_counter()
        test_loss, test_hits, tested = self.test(dtype=self.train_step.dtype)
        for text in distributed.all_gather_text(json.dumps(self.lost)):
            self.lost |= json.loads(text)
        return {
            "epoch": p.epoch + 1,
            "step": self.step,
            "learning_rate": self.train_step.learning_rate(self.step - 1, self.steps),
            "train_loss": p.loss_sum / p.seen,
            "train_accuracy": p.hits / p.seen,
            "test_loss": test_loss,
            "test_accuracy": test_hits / tested,
            "seconds": p.seconds + p.epoch_seconds + time.perf_counter() - testing,
            "images_per_second": p.seen / p.epoch_seconds,
        }

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rest of this epoch: augmented images (B, C, H, W), as the network takes them, and labels (B,)."""
        config, images, p = self.config, self.images, self.position
        several = distributed.world_size() > 1
        # A GPU augments many batches at once: what an image becomes does not depend on the batch it is in.
        together = AUGMENTED_TOGETHER // config.batch_size if runs_ahead(self.train_step.device) and not several else 1
        for order, size in self.orders():
            stored = data.batches(images.train, order, size * max(1, together), on_lost=self.lose, empty=several)
            for pixels, labels, indices in stored:
                pixels = data.augment(
                    pixels.to(self.train_step.device),
                    indices.to(self.train_step.device),
                    seed=config.seed,
                    epoch=p.epoch,
                    flip=config.flip,
                    shift=config.shift,
                )
                x = data.to_float(pixels, images.mean, images.std, dtype=torch.float32)
                labels = labels.to(self.train_step.device)
                yield from zip(x.split(size), labels.split(size), strict=True)

    def orders(self) -> Iterator[tuple[Tensor, int]]:
        """Yield this process's part of the rest of this epoch's order, in long pieces, and its part of a batch."""
        config, images, epoch = self.config, self.images, self.position.epoch
        # The rest that fills no batch is left out: another one in every epoch.
        start, last = self.position.step * config.batch_size, self.steps_per_epoch * config.batch_size
        piece = max(1, ORDER_PIECE // config.batch_size) * config.batch_size
        for begin in range(start, last, piece):
            stop = min(begin + piece, last)
            order = data.epoch_order(len(images.train), seed=config.seed, epoch=epoch, start=begin, stop=stop)
            order, size = distributed.local_part(order, config.batch_size)
            yield order.to(images.train.labels.device), size

    def test(self, *, dtype: torch.dtype, flip: bool = False) -> tuple[float, int, int]:
        """Test the averaged weights; return the mean cross entropy, the right answers, and the number of images."""
        train_step, images = self.train_step, self.images
        scores, labels = evaluate(
            train_step.ema_model, images, device=train_step.device, dtype=dtype, flip=flip, on_lost=self.lose
        )
        hits = int((scores.argmax(1) == labels).sum())
        if distributed.world_size() == 1:
            return F.cross_entropy(scores, labels).item(), hits, len(labels)
        loss = F.cross_entropy(scores, labels, reduction="sum").item()
        sums = torch.tensor([loss, hits, len(labels)], dtype=torch.float64, device=train_step.device)
        loss, all_hits, count = distributed.all_reduce_sum(sums).tolist()
        return loss / count, int(all_hits), int(count)

    def lose(self, path: str, reason: str) -> None:
        """Go on without a file that was readable when the training began, but not without many.

        Raises:
            UserError: so many are lost that something else must be wrong.
        """
        self.lost[path] = reason
        if len(self.lost) > max(MOST_LOST_FILES, (len(self.images.train) + len(self.images.test)) // 100):
            raise UserError(
                f"{len(self.lost)} images cannot be read any more, the last one is {path}: {reason}; bring them back "
                "and go on with --resume"
            )

    def keep(self) -> None:
        """Write the state if it is time, and stop if somebody asked for it."""
        keeping = self.keeping
        stop = keeping.stop()
        if distributed.world_size() > 1:  # one of them may have been asked: all end after the same step
            stop = bool(distributed.all_reduce_sum(torch.tensor(int(stop), device=self.train_step.device)))
        if self.writes:
            assert self.folder is not None
            by_steps = keeping.steps is not None and self.step % keeping.steps == 0
            due = by_steps or time.monotonic() - self.saved > 60 * keeping.minutes
            ends = self.position.step == self.steps_per_epoch  # the epoch's end writes it anyway
            if stop or (due and not ends):
                self.save_state(self.folder)
        if stop:
            raise KeyboardInterrupt

    def save_state(self, folder: Path) -> None:
        """Write all that resuming needs."""
        self.read()
        values = {
            "position": dataclasses.asdict(self.position),
            "metrics": self.metrics,
            "overridden": self.overridden,
            "lost": self.lost,
            **self.settings(),
        }
        checkpoint.save_state(folder, self.train_step.state_dict(), values)
        self.saved = time.monotonic()

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return what must be the same when the training is resumed."""
        return {"recipe": dataclasses.asdict(self.config), "data": self.data_info()}

    def load_state(self, folder: Path) -> None:
        """Go back to the last state that was written to the folder.

        Raises:
            UserError: it is damaged, or belongs to other settings or data and nobody said to override.
        """
        tensors, values = checkpoint.load_state(folder)
        now = {**self.settings()["recipe"], **self.settings()["data"]}
        differing = list_differing(now, {**values["recipe"], **values["data"]})
        if differing and not self.keeping.override:
            raise UserError(
                f"{folder} was begun with {'; '.join(differing)}: give the same, or --override to go on anyway"
            )
        self.overridden = [*values["overridden"], *differing]
        self.lost = dict(values["lost"])
        self.train_step.load_state_dict(tensors)
        self.position, self.metrics = _Position(**values["position"]), values["metrics"]

    def load_result(self, folder: Path) -> TrainResult:
        """Return what the training that has ended in the folder left.

        Raises:
            UserError: it was trained with other settings or data.
        """
        model, info = checkpoint.load_model(folder)
        here = self.info({})  # where the recipe says "auto", both say what became of it
        differing = list_differing({**here.recipe, **here.data}, {**info.recipe, **info.data})
        if differing:
            raise UserError(f"{folder} is finished, with {'; '.join(differing)}: give another --out")
        figures = metrics.read_csv(folder / checkpoint.METRICS_FILE)
        timings = metrics.read_csv(folder / checkpoint.TIMINGS_FILE)
        rows = [figure | timing for figure, timing in zip(figures, timings, strict=True)]
        return TrainResult(model, info, rows, folder)

    def finish(self) -> TrainResult:
        """Test in float32, as the network is used, and write the result.

        Where mirroring is allowed, test with a mirrored second view as well.
        """
        loss, hits, count = self.test(dtype=torch.float32)
        result: dict[str, Any] = {
            "test_accuracy": hits / count,
            "test_accuracy_interval": wilson_interval(hits, count),
            "test_images": count,
            "test_loss": loss,
            "seconds": self.position.seconds,
        }
        if self.config.flip:
            _, hits, count = self.test(dtype=torch.float32, flip=True)
            result["test_accuracy_flip"] = hits / count
            result["test_accuracy_flip_interval"] = wilson_interval(hits, count)
        info = self.info(result)
        if self.writes:
            assert self.folder is not None
            self.save_model(self.folder, info)
            checkpoint.remove_state(self.folder)
        return TrainResult(self.train_step.ema_model, info, self.metrics, self.folder)

    def save_model(self, folder: Path, info: RunInfo) -> None:
        """Write the averaged weights, what they are, and the figures so far."""
        if self.images.findings:
            write_atomically(folder / checkpoint.FINDINGS_FILE, data.findings_csv(self.images.findings))
        checkpoint.save_model(folder, self.train_step.ema_model, info)
        write_atomically(folder / checkpoint.METRICS_FILE, metrics.csv_text(self.metrics, metrics.METRICS))
        write_atomically(folder / checkpoint.TIMINGS_FILE, metrics.csv_text(self.metrics, metrics.TIMINGS))

    def info(self, result: dict[str, Any]) -> RunInfo:
        """Return what ``config.json`` says."""
        images = self.images
        precision = "fp32" if self.train_step.dtype == torch.float32 else "bf16"
        overridden = {"overridden": self.overridden} if self.overridden else {}
        lost = {"lost": list(self.lost.items())} if self.lost else {}
        return RunInfo(
            model=self.description,
            classes=images.classes,
            preprocessing=Preprocessing(images.size, images.channels, images.mean, images.std),
            recipe={**dataclasses.asdict(self.config), "precision": precision, **overridden},
            data={**self.data_info(), **lost},
            result=result,
            environment={
                **checkpoint.environment(),
                "device": str(self.train_step.device),
                "processes": distributed.world_size(),
            },
        )

    def data_info(self) -> dict[str, Any]:
        """Return what the run was trained on."""
        images = self.images
        return {
            "name": images.name,
            "train_images": len(images.train),
            "test_images": len(images.test),
            "skipped": [list(pair) for pair in images.skipped],
            "notes": list(images.notes),
            **images.origin,
        }


def runs_ahead(device: torch.device) -> bool:
    """Return whether the device works on its own while the next steps are prepared, so that waiting for it is dear."""
    return device.type == "cuda"


def hold_images(images: data.Data, config: ResolvedConfig, device: torch.device) -> data.Data:
    """Return the images as bytes on the device that trains, where that is worth it and they fit; else as they are.

    On a GPU reading them from elsewhere would take longer than training; the speed recipe decodes files once on any
    device. What a step is given stays the same.
    """
    total = (len(images.train) + len(images.test)) * images.channels * images.size**2
    if total > MOST_HELD_BYTES or (device.type != "cuda" and config.recipe != "speed"):
        return images
    return dataclasses.replace(
        images, train=data.to_device(images.train, device), test=data.to_device(images.test, device)
    )


def check_share(config: ResolvedConfig, images: int) -> None:
    """Check that each process of the job gets images of every batch.

    Raises:
        UserError: there are more processes than images in a batch.
    """
    least = min(config.batch_size, images)
    if distributed.world_size() > least:
        raise UserError(
            f"batch_size is that of all processes together: {distributed.world_size()} processes cannot share {least} "
            "images; give a larger --batch-size or start fewer"
        )


def describe(model: nn.Module, folder: Path | None) -> dict[str, Any]:
    """Return what the run's record says of the network; without a folder it may be any.

    Raises:
        UserError: a run folder could not build it again.
    """
    if isinstance(model, models.NiN | models.GoogLeNet):
        return checkpoint.describe_model(model)
    kind = type(model).__name__
    if folder is not None:
        raise UserError(
            f"network: a run folder holds networks of nin.models, got {kind}: leave out= away and keep the result's "
            "model"
        )
    return {"kind": kind}


def prepare_folder(out: Path, *, resume: bool) -> None:
    """Make the run folder, or clean up after what was interrupted in it.

    Raises:
        UserError: it holds another run, or something that is no run; or there is none to resume.
        OSError: it cannot be made.
    """
    unfinished = (out / checkpoint.STATE_FILE).exists()
    if resume:
        if not has_begun(out):
            raise UserError(f"{out} holds no unfinished training to resume: {checkpoint.STATE_FILE} is missing")
        checkpoint.remove_leftovers(out)
        return
    if unfinished:
        raise UserError(f"{out} holds an unfinished run: go on with --resume, or give another --out")
    if out.is_dir():
        checkpoint.remove_leftovers(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: give another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)


def has_begun(folder: Path) -> bool:
    """Return whether there is something to resume in the folder, or a result."""
    return (folder / checkpoint.STATE_FILE).exists() or is_finished(folder)


def is_finished(folder: Path) -> bool:
    """Return whether a training has ended in the folder: it has its result and no state to go on from."""
    return (folder / checkpoint.CONFIG_FILE).exists() and not (folder / checkpoint.STATE_FILE).exists()


def list_differing(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Return which settings are not what they were before, in words."""
    return [f"{k}={before.get(k)}, now {k}={value}" for k, value in now.items() if before.get(k) != value]
