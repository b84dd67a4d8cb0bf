"""ResNet-56 without labels and without tuning: 500 training images, 0.6 and 0.47 of the multiply-accumulates.

python benchmarks/narrowing/resnet56.py CHECKPOINT.th CIFAR_FOLDER [--depth 56] [--share 0.6 0.47]

CIFAR_FOLDER holds train/<class>/* and test/<class>/*. The accuracy is that on 2,000 test images, 200 of each class.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from cifar_resnet import accuracy, images, load

import nin


def main() -> None:
    """Narrow at each share and print one line of JSON for it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--share", type=float, nargs="+", default=[0.6, 0.47])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments.checkpoint, arguments.depth)
    seen, _ = images(arguments.folder / "train", 500)
    held_out, labels = images(arguments.folder / "test", 2000, batch=250)
    with tempfile.TemporaryDirectory() as folder:
        options = nin.NarrowOptions(measure_latency=False, revert_slower=False, cache=Path(folder) / "statistics")
        for share in arguments.share:
            started = time.perf_counter()
            result = nin.narrow(
                model, seen, macs=share, evaluate=lambda m: accuracy(m, held_out, labels), options=options
            )
            report = result.report
            figures = {
                "share": share,
                "macs": report.macs,
                "parameters": report.parameters,
                "accuracy": report.accuracy,
                "calibration_error": report.calibration_error,
                "seconds": time.perf_counter() - started,
                "torch": torch.__version__,
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
