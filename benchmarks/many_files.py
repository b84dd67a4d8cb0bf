"""Measure `nin.data.load` of a folder with a million image files: seconds, and resident memory per image.

    python benchmarks/many_files.py [--images 1000000]

The files are PNG images of 16×16 random grey values in ten classes. The folder is loaded twice, each time in a process
of its own: without a cache, as the first `nin train` does, and with the cache that the first load wrote. The memory is
that of the process after the load less that of one that loaded 1,000 images, divided by the images. Writes
`results/many-files.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from nin import checkpoint
from nin.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results"
LOAD = """
import json, os, sys, time
from nin import data
started = time.perf_counter()
images = data.load(sys.argv[1], memory_limit_bytes=0)
seconds = time.perf_counter() - started
resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
print(json.dumps({"seconds": seconds, "bytes": resident, "images": len(images.train) + len(images.test)}))
"""


def make_folder(folder: Path, count: int) -> None:
    """Write the images, each with other pixels."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 10}" / f"image-{number:07d}.png"
        if number < 10:
            path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(path, compress_level=1)


def load(folder: Path) -> dict[str, float]:
    """Load a folder in a process of its own and return its seconds, resident bytes and images."""
    command = [sys.executable, "-c", LOAD, str(folder)]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def main() -> None:
    """Make the folder, load it, and write the measurements; removing a million files takes some more minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    count = parser.parse_args().images
    with tempfile.TemporaryDirectory() as temporary:
        few, many = Path(temporary) / "few", Path(temporary) / "many"
        make_folder(few, 1000)
        make_folder(many, count)
        base = load(few)["bytes"]
        loads = {"looking at every file": load(many), "again, remembered": load(many)}
        for figures in loads.values():
            figures["bytes_per_image"] = (figures.pop("bytes") - base) / figures["images"]
        header = {"date": datetime.date.today().isoformat(), "machine": checkpoint.environment()}
        RESULTS.mkdir(exist_ok=True)
        write_atomically(
            RESULTS / "many-files.json", json.dumps({**header, "images": count, "loads": loads}, indent=1) + "\n"
        )
        print(json.dumps(loads, indent=1))


if __name__ == "__main__":
    main()
