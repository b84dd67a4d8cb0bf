"""Measure `nin predict` on a million small images in shards, killed with SIGKILL twice and resumed.

    OMP_NUM_THREADS=1 python benchmarks/many_images.py [--images 1000000]

Makes PNG images of 16×16 random grey values in shards of 10,000, trains a network on digits for an epoch (the
predictions do not matter), and runs `nin predict SHARDS --csv FILE`: killed after a third and after two thirds of the
rows, then to its end. Every image must have one row, in order. The resident memory is sampled every half second. Writes
`results/many-images.json`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from nin import checkpoint, training
from nin.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results"
IMAGES_PER_SHARD = 10_000


def make_shards(folder: Path, count: int) -> list[str]:
    """Write the shards; return the names of the images."""
    rng, names = np.random.default_rng(0), []
    for shard in range(-(-count // IMAGES_PER_SHARD)):
        path = folder / f"images-{shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * IMAGES_PER_SHARD, min((shard + 1) * IMAGES_PER_SHARD, count)):
                content = io.BytesIO()
                values = rng.integers(0, 256, (16, 16), dtype=np.uint8)
                Image.fromarray(values).save(content, "PNG", compress_level=1)
                member = tarfile.TarInfo(f"{number:09d}.png")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
                names.append(f"{path.name}/{member.name}")
    return names


def predict(run: Path, shards: Path, out: Path, stop_at: int | None) -> dict[str, float]:
    """Run the command to its end, or kill it at a row; return rows per second and resident memory."""
    command = [sys.executable, "-m", "nin", "predict", str(run), str(shards), "--csv", str(out), "--resume"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    mark, samples = out.with_name(f"{out.name}.partial.json"), []
    while process.poll() is None:
        time.sleep(0.5)
        rows = json.loads(mark.read_text())["rows"] if mark.exists() else 0
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "VmRSS" in status:
            memory_mb = int(status.split("VmRSS:")[1].split()[0]) / 1024
            samples.append((time.monotonic(), rows, memory_mb))
        if stop_at is not None and rows >= stop_at:
            process.kill()
            process.wait()
    if stop_at is None and process.returncode != 0:
        sys.exit(f"nin predict ended with {process.returncode}")
    working = [sample for sample in samples if sample[1] > samples[0][1]]
    (t0, r0, _), (t1, r1, _) = working[0], working[-1]
    memories = [memory for _, _, memory in working]
    third = len(memories) // 3
    return {
        "images_per_second": (r1 - r0) / (t1 - t0),
        "memory_mb_first_third": statistics.median(memories[:third]),
        "memory_mb_last_third": statistics.median(memories[-third:]),
        "memory_mb_most": max(memories),
    }


def main() -> None:
    """Make the shards, predict with two kills, compare the rows with the images, and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    count = parser.parse_args().images
    with tempfile.TemporaryDirectory() as temporary:
        root, shards = Path(temporary), Path(temporary) / "shards"
        shards.mkdir()
        started = time.perf_counter()
        names = make_shards(shards, count)
        print(f"{count:,} images in {time.perf_counter() - started:.0f} s", flush=True)
        training.train("digits", training.TrainConfig(epochs=1, threads=1), out=root / "run")
        stages = []
        for stop_at in (count // 3, 2 * count // 3, None):
            stages.append(predict(root / "run", shards, root / "p.csv", stop_at))
            print(stages[-1], flush=True)
        with (root / "p.csv").open(newline="") as file:
            same = all(
                row["image"] == name and row["label"] for row, name in zip(csv.DictReader(file), names, strict=True)
            )
    header = {"date": datetime.date.today().isoformat(), "machine": checkpoint.environment()}
    figures = {"images": count, "kills": 2, "every_image_once_in_order": same, "stages": stages}
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "many-images.json", json.dumps({**header, **figures}, indent=1) + "\n")
    sys.exit(not same)


if __name__ == "__main__":
    main()
