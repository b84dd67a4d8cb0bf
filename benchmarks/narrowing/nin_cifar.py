"""nin_cifar to half of its time without labels, beside nin's own operator: accuracy and milliseconds.

python benchmarks/narrowing/nin_cifar.py RUN CIFAR_FOLDER [--latency 0.5] [--budgets 0.66] [--channels-last] [--batch 1]

RUN is a folder that `nin train CIFAR_FOLDER --model nin_cifar` made. Nothing is trained here: for that,
`nin narrow RUN --data CIFAR_FOLDER --latency 0.5 --finetune 5 --control --out NEW`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import nin
from nin import checkpoint, data, narrowing
from nin.narrowing.workflow import NarrowingTask
from nin.narrowing.workflow_config import WorkflowConfig
from nin.runtime import device, timer


def main() -> None:
    """Narrow, and time everything side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("folder")
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.66])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--batch", type=int, help="images at a time when it is timed")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device.keep_freed_memory()
    model, info = checkpoint.load_model(arguments.run)
    images = data.load(arguments.folder)
    cache = arguments.run / "narrowing.safetensors"
    task = NarrowingTask(model, images, info.preprocessing, True, cache)
    config = WorkflowConfig({"latency": arguments.latency})
    batches = task.calibration_batches(config)
    started = time.perf_counter()
    result = nin.narrow(
        model,
        batches,
        latency=arguments.latency,
        evaluate=task.accuracy,
        options=nin.NarrowOptions(
            cache=cache,
            budgets=tuple(arguments.budgets),
            batch=arguments.batch,
            layout="channels_last" if arguments.channels_last else "contiguous",
        ),
    )
    print(result.report)
    print(json.dumps({"seconds": time.perf_counter() - started, "torch": torch.__version__}))
    if arguments.save:
        torch.save(result.model.state_dict(), arguments.save)
        arguments.save.with_suffix(".json").write_text(result.plan.to_json())
    plain = narrowing.to_plain_layers(model).eval()
    for size in (64, 1):
        x = batches[0][:size]
        last = x.contiguous(memory_format=torch.channels_last)
        wide = narrowing.to_plain_layers(model).eval().to(memory_format=torch.channels_last)
        own = nin.models.NiN(model.config)
        own.load_state_dict(model.state_dict())
        own = own.eval().fold().to(memory_format=torch.channels_last)
        with torch.inference_mode():
            times = timer.time_interleaved(
                {
                    "original, PyTorch": lambda x=x: plain(x),
                    "original, PyTorch, channels_last": lambda x=last, wide=wide: wide(x),
                    "original, nin's operator": lambda x=last, own=own: own(x),
                    "narrowed, PyTorch": lambda x=last if arguments.channels_last else x: result.model(x),
                },
                runs=15,
            )
        for name, t in times.items():
            print(f"batch {size:2d}  {name:34s} {t.median_ms:8.2f} ms ({t.low_ms:.2f} to {t.high_ms:.2f})")


if __name__ == "__main__":
    main()
