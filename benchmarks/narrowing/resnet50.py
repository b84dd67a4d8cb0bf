"""ResNet-50 at 224×224: seconds and memory until there is a plan.

    python benchmarks/narrowing/resnet50.py [--images 256] [--batch 16] [--latency]

torchvision's network with random weights and normally distributed images: what looking at the layers takes does not
depend on the values. The budget is 0.7 of the multiply-accumulates, or of the milliseconds, for which the layers are
measured too. The memory is the most that the process ever held, less what it held before.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
import torchvision

import nin


def held_mb() -> float:
    """Return the most that the process has held in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Make the plan and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--latency", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    batches = [torch.randn(arguments.batch, 3, 224, 224) for _ in range(arguments.images // arguments.batch)]
    budget = {"latency" if arguments.latency else "macs": 0.7}
    before, started = held_mb(), time.perf_counter()
    stages: dict[str, float] = {}

    def on_progress(stage: str, done: int, count: int) -> None:
        stages[stage] = time.perf_counter() - started

    options = nin.NarrowOptions(dry_run=True, measure_latency=arguments.latency, on_progress=on_progress)
    result = nin.narrow(model, batches, options=options, **budget)
    seconds = time.perf_counter() - started
    figures = {
        "seconds": round(seconds, 1),
        "ended after": {stage: round(end, 1) for stage, end in stages.items()},
        "more memory, MB": round(held_mb() - before),
        "memory, MB": round(held_mb()),
        "layers factorised": sum(layer.form != "keep" for layer in result.plan.layers),
        "layers thinned": len(result.plan.pruned),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
