"""Narrow, test, fine-tune: the same for a run folder and for somebody's network. It can be stopped and goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nin import checkpoint, data
from nin.config import step_seed
from nin.errors import UserError
from nin.inference import evaluation
from nin.narrowing import (
    DistillationStep,
    FinetuneConfig,
    NarrowOptions,
    NarrowReport,
    NarrowResult,
    Plan,
    apply_plan,
    narrow,
)
from nin.narrowing.analysis import fingerprint_analysis
from nin.narrowing.workflow_config import CONTROL_FILE, CONTROL_FOLDER, WorkflowConfig
from nin.runtime import device, distributed
from nin.runtime.fingerprint import changed_settings
from nin.runtime.progress import ProgressCallback
from nin.training import CheckpointOptions

BATCH = 64


@dataclasses.dataclass(frozen=True)
class NarrowingTask:
    """A network to narrow, and the images that show what it does.

    Attributes:
        model: in evaluation mode.
        images: to look at, to train on (mirrored and shifted as they say) and to test with.
        preprocessing: from an image to the network's input.
        labelled: whether its scores are for the classes of the images.
        cache: keeps what is found of it.
    """

    model: nn.Module
    images: data.Data
    preprocessing: checkpoint.Preprocessing
    labelled: bool
    cache: Path


def run_workflow(
    task: NarrowingTask,
    config: WorkflowConfig,
    out: Path | None,
    keeping: CheckpointOptions,
    on_progress: ProgressCallback | None,
) -> NarrowResult:
    """Narrow a network and train it, if that is asked for.

    Args:
        task: the network and the images.
        config: what is asked for.
        out: a folder for the state, from which the same call goes on after an interruption; or None.
        keeping: when the state is written, and whether to stop.
        on_progress: called with what is being done, the number done, and the number of all.

    Raises:
        UserError: as `nin.narrow`, the folder's state belongs to other settings, another network or other images, or
            the loss of the fine-tuning is no finite number.
        KeyboardInterrupt: ``keeping.stop`` said so; the state is written.
    """

    def tell(what: str, done: int, total: int) -> None:
        if on_progress:
            on_progress(what, done, total)
        if keeping.stop():
            raise KeyboardInterrupt

    device.keep_freed_memory()  # else a time depends on which blocks the calls before it gave back
    result, step_number, tensors = _begin(task, config, out, tell)
    if config.dry_run or not config.finetune:
        return result
    started = time.perf_counter()
    tuner = make_tuner(task, config, result.model)
    if tensors:
        tuner.load(tensors, step_number)
    _tune(task, config, tuner, _Saver(out, task, config, result, keeping), tell)
    if result.plan.layout == "contiguous":  # it was trained in the other one
        result.model.to(memory_format=torch.contiguous_format)
    figures = dict(result.report.accuracy)
    if task.labelled:
        figures["finetuned"] = accuracy(result.model, task)
    after = f"{time.perf_counter() - started:.0f} s" + (", the last part of it" if step_number else "")
    note = f"Fine-tuned for {config.finetune} epochs by the original's answers, in {after}."
    report = dataclasses.replace(result.report, accuracy=figures, notes=(*result.report.notes, note))
    return dataclasses.replace(result, report=report)


def _begin(
    task: NarrowingTask, config: WorkflowConfig, out: Path | None, tell: ProgressCallback
) -> tuple[NarrowResult, int, dict[str, Tensor]]:
    """Return the narrowed network, the steps of fine-tuning that are done, and the state after them."""
    if out is not None and (out / checkpoint.STATE_FILE).exists():
        return _resume(task, config, out)
    options = NarrowOptions(
        cache=task.cache,
        dry_run=config.dry_run,
        budgets=config.budgets,
        batch=config.batch,
        layout="channels_last" if config.channels_last else "contiguous",
        on_progress=tell,
    )
    result = narrow(
        task.model,
        list(calibration_batches(task, config)),
        **dict(config.budget),
        evaluate=(lambda m: accuracy(m, task)) if task.labelled else None,
        skip=config.skip,
        options=options,
    )
    return result, 0, {}


def _resume(task: NarrowingTask, config: WorkflowConfig, out: Path) -> tuple[NarrowResult, int, dict[str, Tensor]]:
    tensors, values = checkpoint.load_state(out)
    check_beginning(out, values, task, config)
    plan = Plan.from_dict(values["plan"])
    model = apply_plan(task.model, plan)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    result = NarrowResult(model.eval(), plan, NarrowReport.from_dict(values["report"]))
    return result, int(values["step_number"]), tensors


def beginning(task: NarrowingTask, config: WorkflowConfig) -> dict[str, Any]:
    """Return what must be the same where a call goes on: the settings, and a number for the network and the images."""
    images = task.images
    seen = [*calibration_batches(task, config), images.train.labels, images.test.labels]
    settings = config.to_dict()
    if config.finetune:
        settings |= {name: value for name, value in tuning(config).to_dict().items() if name != "epochs"}
    return {"settings": settings, "subject": fingerprint_analysis(task.model, seen, config.skip)}


def check_beginning(out: Path, before: Mapping[str, Any], task: NarrowingTask, config: WorkflowConfig) -> None:
    """Stop where what lies in the folder belongs to another call.

    Args:
        out: the folder.
        before: what lies there; in it what `beginning` returned.
        task: the network and the images now.
        config: what is asked for now.

    Raises:
        UserError: the settings, the network or the images differ.
    """
    now, settings = beginning(task, config), before.get("settings", {})
    differing = [f"{name}={old}, now {new}" for name, old, new in changed_settings(now["settings"], settings)]
    if not differing and before.get("subject") != now["subject"]:
        differing = ["another network or other images"]
    if differing:
        raise UserError(f"{out} was begun with {'; '.join(differing)}: give the same, or another --out")


def output_folder(out: Path) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a narrowed network's run folder is written; it may hold an unfinished one.

    Raises:
        UserError: it holds something else.
    """
    return checkpoint.output_folder(out, may_contain={checkpoint.STATE_FILE, CONTROL_FILE, CONTROL_FOLDER})


