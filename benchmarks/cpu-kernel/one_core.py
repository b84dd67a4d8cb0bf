"""Measure processor time on one core into one-core.md beside this file: ``python one_core.py``.

    python one_core.py CASE [CASE …] [--engines ENGINE …] [--dtypes DTYPE …] [--settle 3]

prints rows of other cases, with other engines. Processor time of one thread hardly depends on other load, so these
ratios hold on a shared machine. The engines' calls are interleaved; median, 20th and 80th percentile of at least 15
calls each.
"""

import argparse
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
from nin.profiling.bench.engines import UnavailableError, prepare
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


def measure(calls, settle=0, seconds=4.0, least=15):
    """Return the processor time of each call, in ms: (20th percentile, median, 80th percentile).

    Args:
        calls: of each engine.
        settle: how often it is called before a call is timed, so that the caches hold what is its own.
        seconds: of the clock, for all.
        least: times of each.
    """
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["nin"]) < least:
        for name, call in calls.items():
            for _ in range(settle):
                call()
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


def prepared(case, dtype, engines):
    """Return the calls of those engines that can compute the case."""
    calls = {}
    for engine in engines:
        try:
            calls[engine] = prepare(engine, case, DTYPES[dtype])
        except UnavailableError as error:
            print(f"{engine}: {error}")
    return calls


def row(name, dtype, engines=ENGINES, settle=0):
    """Return one line of the table."""
    case = bench.CASES[name]
    times = measure(prepared(case, dtype, engines), settle)
    middle = {engine: median for engine, (_, median, _) in times.items()}
    digits = 2 if middle["nin"] > 2 else 3
    cells = [
        "{1:.{3}f} ({0:.{3}f} to {2:.{3}f})".format(*times[engine], digits) if engine in times else "–"
        for engine in engines
    ]
    own, others = ([ms for e, ms in middle.items() if e.startswith("nin") == ours] for ours in (True, False))
    ratio = min(others) / min(own)
    macs = cost(case.model().eval(), case.input_shape).macs * (3 if case.training else 1)
    fraction = f"{2e3 * macs / min(own) / peak_flops(DTYPES[dtype]):.0%}"
    return f"| {name} | {dtype} | {' | '.join(cells)} | {ratio:.2f} | {fraction} |"


def main():
    """Measure all cases and write the page, or print rows of some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(bench.CASES)}")
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--dtypes", nargs="+", default=tuple(DTYPES))
    parser.add_argument("--settle", type=int, default=0, help="calls of an engine before each that is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.cases:
        print(f"| case | dtype | {' | '.join(options.engines)} | ratio | of the limit |")
        for name in options.cases:
            for dtype in options.dtypes:
                print(row(name, dtype, options.engines, options.settle), flush=True)
        return
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
