"""`nin narrow` on run folders: a run becomes a narrower run, with what that cost beside it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nin import checkpoint, data, evaluation, machine, training
from nin.errors import UserError
from nin.narrowing import FinetuneConfig, NarrowOptions, NarrowReport, NarrowResult, finetune, narrow

NARROWING_FILE, CACHE_FILE = "narrowing.json", "narrowing.safetensors"

BATCH = 64

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class SlimmingConfig:
    """What `slim` is asked for.

    Attributes:
        budget: one of "macs", "latency" and "parameters", with the share to be left.
        skip: layers to leave alone, by name or pattern.
        images: training images that the statistics come from; no labels are used.
        finetune: epochs of training by the original network's answers and the labels; 0 trains nothing.
        dry_run: plan only, write nothing but the cache of the statistics.
        seed: chooses the images, their order and their augmentation.
    """

    budget: Mapping[str, float]
    skip: tuple[str, ...] = ()
    images: int = 512
    finetune: int = 0
    dry_run: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges, so that a mistake shows before anything is loaded."""
        given = {name: value for name, value in self.budget.items() if value is not None}
        if len(given) != 1:
            raise UserError(f"give one of --latency, --macs and --parameters, got {', '.join(given) or 'none'}")
        for name, value in given.items():
            if not 0 < value < 1:
                raise UserError(f"{name} must be a share of the original's, above 0 and below 1, got {value}")
        if self.images < 1 or self.finetune < 0:
            raise UserError(f"images must be at least 1 and finetune at least 0, got {self.images} and {self.finetune}")


def slim(
    run: Path, images: data.Data, config: SlimmingConfig, *, out: Path | None, on_progress: Progress | None = None
) -> NarrowResult:
    """Narrow the network of a run folder.

    Args:
        run: the folder that ``nin train`` or ``nin narrow`` made.
        images: the training images that the statistics come from, and the test images that measure the result.
        config: what is asked for.
        out: the run folder to make; it may be None in a dry run.
        on_progress: called with what is being done, the number done, and the number of all.

    Returns:
        The narrowed network, its plan and its report; the accuracy is that on the test images.

    Raises:
        UserError: as `nin.narrow`, or the images are not of the kind that the network takes.
        OSError: a folder cannot be written.
    """
    model, info = checkpoint.load_model(run)
    check_fits(run, info, images)
    if config.dry_run or out is None:
        return _narrow(run, model, info, images, config, on_progress)
    training.prepare_folder(out, resume=False)
    try:
        result = _narrow(run, model, info, images, config, on_progress)
        save(out, run, result, info, images, config)
        return result
    finally:
        if not any(out.iterdir()):  # stopped, or refused
            out.rmdir()


def _narrow(
    run: Path,
    model: nn.Module,
    info: checkpoint.RunInfo,
    images: data.Data,
    config: SlimmingConfig,
    on_progress: Progress | None,
) -> NarrowResult:
    """Narrow the network and train it, if that is asked for."""
    options = NarrowOptions(cache=run / CACHE_FILE, dry_run=config.dry_run, on_progress=on_progress)
    batches = list(calibration_batches(images, info, config))
    result = narrow(
        model,
        batches,
        **dict(config.budget),
        evaluate=lambda m: accuracy(m, images, info),
        skip=config.skip,
        options=options,
    )
    if config.finetune and not config.dry_run:
        started = time.perf_counter()
        train_narrowed(result.model, model, images, info, config, on_progress)
        figures = {**result.report.accuracy, "finetuned": accuracy(result.model, images, info)}
        note = f"Fine-tuned for {config.finetune} epochs in {time.perf_counter() - started:.0f} s."
        report = dataclasses.replace(result.report, accuracy=figures, notes=(*result.report.notes, note))
        result = dataclasses.replace(result, report=report)
    return result


