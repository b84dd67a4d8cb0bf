"""Train NiN one or several times with the speed recipe: mean accuracy with its interval, and the time.

    python benchmarks/gpu/train.py FOLDER|FILE.npz|cifar10|fashion-mnist|mnist [--data-dir DIR] [--runs 1] [--epochs 18]
        [--plain] [--seconds 60] [--out FOLDER] [--dry-run]

FILE.npz is what prepare.py makes of an image folder. The clock runs from the first step to the last, tests after each
epoch included; a first epoch that compiles and captures everything is not counted. --plain leaves out every
augmentation, as the paper did for MNIST. Each epoch is written when it ends, into train-NAME.jsonl and .md; a training
that would not end within --seconds stops there, and what it had learned is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import measuring
import numpy as np

import nin
from nin import data, training
from nin.config import TrainConfig

THRESHOLDS = (0.90, 0.92, 0.94)


def load_images(source: str, data_dir: Path | None) -> data.Data:
    """Return the data set: a prepared file, or whatever `nin.data.load` takes."""
    if not source.endswith(".npz"):
        return data.load(source, data_dir=data_dir)
    with np.load(source) as file:
        train, test = ((file[f"{part}_images"], file[f"{part}_labels"]) for part in ("train", "test"))
        return dataclasses.replace(data.load((train, test)), flip=bool(file["flip"]), shift=int(file["shift"]))


def train_once(
    images: data.Data, config: TrainConfig, results: measuring.Results, budget: measuring.Budget
) -> dict[str, Any] | None:
    """Train, and return the accuracies, the time, and when each threshold was reached first; None if stopped."""

    def on_progress(progress: training.TrainProgress) -> None:
        if progress.row is not None:
            results.add({"seed": config.seed, **progress.row})

    stop = training.CheckpointOptions(stop=lambda: budget.left() == 0)
    try:
        result = nin.train(images, config, keeping=stop, on_progress=on_progress)
    except KeyboardInterrupt:
        results.leave_out(f"the rest of the training with seed {config.seed}")
        return None
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


def page(name: str, rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: the runs that have ended, else the last epoch."""
    runs = [row for row in rows if "seconds_to" in row]
    if not runs:
        last = f"epoch {rows[-1]['epoch']:.0f}: {rows[-1]['test_accuracy']:.2%} so far" if rows else "not begun"
        return f"Training on {name}, {last}\n"
    summary = summary_of_runs(runs)
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
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Train, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    device, budget = measuring.choose_device(dry=given.dry_run), measuring.Budget(given.seconds)
    images, name = load_images(given.data, given.data_dir), Path(given.data).stem
    config = TrainConfig(recipe="speed", epochs=given.epochs, batch_size=given.batch_size, device=str(device))
    if given.learning_rate is not None:
        config = dataclasses.replace(config, learning_rate=given.learning_rate)
    if given.plain:
        config = dataclasses.replace(config, flip=False, shift=0, dropout=0.5)
    nin.train(images, dataclasses.replace(config, epochs=1))  # compiles, searches, fills the caches
    results = measuring.Results(given.out, f"train-{name}", measuring.machine(device), lambda rows: page(name, rows))
    longest_s = 0.0
    for seed in range(given.runs):
        if budget.left() < 1.2 * longest_s:
            results.leave_out(f"{given.runs - seed} of {given.runs} runs")
            break
        left = budget.left()
        run = train_once(images, dataclasses.replace(config, seed=seed), results, budget)
        if run is None:
            break
        results.add(run)
        print(f"seed {seed}: {run['accuracy']:.2%} in {run['seconds']:.2f} s", flush=True)
        longest_s = max(longest_s, left - budget.left())


if __name__ == "__main__":
    main()
