"""`nin train`: from a source of images to a run folder and its report."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

from nin import checkpoint, data, training
from nin import report as reports
from nin.cli.check import show_findings
from nin.cli.console import Bar, percent, print_json, results, stop_requests, words
from nin.config import TrainConfig
from nin.runtime import distributed
from nin.runtime.formatting import format_percent


def train(
    source: str,
    *,
    out: Path,
    loading: dict[str, Any],
    config: TrainConfig,
    keeping: training.CheckpointOptions,
    as_json: bool,
) -> None:
    """Train, write the run folder and its report, and show the result."""
    show_from_first()
    images = load_data(source, seed=config.seed, **loading)
    if keeping.resume and training.is_finished(out):
        words.print(f"{out} is finished; this is its result.")
    result = train_visibly(images, config, out=out, keeping=keeping)
    if not distributed.is_main_process():
        return
    path = write_report(out, images)
    if as_json:
        print_json({"run": str(out), **result.info.result, "model": result.info.recipe["model"]})
        return
    show_result(result)
    words.print(f"Look at what it learned: {path}\nUse it:                  nin predict {out} IMAGE…")


def show_from_first() -> None:
    """Let one of the processes that torchrun started speak, and not all of them."""
    if not distributed.is_main_process():
        words.quiet = results.quiet = True


def load_data(source: str, **options: Any) -> data.Data:
    """Load a data set, showing progress, and tell what was left out."""
    with Bar(f"Reading {source}") as bar:
        images = data.load(source, on_progress=lambda text, done, total: bar.update(done, total, text), **options)
    for note in images.notes:
        words.print(note)
    show_findings(images.findings)
    size = f"{images.size}×{images.size} {'grey' if images.channels == 1 else 'colour'}"
    words.print(
        f"{images.name}: {len(images.train):,} images to train on, {len(images.test):,} to test, {size}, "
        f"{len(images.classes)} classes"
    )
    return images


def train_visibly(
    images: data.Data,
    config: TrainConfig,
    *,
    out: Path,
    keeping: training.CheckpointOptions | None = None,
    again: str = "the same command and --resume",
) -> training.TrainResult:
    """Train, with a bar on a terminal and a line for every epoch; Ctrl-C and SIGTERM end it after the step.

    Args:
        again: how a training that was ended goes on, for the person who ended it.
    """
    with Bar("Training") as bar, stop_requests() as stopped:

        def show(p: training.TrainProgress) -> None:
            bar.update(p.step, p.steps, f"epoch {p.epoch}/{p.epochs}  loss {p.loss:.3f}")
            # a hundred short epochs get twenty lines
            if p.row and (p.epoch % max(1, p.epochs // 20) == 0 or p.epoch == p.epochs):
                bar.line(
                    f"epoch {p.epoch:3d}/{p.epochs}  train loss {p.row['train_loss']:.3f}  "
                    f"test accuracy {format_percent(p.row['test_accuracy'], 2)}  {p.row['seconds']:.0f} s"
                )

        keeping = dataclasses.replace(keeping or training.CheckpointOptions(), stop=lambda: bool(stopped))
        try:
            return training.train(images, config, out=out, keeping=keeping, on_progress=show)
        except KeyboardInterrupt:
            kept = (out / checkpoint.STATE_FILE).exists()
            bar.line(f"Go on with {again}: {out}" if kept else "Nothing was written.")
            if stopped[:1] == [signal.SIGTERM]:
                sys.exit(128 + signal.SIGTERM)
            raise


def show_result(result: training.TrainResult) -> None:
    """Print the test accuracy with its interval, and what the network is."""
    r, info = result.info.result, result.info
    parameters = sum(p.numel() for p in result.model.parameters())
    results.print(
        f"test accuracy {percent(r['test_accuracy'], r['test_accuracy_interval'])}, {r['test_images']:,} images"
    )
    if "test_accuracy_flip" in r:
        value = percent(r["test_accuracy_flip"], r["test_accuracy_flip_interval"])
        results.print(f"  with a mirrored second view of each: {value}")
    seconds, recipe = r["seconds"], info.recipe
    duration = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"
    words.print(f"{recipe['model']}, {parameters:,} parameters, trained for {duration} in {recipe['precision']}")


def write_report(run: Path, images: data.Data | None) -> Path:
    """Write the report, showing progress: it predicts on all test images."""
    with Bar("Writing the report") as bar:
        return reports.write_report(run, images, on_progress=lambda text, done, total: bar.update(done, total, text))
