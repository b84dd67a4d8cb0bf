"""The sampler and its partition over processes, run at the size of 10⁹ images.

    python benchmarks/scale.py [--images 1000000000] [--walk IMAGES] [--processes 64] [--batch 8192]

Computes the whole order of an epoch in the parts in which a training does, marks each sample and counts those
that are missing, and so come twice; partitions steps over the processes as a training does, and the images as
`nin predict` does. Also times the parts of a step whose cost depends on the size of the network alone. Writes
`results/scale.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch

from nin import checkpoint, data, models
from nin.inference import batch_predict
from nin.runtime import distributed
from nin.runtime.files import write_atomically

RESULTS = Path(__file__).parent / "results"
PART = 2**20
LARGE = ("nin_imagenet", "googlenet")  # with 1000 classes, the others with 10


def count_missing(count: int) -> dict[str, float]:
    """Compute an epoch's whole order and mark its samples; return how many stay unmarked, and the time."""
    seen, started = np.zeros(count, dtype=np.bool_), time.perf_counter()
    for start in range(0, count, PART):
        seen[data.epoch_order(count, seed=0, epoch=0, start=start, stop=start + PART).numpy()] = True
    # as many marks are made as there are samples: one that is missing is one that comes twice
    missing = count - int(np.count_nonzero(seen))
    return {"missing_or_twice": missing, "seconds_with_the_marks": time.perf_counter() - started}


def time_order(count: int, batch: int) -> float:
    """Return the seconds that the order of one batch takes."""
    started = time.perf_counter()
    repeats = 100
    for number in range(repeats):
        data.epoch_order(count, seed=0, epoch=1, start=number * batch, stop=(number + 1) * batch)
    return (time.perf_counter() - started) / repeats


def partitions_steps(count: int, world: int, batch: int) -> bool:
    """Return whether each sample of steps at the beginning, middle and end of an epoch is in exactly one process."""
    steps = count // batch
    for step in (0, 1, steps // 2, steps - 1):
        order = data.epoch_order(count, seed=0, epoch=0, start=step * batch, stop=(step + 1) * batch)
        parts = []
        for rank in range(world):
            os.environ.update(WORLD_SIZE=str(world), RANK=str(rank))
            parts.append(distributed.local_part(order, batch)[0])
        if not torch.equal(torch.cat(parts).sort().values, order.sort().values):
            return False
    return True


def partitions_images(count: int, world: int) -> bool:
    """Return whether the partitions of `nin predict` follow each other without a gap."""
    bounds = [batch_predict.Partition(rank, world).bounds(count) for rank in range(world)]
    ends = [0, *(stop for _, stop in bounds)]
    return ends[-1] == count and all(start == end for (start, _), end in zip(bounds, ends, strict=False))


def main() -> None:
    """Run all of it and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10**9)
    parser.add_argument("--walk", type=int, help="compute the whole order of so many images only; of all if not given")
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8192)
    arguments = parser.parse_args()
    count, world = arguments.images, arguments.processes
    network = {
        name: sum(p.numel() for p in models.create(name, 1000 if name in LARGE else 10).parameters())
        for name in models.MODELS
    }
    figures = {
        "images": count,
        "processes": world,
        "batch": arguments.batch,
        "order": {"images": arguments.walk or count, **count_missing(arguments.walk or count)},
        "order_of_a_batch_seconds": time_order(count, arguments.batch),
        "every_sample_of_a_step_in_one_process": partitions_steps(count, world, arguments.batch),
        "shares_of_predict_without_gap": partitions_images(count, world),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "all_reduce_bytes_per_step": {name: 4 * parameters for name, parameters in network.items()},
        "state_bytes": {name: 12 * parameters for name, parameters in network.items()},
    }
    os.environ.update(WORLD_SIZE="1", RANK="0")
    header = {"date": datetime.date.today().isoformat(), "machine": checkpoint.environment()}
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "scale.json", json.dumps({**header, **figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
