"""Kills a training at random moments, resumes it, and compares the result bit for bit with one never killed.

    OMP_NUM_THREADS=1 python benchmarks/kills.py [--kills 200] [--inside 50]

A training of the digits writes its state after every third step. It gets SIGKILL at a random moment, or while a file
is being written (`--inside` counts those), and is resumed until it has ended; then the next one begins. Compared
with a training that was never killed are the files of the run folder (averaged weights, metrics) and its last state
(weights, averages, the optimiser's momenta, the position in the order of the images). The state before each resume
must be whole: a damaged one would end the resumed training with an error, which counts as lost.
Adds to `results/kills.json`, a run for each `--seed`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from nin import checkpoint, data, epoch_metrics
from nin.cli import app, console
from nin.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results"
FILES = (checkpoint.MODEL_FILE, epoch_metrics.METRICS_FILE)
SETTINGS = ("--epochs", "5", "--dropout", "0.1", "--flip", "--threads", "1", "--checkpoint-steps", "3")
KILLED = -signal.SIGKILL


def train(out: Path, *more: str) -> None:
    """Run `nin train`, and copy the last state, which a finished training removes."""
    with out.with_suffix(".errors").open("w") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())

    def copy_and_remove(folder: Path) -> None:
        shutil.copy(folder / checkpoint.STATE_FILE, out.with_suffix(".last"))
        remove(folder)

    remove, checkpoint.remove_state = checkpoint.remove_state, copy_and_remove
    app.main(["train", "digits", "--out", str(out), *SETTINGS, *more])


def start(out: Path, *more: str) -> multiprocessing.Process:
    """Start a training in a process of its own; forked, because importing PyTorch takes seconds."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(out, *more))
    process.start()
    return process


def run_and_kill(out: Path, *, resume: bool, inside: bool, rng: random.Random) -> tuple[int, bool]:
    """Start or resume the training and kill it.

    Returns:
        The exit status, `KILLED` or that of a training that ended before, and whether it was killed during a write.
    """
    process = start(out, *(("--resume",) if resume else ()))
    # Kill during the steps, not during the start: they have begun when the state changes.
    before = state_time(out)
    while process.is_alive() and state_time(out) == before:
        time.sleep(0.0005)
    deadline = time.monotonic() + rng.uniform(0, 1.0)
    while process.is_alive() and (time.monotonic() < deadline or (inside and not is_writing(out))):
        time.sleep(0 if inside else 0.0005)
    if inside:
        time.sleep(rng.uniform(0, 0.01))  # a write takes about so long: its start, middle and end are hit
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, is_writing(out)  # what was being written is still there: it was not renamed yet


def is_writing(out: Path) -> bool:
    """Return whether a file of the run is being written at this moment."""
    return out.is_dir() and any(path.name.startswith(".") for path in out.iterdir())


def state_time(out: Path) -> int:
    """Return when the state was written, 0 if there is none."""
    try:
        return (out / checkpoint.STATE_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def is_equal(a: Path, b: Path) -> bool:
    """Return whether two trainings left the same, bit for bit, but for what the clock decides."""
    if any((a / name).read_bytes() != (b / name).read_bytes() for name in FILES):
        return False
    (tensors, values), (others, other_values) = (last_state(run) for run in (a, b))
    same = tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    return same and values == other_values


def last_state(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Return tensors and values of the last state, without times."""
    folder = run.with_suffix(".state")
    folder.mkdir(exist_ok=True)
    shutil.copy(run.with_suffix(".last"), folder / checkpoint.STATE_FILE)
    tensors, values = checkpoint.load_state(folder)
    for rows in ([values["position"]], values["metrics"]):
        for row in rows:
            for clock in ("seconds", "epoch_seconds", "images_per_second"):
                row.pop(clock, None)
    return tensors, values


def write_results(counts: dict[str, int], lost: list[str], seed: int) -> None:
    """Write the counts so far beside those of other seeds."""
    path = RESULTS / "kills.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs[f"seed {seed}"] = {"date": datetime.date.today().isoformat(), **counts, "lost": lost}
    names = ("kills", "inside_a_write", "trainings", "equal")
    together = {name: sum(run[name] for run in runs.values()) for name in names}
    RESULTS.mkdir(exist_ok=True)
    values = {"machine": checkpoint.environment(), "together": together, "runs": runs}
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def main() -> None:
    """Kill, resume and compare until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inside", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console.messages.quiet = console.results.quiet = True
    data.load("digits")  # imports here what every training would import again
    rng, counts = random.Random(arguments.seed), {"kills": 0, "inside_a_write": 0, "trainings": 0, "equal": 0}
    lost: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        start(whole).join()
        while counts["kills"] < arguments.kills or counts["inside_a_write"] < arguments.inside:
            out, resume, status = Path(folder) / f"run{counts['trainings']}", False, KILLED
            while status == KILLED:
                inside = counts["inside_a_write"] < arguments.inside
                status, written = run_and_kill(out, resume=resume, inside=inside, rng=rng)
                if status == KILLED:
                    counts["kills"] += 1
                    counts["inside_a_write"] += written
                    resume = (out / checkpoint.CONFIG_FILE).exists() or (out / checkpoint.STATE_FILE).exists()
            counts["trainings"] += 1
            if status == 0 and is_equal(out, whole):
                counts["equal"] += 1
            else:
                lost.append(f"{out.name}: status {status} {out.with_suffix('.errors').read_text().strip()}")
            print(counts, lost, flush=True)
            write_results(counts, lost, arguments.seed)
    print(f"{counts['equal']} of {counts['trainings']} trainings equal after {counts['kills']} kills; lost: {lost}")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
