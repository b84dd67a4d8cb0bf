"""Measure processor time on one core into one-core.md beside this file: ``python one_core.py``.

Processor time of one thread hardly depends on other load, so these ratios hold on a shared machine. The engines' calls
are interleaved; median, 20th and 80th percentile of at least 15 calls each.
"""

import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from nin import version
from nin.ops import backends
from nin.ops.cpu.peak_throughput import measure_peak_flops
from nin.profiling import bench
from nin.profiling.bench.engines import prepare
from nin.profiling.bench.runner import DTYPES
from nin.profiling.cost import cost
from nin.runtime.device import keep_freed_memory, processor_name

ENGINES = ("nin", "nin NCHW", "eager", "eager NCHW")
CASES = (
    "chain-192-160-96",
    "1x1-192-32",
    "1x1-192-192",
    "resnet50-64-256-56px-16",
    "resnet50-512-2048-7px-16",
    "convnext-768-7px-16",
    "bottleneck-256-64-4x4-256",
    "4x4-256-256",
    "nin-cifar-64",
    "train-chain-192-160-96",
    "train-nin-cifar-64",
)


def measure(calls, seconds=4.0, least=15):
    """Return the processor time of each call, in ms: (20th percentile, median, 80th percentile)."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["nin"]) < least:
        for name, call in calls.items():
            start = time.process_time_ns()
            call()
            times[name].append((time.process_time_ns() - start) / 1e6)
    found = {}
    for name, values in times.items():
        low, _, _, high = statistics.quantiles(values, n=5, method="inclusive")
        found[name] = low, statistics.median(values), high
    return found


def peak_flops(dtype):
    """Return the FLOP/s of multiply-adds on registers, by processor time too."""
    clock, processor = time.perf_counter(), time.process_time()
    peak = measure_peak_flops(dtype)
    return peak * (time.perf_counter() - clock) / (time.process_time() - processor)


def row(name, dtype):
    """Return one line of the table."""
    case = bench.CASES[name]
    times = measure({engine: prepare(engine, case, DTYPES[dtype]) for engine in ENGINES})
    middle = {engine: median for engine, (_, median, _) in times.items()}
    macs = cost(case.model().eval(), case.input_shape).macs * (3 if case.training else 1)
    fraction = f"{2e3 * macs / middle['nin'] / peak_flops(DTYPES[dtype]):.0%}"
    cells = [f"{median:.2f} ({low:.2f} to {high:.2f})" for low, median, high in times.values()]
    ratio = min(middle["eager"], middle["eager NCHW"]) / middle["nin"]
    return f"| {name} | {dtype} | {' | '.join(cells)} | {ratio:.2f} | {fraction} |"


def main():
    """Measure all cases and write the page."""
    torch.set_num_threads(1)
    keep_freed_memory()
    versions = f"torch {torch.__version__}, nin {version.version()}"
    lines = [
        "# The CPU kernel on one core, beside PyTorch eager",
        "",
        f"{processor_name()}, one thread, malloc tuned; {backends()['cpu']}; {versions}; Python "
        f"{platform.python_version()}; {datetime.now(UTC).date()}. Processor time in ms, median (20th to 80th "
        "percentile), by `python benchmarks/cpu-kernel/one_core.py`. `ratio`: the faster eager over `nin`. `of the "
        "limit`: the arithmetic (a training step: three times the forward pass) over what multiply-adds on registers "
        "reach; taps in the padding count, though they are left out.",
        "",
        f"| case | dtype | {' | '.join(ENGINES)} | ratio | of the limit |",
        "|---|---|" + "---:|" * (len(ENGINES) + 2),
    ]
    for name in CASES:
        for dtype in DTYPES:
            lines.append(row(name, dtype))
            print(lines[-1], flush=True)
    (Path(__file__).parent / "one-core.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
