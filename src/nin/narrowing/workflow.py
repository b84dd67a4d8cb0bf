"""The workflow of `nin narrow`: narrow, test and fine-tune a network, or resume an interrupted run."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nin import checkpoint, data
from nin.config import TrainConfig, step_seed
from nin.engines.catalog import CPU_ENGINES
from nin.errors import UserError
from nin.folders import CONTROL_FILE, CONTROL_FOLDER
from nin.inference import evaluation
from nin.models.narrowing_plan import Plan
from nin.models.surgery import apply_plan
from nin.narrowing.analysis import fingerprint_analysis
from nin.narrowing.distillation import DistillationStep, FinetuneConfig
from nin.narrowing.options import NarrowOptions
from nin.narrowing.pipeline import NarrowResult, narrow
from nin.narrowing.recalibration import measure_error, recalibrate_if_better
from nin.narrowing.report import NarrowReport
from nin.narrowing.workflow_config import WorkflowConfig
from nin.runtime import device, distributed
from nin.runtime.fingerprint import changed_settings
from nin.runtime.progress import ProgressCallback, ignore_progress
from nin.training import CheckpointOptions, batches

# Images at a time, of the calibration and of the fine-tuning.
NARROWING_BATCH_SIZE = 64

# Test images, at most, that the error of the result is measured on: neither the fit nor the fine-tuning sees them.
ERROR_IMAGES = 128


@dataclasses.dataclass(frozen=True)
class NarrowingTask:
    """A network to narrow, with its data set and preprocessing.

    Attributes:
        model: in evaluation mode, on the device that computes.
        images: to calibrate with, to train on (mirrored and shifted as they say) and to test with.
        preprocessing: from an image to the network's input.
        labelled: whether its scores are for the classes of the images.
        cache: the file that keeps the analysis.
        augmentation: settings of `nin.config.TrainConfig` by which the fine-tuning augments and mixes images, beside
            flip and shift; its defaults where there are none.
    """

    model: nn.Module
    images: data.Data
    preprocessing: checkpoint.Preprocessing
    labelled: bool
    cache: Path
    augmentation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return model_device(self.model)

    @property
    def normalised_images(self) -> data.Data:
        """The images with the mean and standard deviation that the network's input is normalised with."""
        return dataclasses.replace(self.images, mean=self.preprocessing.mean, std=self.preprocessing.std)

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return pixels as the network takes them: float32 (N, C, H, W)."""
        return data.to_float(pixels, self.preprocessing.mean, self.preprocessing.std, dtype=torch.float32)

    def calibration_batches(self, config: WorkflowConfig) -> list[Tensor]:
        """Return the calibration batches, without augmentation; to each of n processes every n-th.

        They are computed on the CPU and have the same bits on every device, so the same fingerprint.
        """
        order = data.epoch_order(len(self.images.train), seed=config.seed, epoch=0)[: config.images]
        return self._batches(self.images.train, order)

    def held_out_batches(self) -> list[Tensor]:
        """Return batches of test images, evenly spaced; to each of n processes every n-th. Labels are not used."""
        count = len(self.images.test)
        order = torch.linspace(0, count - 1, min(count, ERROR_IMAGES)).round().long()
        return self._batches(self.images.test, order)

    def _batches(self, images: data.ImageSet | data.DecodedSet, order: Tensor) -> list[Tensor]:
        local = order.split(NARROWING_BATCH_SIZE)[distributed.rank() :: distributed.world_size()]
        order = torch.cat([*local, order[:0]])  # of a process without images too
        return [
            self.inputs(pixels).to(self.device) for pixels, _, _ in data.batches(images, order, NARROWING_BATCH_SIZE)
        ]

    def accuracy(self, model: nn.Module, on_progress: ProgressCallback = ignore_progress) -> float:
        """Return a model's accuracy on the test images, from 0 to 1."""
        training_mode = model.training
        scores, labels = evaluation.evaluate(
            model.eval(), self.normalised_images, device=self.device, dtype=torch.float32, on_progress=on_progress
        )
        model.train(training_mode)
        hits = torch.tensor([(scores.argmax(1) == labels).sum(), len(labels)], dtype=torch.float64)
        right, count = distributed.all_reduce_sum(hits).tolist()
        return float(right / count)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU where it has none."""
    return next((value.device for value in model.parameters()), torch.device("cpu"))


def choose_narrowing_device(name: str, engine: str) -> torch.device:
    """Return the device to narrow on; see `nin.runtime.device.choose_device`.

    Args:
        name: of the device. "auto" is the CPU where the engine is one of the CPU's.
        engine: that times the network, one of `nin.engines.catalog.NARROWING_ENGINES`.

    Raises:
        UserError: there is no such device here, or it has no float64, which statistics and fitting are computed in.
    """
    chosen = device.choose_device("cpu" if name == "auto" and engine in CPU_ENGINES else name)
    if chosen.type == "mps":
        raise UserError(f"device must be one that computes in float64, as narrowing does, got {name!r}: give cpu")
    return chosen


def run_workflow(
    task: NarrowingTask,
    config: WorkflowConfig,
    out: Path | None,
    keeping: CheckpointOptions,
    on_progress: ProgressCallback,
) -> NarrowResult:
    """Narrow a network and fine-tune it, if that is asked for.

    Args:
        task: the network and its data.
        config: what is asked for.
        out: a folder for the state, from which the same call resumes after an interruption; or None.
        keeping: when the state is saved, and whether to stop.
        on_progress: called with what is being done, the number done, and the number of all.

    Raises:
        UserError: as `nin.narrow`, the folder's state belongs to other settings, another network or other images, or
            the loss of the fine-tuning is no finite number.
        KeyboardInterrupt: ``keeping.stop`` said so; the state is saved.
    """

    def progress(what: str, done: int, total: int) -> None:
        on_progress(what, done, total)
        if keeping.stop():
            raise KeyboardInterrupt

    device.keep_freed_memory()  # else a time depends on which blocks the calls before it gave back
    state: tuple[dict[str, Tensor], int] | None = None
    if out is not None and (out / checkpoint.STATE_FILE).exists():
        result, state = _load_state(task, config, out)
    else:
        result = _narrow(task, config, progress)
    if config.dry_run or not config.finetune:
        return result
    started = time.perf_counter()
    _Finetuning(task, config, out, result, keeping).run(state, progress)
    notes = list(result.report.notes)
    # some dozens of steps leave BatchNorm with moments of augmented images, and some of those from before
    progress("Comparing with the original", 0, 0)
    fitted = task.calibration_batches(config)
    recalibrated, on_fitted, better = recalibrate_if_better(result.model, task.model, fitted)
    if better:
        result.model.load_state_dict(recalibrated.state_dict())
        notes.append("BatchNorm statistics were measured again after the fine-tuning.")
    error, measured_on = measure_error(result.model, task.model, fitted, task.held_out_batches(), on_fitted)
    accuracy = dict(result.report.accuracy)
    if task.labelled:
        accuracy["finetuned"] = task.accuracy(result.model, progress)
    after = f"{time.perf_counter() - started:.0f} s" + (", the last part of it" if state and state[1] else "")
    epochs = "1 epoch" if config.finetune == 1 else f"{config.finetune} epochs"
    note = f"Fine-tuned for {epochs} by the original's answers, in {after}."
    return result.with_report(
        accuracy=accuracy, calibration_error=error, error_measured_on=measured_on, notes=(*notes, note)
    )


def _narrow(task: NarrowingTask, config: WorkflowConfig, progress: ProgressCallback) -> NarrowResult:
    options = NarrowOptions(
        cache=task.cache,
        dry_run=config.dry_run,
        budgets=config.budgets,
        batch=config.batch,
        layout=config.layout,
        revert_slower=config.revert_slower,
        engine=config.engine,
        threads=config.threads,
        measure_latency=config.measure_latency,
        held_out=task.held_out_batches(),
        on_progress=progress,
    )
    return narrow(
        task.model,
        task.calibration_batches(config),
        **dict(config.budget),
        evaluate=functools.partial(task.accuracy, on_progress=progress) if task.labelled else None,
        skip=config.skip,
        options=options,
    )


def task_fingerprint(task: NarrowingTask, config: WorkflowConfig) -> dict[str, Any]:
    """Return what must be the same to resume: the settings, and a hash of the network and the images."""
    seen = [*task.calibration_batches(config), task.images.train.labels, task.images.test.labels]
    # the device itself, whatever name it was asked for by: a plan for a latency is one for that device
    settings = {**config.to_dict(), "device": task.device.type}
    if config.finetune:
        # its epochs are config.finetune
        settings |= {name: value for name, value in FinetuneConfig().to_dict().items() if name != "epochs"}
        settings |= task.augmentation
    return {"settings": settings, "subject": fingerprint_analysis(task.model, seen, config.skip)}


def check_same_task(out: Path, before: Mapping[str, Any], task: NarrowingTask, config: WorkflowConfig) -> None:
    """Refuse to resume what belongs to another call.

    Args:
        out: the folder.
        before: what is saved there, with the values of `task_fingerprint`.
        task: the network and its data now.
        config: what is asked for now.

    Raises:
        UserError: the settings, the network or the images differ.
    """
    # what was begun before there was a choice was begun on the CPU, without slower layers
    usual = {"device": "cpu", "revert_slower": True, "measure_latency": True, "engine": "pytorch", "threads": None}
    now, settings = task_fingerprint(task, config), {**usual, **before.get("settings", {})}
    differing = [f"{name}={old}, now {new}" for name, old, new in changed_settings(now["settings"], settings)]
    if not differing and before.get("subject") != now["subject"]:
        differing = ["another network or other images"]
    if differing:
        raise UserError(f"{out} was begun with {'; '.join(differing)}: give the same, or another --out")


def output_folder(out: Path | None) -> contextlib.AbstractContextManager[None]:
    """Return the context in which the result's folder is written, which may hold an unfinished one; None makes none.

    Raises:
        UserError: it holds something else.
    """
    return checkpoint.output_folder(out, may_contain={checkpoint.STATE_FILE, CONTROL_FILE, CONTROL_FOLDER})


class _Finetuning:
    """The fine-tuning of a narrowed network, in place, and its saved state."""

    def __init__(
        self,
        task: NarrowingTask,
        config: WorkflowConfig,
        out: Path | None,
        result: NarrowResult,
        keeping: CheckpointOptions,
    ) -> None:
        self.task, self.config, self.out, self.result, self.keeping = task, config, out, result, keeping
        self.fingerprint = {} if out is None else task_fingerprint(task, config)
        images = self.images = task.normalised_images
        self.augmentation = TrainConfig(batch_size=NARROWING_BATCH_SIZE, seed=config.seed, **task.augmentation).resolve(
            images=len(images.train), image_size=images.size, flip=images.flip, shift=images.shift
        )
        self.steps_per_epoch = batches.count_steps_per_epoch(len(images.train), NARROWING_BATCH_SIZE)
        # on a CPU the gradients of convolutions are fastest in this layout
        model = result.model.to(memory_format=torch.channels_last)
        steps, finetune_config = config.finetune * self.steps_per_epoch, FinetuneConfig(epochs=config.finetune)
        self.train_step = DistillationStep(model, task.model, finetune_config, steps)
        self.saved = time.monotonic()

    def run(self, state: tuple[dict[str, Tensor], int] | None, progress: ProgressCallback) -> None:
        """Train from the beginning, or from a saved state: the tensors and the steps done."""
        train_step = self.train_step
        if state:
            train_step.load(*state)
        if train_step.step_number == 0:
            self.save()
        while train_step.step_number < train_step.steps:
            for x, labels in self.rest_of_epoch():
                loss = train_step(x, labels)
                self.save_if_due()
                progress(f"Fine-tuning, loss {loss:.3f}", train_step.step_number, train_step.steps)
        train_step.finish()
        if self.result.plan.layout == "contiguous":
            self.result.model.to(memory_format=torch.contiguous_format)

    def rest_of_epoch(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the batches of the epoch that are left: inputs, and labels or mixed ones where the task has any."""
        epoch, done = divmod(self.train_step.step_number, self.steps_per_epoch)
        for x, labels in batches.epoch_batches(
            self.images,
            self.augmentation,
            self.task.device,
            epoch=epoch,
            first_step=done,
            ahead=False,
            on_lost=_refuse_lost,
        ):
            torch.manual_seed(step_seed(self.config.seed, self.train_step.step_number))  # of dropout
            yield x, labels if self.task.labelled else None

    def save_if_due(self) -> None:
        """Save the state if it is time, and stop if that was asked for."""
        stop, seconds = self.keeping.stop(), time.monotonic() - self.saved
        if stop or self.keeping.is_due(step=self.train_step.step_number, seconds=seconds):
            self.save()
        if stop:
            raise KeyboardInterrupt

    def save(self) -> None:
        """Write the state, if there is a folder for it."""
        if self.out is None:
            return
        values = {
            **self.fingerprint,
            "plan": self.result.plan.to_dict(),
            "report": self.result.report.to_dict(),
            "step_number": self.train_step.step_number,
        }
        checkpoint.save_state(self.out, self.train_step.tensors(), values)
        self.saved = time.monotonic()


def _refuse_lost(path: str, reason: str) -> None:
    raise UserError(f"{path}: {reason}; bring it back, and the same command goes on")


def _load_state(
    task: NarrowingTask, config: WorkflowConfig, out: Path
) -> tuple[NarrowResult, tuple[dict[str, Tensor], int]]:
    """Return the narrowed network, and the state of its fine-tuning: the tensors and the steps done."""
    tensors, values = checkpoint.load_state(out)
    check_same_task(out, values, task, config)
    plan = Plan.from_dict(values["plan"])
    model = apply_plan(task.model, plan)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    result = NarrowResult(model.eval(), plan, NarrowReport.from_dict(values["report"]))
    return result, (tensors, int(values["step_number"]))
