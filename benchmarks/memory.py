"""Memory leaks of a training: the slope of its resident memory over many steps.

    python benchmarks/memory.py [--steps 40000] [--workers 2]

Two hours of `nin_cifar` on two cores are about 40,000 steps. So many are taken here with a network and images so small
that they last minutes: 2,000 PNG files of 8×8 pixels, decoded anew in each epoch by worker threads, augmented, with a
state on the disk every 500 steps and a test after each epoch. What a step could leave behind
is the same as in a large one: a tensor, a file, a line of a list. Writes `results/memory.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from nin import checkpoint, data, training
from nin.config import TrainConfig
from nin.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results"
EVERY = 250


def make_folder(folder: Path, images: int = 2000) -> None:
    """Write a folder of two classes: brighter on the left, brighter on the right."""
    rng = np.random.default_rng(0)
    for number in range(images):
        side = number % 2
        values = rng.integers(0, 128, (8, 8), dtype=np.uint8)
        values[:, 4 * side : 4 * side + 4] += 100
        path = folder / f"class{side}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


def resident_mb() -> float:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Train, sample the memory, and write the slope."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    samples: list[tuple[int, float]] = []

    def sample_memory(progress: training.TrainProgress) -> None:
        if progress.step % EVERY == 0 and progress.row is None:
            samples.append((progress.step, resident_mb()))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        make_folder(folder)
        images = data.load(str(folder), memory_limit_bytes=0)  # so that files are decoded while training
        per_epoch = len(images.train) // arguments.batch_size
        config = TrainConfig(model="nin_digits", epochs=arguments.steps // per_epoch, batch_size=arguments.batch_size)
        started = time.perf_counter()
        keeping = training.CheckpointOptions(steps=500)
        training.train(images, config, out=Path(temporary) / "run", keeping=keeping, on_progress=sample_memory)
        seconds = time.perf_counter() - started
    steps, memory = np.array([s for s in samples if s[0] > arguments.steps // 5]).T
    slope, _ = np.polyfit(steps / 1000, memory, 1)
    figures = {
        "steps": int(steps[-1]),
        "epochs": config.epochs,
        "seconds": seconds,
        "slope_mb_per_1000_steps": slope,
        "mb_after_warm_up": {"first": memory[0], "least": memory.min(), "most": memory.max(), "last": memory[-1]},
        "samples": [(step, round(mb, 1)) for step, mb in samples[:: max(1, len(samples) // 40)]],
    }
    header = {"date": datetime.date.today().isoformat(), "machine": checkpoint.environment()}
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "memory.json", json.dumps({**header, **figures}, indent=1) + "\n")
    print(json.dumps({k: v for k, v in figures.items() if k != "samples"}, indent=1))


if __name__ == "__main__":
    main()
