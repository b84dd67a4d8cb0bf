"""Training with one, two and four processes: loss curves, restart after a kill, speed-up.

    python benchmarks/processes.py [--epochs 10]

Trains `nin_digits` on the digits with torchrun (gloo on the CPU, one thread for each process), with the same batch of
64 for all processes together, and keeps the loss curves. Then process 1 of two gets SIGKILL in the middle of an epoch:
the job starts again by itself (`--max-restarts 1`), and the weights it leaves are compared with those of two
that were never killed. The speed of an epoch is timed with one and with two processes in turn. Writes
`results/processes.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nin import checkpoint, epoch_metrics
from nin.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results"
COUNTS = (1, 2, 4)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(out: Path, count: int, *settings: str, restarts: int = 0) -> list[str]:
    """Return the command line of a training."""
    work = ["-m", "nin", "train", "digits", "--out", str(out), "--threads", "1", "--precision", "fp32", *settings]
    if count == 1:
        return [sys.executable, *work]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--max-restarts"]
    return [sys.executable, "-m", *torchrun, str(restarts), *work]


def train(out: Path, count: int, *settings: str) -> dict[str, Any]:
    """Train to the end; return the loss curve, the accuracy and the speed."""
    subprocess.run(command(out, count, *settings), env=ENVIRONMENT, capture_output=True, check=True)
    names = (epoch_metrics.METRICS_FILE, epoch_metrics.TIMINGS_FILE)
    rows, times = (epoch_metrics.read_csv(out / name) for name in names)
    return {
        "train_loss": [row["train_loss"] for row in rows],
        "test_accuracy": checkpoint.load_info(out).result["test_accuracy"],
        "images_per_second": statistics.median(row["images_per_second"] for row in times),
    }


def kill_one(out: Path, *settings: str) -> float:
    """Kill a process of two in the middle of an epoch; return the seconds until a new state is written."""
    state, log = out / checkpoint.STATE_FILE, out.with_suffix(".log")
    steps = ("--checkpoint-steps", "5")
    with log.open("w") as output:
        job = subprocess.Popen(command(out, 2, *settings, *steps, restarts=1), env=ENVIRONMENT, stderr=output)
        while not state.exists():
            time.sleep(0.01)
        time.sleep(1.0)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        victim = next(pid for pid in children if is_rank_one(pid))
        os.kill(int(victim), signal.SIGKILL)
        killed = time.monotonic()
        time.sleep(0.5)  # what the survivor was writing
        before = state.stat().st_mtime_ns
        while job.poll() is None and state.exists() and state.stat().st_mtime_ns == before:
            time.sleep(0.01)
        seconds = time.monotonic() - killed
        if job.wait() != 0:
            sys.exit(log.read_text())
    return seconds


def is_rank_one(pid: str) -> bool:
    """Return whether a process is number 1 of its job."""
    return b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def main() -> None:
    """Train, kill, compare, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    settings = ("--batch-size", "64", "--epochs", str(parser.parse_args().epochs))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        curves = {str(count): train(root / f"run{count}", count, *settings) for count in COUNTS}
        speeds: dict[str, list[float]] = {"1": [], "2": []}
        for number in range(3):  # in turn
            for count in (1, 2):
                timed = train(root / f"timed{number}-{count}", count, *settings)
                speeds[str(count)].append(timed["images_per_second"])
        seconds = kill_one(root / "killed", *settings)
        weights = [(root / name / checkpoint.MODEL_FILE).read_bytes() for name in ("run2", "killed")]
        accuracy = checkpoint.load_info(root / "killed").result["test_accuracy"]
    medians = {count: statistics.median(values) for count, values in speeds.items()}
    figures = {
        "curves": curves,
        "killed": {
            "seconds_until_the_next_state": seconds,
            "weights_of_the_run_not_killed": weights[0] == weights[1],
            "test_accuracy": accuracy,
        },
        "speeds": speeds,
        "efficiency_of_two": medians["2"] / medians["1"] / 2,
    }
    header = {"date": datetime.date.today().isoformat(), "machine": checkpoint.environment()}
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "processes.json", json.dumps({**header, **figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
