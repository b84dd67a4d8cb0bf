"""Train NiN several times with the speed recipe: mean accuracy with its interval, and the time.

    python benchmarks/gpu/train.py FOLDER|cifar10|fashion-mnist|mnist [--data-dir DIR] [--runs 10] [--epochs 30]
        [--plain] [--minutes 9] [--out FOLDER] [--dry-run]

The clock runs from the first step to the last, tests after each epoch included; a first, short training that
compiles and captures everything is not counted. --plain leaves out every augmentation, as the paper did for MNIST.
Stops early, and says so, when the next run would not end within --minutes. Writes train-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from pathlib import Path
from typing import Any

import measuring

import nin
from nin import data
from nin.config import TrainConfig

THRESHOLDS = (0.90, 0.92, 0.94)


def train_once(images: data.Data, config: TrainConfig) -> dict[str, Any]:
    """Train, and return the accuracies, the time, and when each threshold was reached first."""
    result = nin.train(images, config)
    elapsed, reached = 0.0, {}
    for row in result.metrics:
        elapsed += row["seconds"]
        for threshold in THRESHOLDS:
            if row["test_accuracy"] >= threshold:
                reached.setdefault(f"{threshold:.0%}", elapsed)
    outcome = result.info.result
    accuracy = outcome.get("test_accuracy_flip", outcome["test_accuracy"])
    return {
        "seed": config.seed,
        "test_accuracy": outcome["test_accuracy"],
        "accuracy": accuracy,
        "seconds": elapsed,
        "seconds_to": reached,
        "curve": [row["test_accuracy"] for row in result.metrics],
        "recipe": result.info.recipe,
        "parameters": sum(p.numel() for p in result.model.parameters()),
    }


def mean_with_interval(values: list[float]) -> dict[str, float]:
    """Return the mean and the half width of its 95 % interval (normal approximation; 0 for a single value)."""
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "half_width": half, "runs": len(values)}


def summary_of_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all runs together; a threshold counts where every run reached it."""
    times = {
        name: mean_with_interval([run["seconds_to"][name] for run in runs])
        for name in (f"{threshold:.0%}" for threshold in THRESHOLDS)
        if all(name in run["seconds_to"] for run in runs)
    }
    return {
        "accuracy": mean_with_interval([run["accuracy"] for run in runs]),
        "best": max(run["accuracy"] for run in runs),
        "seconds": mean_with_interval([run["seconds"] for run in runs]),
        "seconds_to": times,
    }


def page(name: str, header: dict[str, Any], summary: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    accuracy, seconds = summary["accuracy"], summary["seconds"]
    lines = [
        "| data | runs | accuracy, mean with 95 % interval | best | seconds |"
        + "".join(f" to {t:.0%} |" for t in THRESHOLDS),
        "|" + "---|" * (5 + len(THRESHOLDS)),
    ]
    reached = [summary["seconds_to"].get(f"{t:.0%}") for t in THRESHOLDS]
    figures = f"{accuracy['mean']:.2%} ± {accuracy['half_width']:.2%} | {summary['best']:.2%} | {seconds['mean']:.2f}"
    shown = "".join(f" {r['mean']:.2f} s |" if r else " not reached by all |" for r in reached)
    lines.append(f"| {name} | {accuracy['runs']} | {figures} |{shown}")
    return measuring.title(f"Training on {name}", header) + "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Train, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    started, device = time.monotonic(), measuring.choose_device(dry=given.dry_run)
    images = data.load(given.data, data_dir=given.data_dir)
    config = TrainConfig(recipe="speed", epochs=given.epochs, batch_size=given.batch_size, device=str(device))
    if given.learning_rate is not None:
        config = dataclasses.replace(config, learning_rate=given.learning_rate)
    if given.plain:
        config = dataclasses.replace(config, flip=False, shift=0, dropout=0.5)
    nin.train(images, dataclasses.replace(config, epochs=1))  # compiles, searches, fills the caches
    runs: list[dict[str, Any]] = []
    for seed in range(given.runs):
        begun = time.monotonic()
        runs.append(train_once(images, dataclasses.replace(config, seed=seed)))
        run = runs[-1]
        print(f"seed {seed}: {run['accuracy']:.2%} in {run['seconds']:.2f} s", flush=True)
        now = time.monotonic()
        if now - started + 1.2 * (now - begun) > 60 * given.minutes and seed + 1 < given.runs:
            print(f"stopped after {seed + 1} of {given.runs} runs: the next would not end in {given.minutes} minutes")
            break
    header, summary = measuring.machine(device), summary_of_runs(runs)
    name = Path(given.data).name
    measuring.write(given.out, f"train-{name}", {**header, **summary, "all": runs}, page(name, header, summary))


if __name__ == "__main__":
    main()
