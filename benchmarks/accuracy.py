"""Test accuracy of the default settings on several data sets.

    python benchmarks/accuracy.py digits
    python benchmarks/accuracy.py fashion-mnist --data-dir DIR    (DIR holds FashionMNIST/raw)
    python benchmarks/accuracy.py mnist --data-dir DIR            (no augmentation, as in the paper)
    python benchmarks/accuracy.py first-steps --folder DIR        (an image folder, ten seeds: is the loss ever stuck?)

Each case prints a line per run and writes `results/CASE.json`: every figure with the settings, the machine, the
versions and the date.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import statistics
from pathlib import Path
from typing import Any

import nin
from nin import checkpoint, data, training
from nin.config import TrainConfig
from nin.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results"


def digits(_: argparse.Namespace) -> dict[str, Any]:
    """Five seeds, each with its own held-out quarter."""
    runs = [
        one_run(data.load("digits", seed=seed, test_fraction=0.25), TrainConfig(seed=seed), f"seed {seed}")
        for seed in range(5)
    ]
    accuracies = [run["result"]["test_accuracy"] for run in runs]
    spread = {"mean": statistics.mean(accuracies), "standard_deviation": statistics.stdev(accuracies)}
    return {"test_accuracy": spread, "runs": runs}


def fashion_mnist(arguments: argparse.Namespace) -> dict[str, Any]:
    """The default recipe, once."""
    images = data.load("fashion-mnist", data_dir=arguments.data_dir)
    return {"runs": [one_run(images, TrainConfig(), "fashion-mnist")]}


def mnist(arguments: argparse.Namespace) -> dict[str, Any]:
    """No augmentation, as in the paper's table; dropout in its place."""
    images = data.load("mnist", data_dir=arguments.data_dir)
    config = TrainConfig(flip=False, shift=0, dropout=0.5, epochs=arguments.epochs)
    return {"runs": [one_run(images, config, "mnist, no augmentation")]}


def first_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ten seeds on a small part of the first epoch: a network that is stuck stays at ln(classes)."""
    images = data.load(arguments.folder)
    stuck_at = math.log(len(images.classes))
    runs = []
    for seed in range(10):
        losses: list[float] = []

        def record(progress: training.TrainProgress, losses: list[float] = losses) -> None:
            losses.append(progress.loss)
            if progress.step == arguments.steps:
                raise _EnoughError

        with contextlib.suppress(_EnoughError):
            nin.train(images, TrainConfig(seed=seed), on_progress=record)
        last = statistics.mean(losses[-20:])
        runs.append(
            {"seed": seed, "first_loss": losses[0], "mean_of_the_last_20": last, "below_stuck": last < stuck_at}
        )
        print(
            f"seed {seed}: loss {losses[0]:.3f} → {last:.3f} after {len(losses)} steps (stuck: {stuck_at:.3f})",
            flush=True,
        )
    return {"data": images.name, "steps": arguments.steps, "loss_of_a_stuck_network": stuck_at, "runs": runs}


class _EnoughError(Exception):
    """Ends a training after the steps that were asked for."""


def one_run(images: data.Data, config: TrainConfig, name: str) -> dict[str, Any]:
    """Train once and return the settings, the curve and the result."""

    def show(progress: training.TrainProgress) -> None:
        if progress.row and progress.epochs <= 30:
            row = progress.row
            print(f"  epoch {progress.epoch}: {100 * row['test_accuracy']:.2f} % {row['seconds']:.0f} s", flush=True)

    result = nin.train(images, config, on_progress=show)
    parameters = sum(p.numel() for p in result.model.parameters())
    print(f"{name}: {result.info.result}", flush=True)
    return {
        "recipe": result.info.recipe,
        "parameters": parameters,
        "result": result.info.result,
        "curve": [
            {"epoch": row["epoch"], "minutes": row["seconds"] / 60, "test_accuracy": row["test_accuracy"]}
            for row in result.metrics
        ],
    }


def main() -> None:
    """Run one case and write its results."""
    cases = {"digits": digits, "fashion-mnist": fashion_mnist, "mnist": mnist, "first-steps": first_steps}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=cases)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    outcome = cases[arguments.case](arguments)
    header = {"case": arguments.case, "date": datetime.date.today().isoformat(), "machine": checkpoint.environment()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{arguments.case}.json"
    write_atomically(path, json.dumps({**header, **outcome}, indent=1, default=dataclasses.asdict) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