class _Saver:
    """Writes the state of a fine-tuning when it is time."""

    def __init__(
        self,
        out: Path | None,
        task: NarrowingTask,
        config: WorkflowConfig,
        result: NarrowResult,
        keeping: CheckpointOptions,
    ) -> None:
        self.out, self.result, self.keeping = out, result, keeping
        self.beginning = {} if out is None else beginning(task, config)
        self.saved = time.monotonic()

    def keep(self, tuner: DistillationStep) -> None:
        """Write the state if it is time, and stop if somebody asked for it."""
        stop = self.keeping.stop()
        if self.out is not None and (stop or time.monotonic() - self.saved > 60 * self.keeping.minutes):
            self.save(self.out, tuner)
        if stop:
            raise KeyboardInterrupt

    def save(self, out: Path, tuner: DistillationStep) -> None:
        """Write all that resuming needs."""
        values = {
            **self.beginning,
            "plan": self.result.plan.to_dict(),
            "report": self.result.report.to_dict(),
            "step_number": tuner.step_number,
        }
        checkpoint.save_state(out, tuner.tensors(), values)
        self.saved = time.monotonic()


def make_tuner(task: NarrowingTask, config: WorkflowConfig, model: nn.Module) -> DistillationStep:
    """Return what trains the narrowed network."""
    model = model.to(memory_format=torch.channels_last)  # in memory as the convolutions' gradients are fastest
    return DistillationStep(model, task.model, tuning(config), config.finetune * steps_per_epoch(task))


def tuning(config: WorkflowConfig) -> FinetuneConfig:
    """Return how the narrowed network is trained."""
    return FinetuneConfig(epochs=config.finetune)


def steps_per_epoch(task: NarrowingTask) -> int:
    """Return the batches in a pass over the training images."""
    return -(-len(task.images.train) // BATCH)


def _tune(
    task: NarrowingTask, config: WorkflowConfig, tuner: DistillationStep, saver: _Saver, tell: ProgressCallback
) -> None:
    """Train the narrowed network by the original's answers and the labels, in place."""
    images, p, each = task.images, task.preprocessing, steps_per_epoch(task)
    if saver.out is not None and tuner.step_number == 0:
        saver.save(saver.out, tuner)
    while tuner.step_number < tuner.steps:
        epoch, done = divmod(tuner.step_number, each)
        order = data.epoch_order(len(images.train), seed=config.seed, epoch=epoch)[done * BATCH :]
        for pixels, labels, indices in data.batches(images.train, order, BATCH):
            torch.manual_seed(step_seed(config.seed, tuner.step_number))  # of dropout
            moved = data.augment(pixels, indices, seed=config.seed, epoch=epoch, flip=images.flip, shift=images.shift)
            x = data.to_float(moved, p.mean, p.std, dtype=torch.float32)
            loss = tuner(x, labels if task.labelled else None)
            saver.keep(tuner)
            tell(f"Fine-tuning, loss {loss:.3f}", tuner.step_number, tuner.steps)
    tuner.finish()


def calibration_batches(task: NarrowingTask, config: WorkflowConfig) -> Iterator[Tensor]:
    """Yield training images as the network takes them, without augmentation; each of n processes every n-th batch."""
    p, images = task.preprocessing, task.images
    order = data.epoch_order(len(images.train), seed=config.seed, epoch=0)[: config.images]
    order = torch.cat([*order.split(BATCH)[distributed.rank() :: distributed.world_size()], order[:0]])
    for pixels, _, _ in data.batches(images.train, order, BATCH):
        yield data.to_float(pixels, p.mean, p.std, dtype=torch.float32)


def accuracy(model: nn.Module, task: NarrowingTask) -> float:
    """Return the share of right answers on the test images."""
    p = task.preprocessing
    same = dataclasses.replace(task.images, mean=p.mean, std=p.std)
    training_mode = model.training
    scores, labels = evaluation.evaluate(model.eval(), same, device=torch.device("cpu"), dtype=torch.float32)
    model.train(training_mode)
    hits = torch.tensor([(scores.argmax(1) == labels).sum(), len(labels)], dtype=torch.float64)
    right, count = distributed.all_reduce_sum(hits).tolist()
    return float(right / count)