def check_fits(run: Path, info: checkpoint.RunInfo, images: data.Data) -> None:
    """Stop where the images are not of the kind that the network was trained on.

    Raises:
        UserError: the classes, the channels or the size differ.
    """
    p = info.preprocessing
    for what, expected, got in (
        ("classes", info.classes, images.classes),
        ("channels", p.channels, images.channels),
        ("size", p.size, images.size),
    ):
        if expected != got:
            raise UserError(f"the images do not fit {run}: its {what} is {expected}, that of {images.name} is {got}")


def calibration_batches(images: data.Data, info: checkpoint.RunInfo, config: SlimmingConfig) -> Iterator[Tensor]:
    """Yield training images as the network takes them, without augmentation."""
    p = info.preprocessing
    order = data.epoch_order(len(images.train), seed=config.seed, epoch=0)[: config.images]
    for pixels, _, _ in data.batches(images.train, order, BATCH):
        yield data.to_float(pixels, p.mean, p.std, dtype=torch.float32)


def accuracy(model: nn.Module, images: data.Data, info: checkpoint.RunInfo) -> float:
    """Return the share of right answers on the test images."""
    p = info.preprocessing
    same = dataclasses.replace(images, mean=p.mean, std=p.std)
    training_mode = model.training
    scores, labels = evaluation.evaluate(model.eval(), same, device=torch.device("cpu"), dtype=torch.float32)
    model.train(training_mode)
    return float((scores.argmax(1) == labels).float().mean())


def train_narrowed(
    model: nn.Module,
    teacher: nn.Module,
    images: data.Data,
    info: checkpoint.RunInfo,
    config: SlimmingConfig,
    on_progress: Progress | None,
) -> None:
    """Train the narrowed network by the original's answers and the labels, in place."""
    p = info.preprocessing
    steps = -(-len(images.train) // BATCH)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        torch.manual_seed(config.seed * 1_000_003 + epoch)  # dropout, as a function of (seed, epoch)
        order = data.epoch_order(len(images.train), seed=config.seed, epoch=epoch)
        for pixels, labels, indices in data.batches(images.train, order, BATCH):
            moved = data.augment(pixels, indices, seed=config.seed, epoch=epoch, flip=images.flip, shift=images.shift)
            yield data.to_float(moved, p.mean, p.std, dtype=torch.float32), labels

    def tell(done: int, total: int, loss: float) -> None:
        if on_progress:
            on_progress(f"Fine-tuning, loss {loss:.3f}", done, total)

    machine.keep_freed_memory()
    finetune(
        model,
        teacher,
        batches,
        FinetuneConfig(epochs=config.finetune),
        steps_per_epoch=steps,
        on_progress=tell,
    )


def save(
    out: Path, run: Path, result: NarrowResult, info: checkpoint.RunInfo, images: data.Data, config: SlimmingConfig
) -> None:
    """Write the narrowed run folder: the model, what it was made from, and what that cost."""
    right = result.report.accuracy.get("finetuned", result.report.accuracy["corrected"])
    count = len(images.test)
    hits = round(right * count)
    narrowed = dataclasses.replace(
        info,
        model=checkpoint.describe_narrowed(info.model, result.plan),
        recipe={**info.recipe, "narrowed_from": str(run), "narrowing": dataclasses.asdict(config)},
        data={**info.data, **images.origin, "name": images.name, "test_images": count},
        result={
            "test_accuracy": hits / count,
            "test_accuracy_interval": evaluation.wilson_interval(hits, count),
            "test_images": count,
        },
        environment=checkpoint.environment(),
    )
    checkpoint.save_model(out, result.model, narrowed)
    content = {"plan": result.plan.to_dict(), "report": result.report.to_dict()}
    checkpoint.write_atomically(out / NARROWING_FILE, json.dumps(content, indent=2))


def headline(report: NarrowReport) -> dict[str, Any]:
    """Return the whole before and after, for JSON."""
    return {
        "macs": report.macs,
        "parameters": report.parameters,
        "file_bytes": report.file_bytes,
        "latency_ms": {n: (a.median_ms, b.median_ms) for n, (a, b) in report.latency.items()},
        "accuracy": report.accuracy,
        "notes": report.notes,
    }
