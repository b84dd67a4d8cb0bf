"""Kills a training at random moments, resumes it, and compares the result bit for bit with one never killed.

    python benchmarks/kills.py [--kills 200] [--inside 50]

A training of the digits writes its state after every third step. It gets SIGKILL at a random moment, or as soon as
a file is being written (`--inside` counts those), and is resumed; when it is through, its weights, averages of
them, metrics and result are compared with those of the training that nobody killed, and the next training begins.
The state before each resume must be whole: a damaged one would end the resumed training with an error, which counts
as lost. Writes `results/kills.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nin import checkpoint

RESULTS = Path(__file__).parent / "results"
FILES = (checkpoint.MODEL_FILE, checkpoint.METRICS_FILE)


def command(out: Path, *more: str) -> list[str]:
    """Return the shell command of the training."""
    settings = ("--epochs", "5", "--dropout", "0.1", "--flip", "--checkpoint-steps", "3")
    return [sys.executable, "-m", "nin", "train", "digits", "--out", str(out), *settings, *more]


def is_writing(out: Path) -> bool:
    """Return whether a file of the run is being written at this moment."""
    return out.is_dir() and any(path.name.startswith(".") for path in out.iterdir())


def run_and_kill(out: Path, *, resume: bool, inside: bool, chance: random.Random) -> tuple[str, bool]:
    """Start or resume the training and kill it.

    Returns:
        "killed", "done", or the error of a training that could not go on; and whether it was killed in a write.
    """
    more = ("--resume",) if resume else ()
    process = subprocess.Popen(command(out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    # Importing takes seconds; the steps are what is to be killed. A state that changes says that they have begun.
    before = state_time(out)
    while process.poll() is None and state_time(out) == before:
        time.sleep(0.0005)
    deadline = time.monotonic() + chance.uniform(0, 1.0)
    while process.poll() is None and (time.monotonic() < deadline or (inside and not is_writing(out))):
        if inside and time.monotonic() >= deadline and is_writing(out):
            break
        time.sleep(0 if inside else 0.0005)
    process.kill()
    errors = process.communicate()[1]
    if process.returncode == 0:
        return "done", False
    written = is_writing(out)  # what was being written is still there: the kill came before it was renamed
    return ("killed" if process.returncode < 0 else errors.strip().splitlines()[-1]), written


def state_time(out: Path) -> int:
    """Return when the state was written, 0 if there is none."""
    try:
        return (out / checkpoint.STATE_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def main() -> None:
    """Kill, resume and compare until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inside", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance, counts = random.Random(arguments.seed), {"kills": 0, "inside_a_write": 0, "trainings": 0, "equal": 0}
    lost: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        subprocess.run(command(whole), check=True, capture_output=True)
        while counts["kills"] < arguments.kills or counts["inside_a_write"] < arguments.inside:
            out, resume, state = Path(folder) / f"run{counts['trainings']}", False, "killed"
            while state == "killed":
                inside = counts["inside_a_write"] < arguments.inside
                state, written = run_and_kill(out, resume=resume, inside=inside, chance=chance)
                if state == "killed":
                    counts["kills"] += 1
                    counts["inside_a_write"] += written
                    resume = (out / checkpoint.STATE_FILE).exists()
                print(counts, state, flush=True)
            counts["trainings"] += 1
            same = state == "done" and all((out / f).read_bytes() == (whole / f).read_bytes() for f in FILES)
            counts["equal"] += same
            if not same:
                lost.append(state)
    header = {"date": datetime.date.today().isoformat(), "machine": checkpoint.environment()}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**header, **counts, "lost": lost}, indent=1) + "\n"
    checkpoint.write_atomically(RESULTS / "kills.json", text)
    print(f"{counts['equal']} of {counts['trainings']} trainings equal after {counts['kills']} kills; lost: {lost}")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
