"""Winograd's transforms beside the taps one by one, into winograd.md: ``python winograd.py [SECONDS]``.

The choice: random k×k layers, each computed tap by tap and with squares of 6 and 8, in turn, for SECONDS in float32 and
in bfloat16; how much is lost where the cost model chose another than the fastest. The error: of float32 results at the
shapes of three layers, beside sums in float64.
"""

import datetime
import random
import statistics
import struct
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from nin.ops import backends
from nin.ops.arguments import ChainArguments
from nin.ops.cpu import abi, dispatch
from nin.runtime.device import keep_freed_memory, processor_name

FOLDER = Path(__file__).parent
SIZES = (0, 6, 8)
CHANNELS = (8, 16, 24, 32, 64, 96, 128, 192, 256, 512)
LARGEST = 4e9  # multiply-accumulates of a layer
CHOOSE = abi.choose_winograd


def layer(channels, columns, kernel, dtype):
    """Return a k×k layer that keeps height and width."""
    weight = (torch.randn(columns, channels, kernel, kernel) * (channels * kernel**2) ** -0.5).to(dtype)
    padding = (kernel // 2, kernel // 2)
    return ChainArguments([weight], [torch.randn(columns).to(dtype)], (1, 1), padding, (1, 1), ["relu"])


def force(size):
    """Have every layer computed so; None: as the cost model says."""
    given = CHOOSE if size is None else lambda kernels, row, layers: (row[:-8] + struct.pack("q", size), size)
    abi.choose_winograd = given


def milliseconds(x, layers, size, goal_s=0.008):
    """Return the time of one call, of as many as take about a hundredth of a second."""
    force(size)
    start = time.perf_counter()
    dispatch.mlpconv(x, layers)
    count = max(1, int(goal_s / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(count):
        dispatch.mlpconv(x, layers)
    return (time.perf_counter() - start) / count * 1e3


def compare(dtype, seconds):
    """Return (time of the chosen one, of the best, tap by tap; the size chosen) of each random layer."""
    rows, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        kernel, side = random.choice((3, 3, 3, 4, 5, 5, 7)), random.choice((4, 7, 8, 14, 16, 28, 32, 56))
        count, channels, columns = random.choice((1, 1, 2, 4, 16, 64)), random.choice(CHANNELS), random.choice(CHANNELS)
        if count * side**2 * channels * columns * kernel**2 > LARGEST:
            continue
        layout = torch.channels_last if random.random() < 0.7 else torch.contiguous_format
        x = torch.randn(count, channels, side, side).to(dtype).contiguous(memory_format=layout)
        layers = layer(channels, columns, kernel, dtype)
        force(None)
        y = dispatch.mlpconv(x, layers)
        chosen = CHOOSE(dispatch.KERNELS, abi.pack_chain(x, y, layers), layers)[1]
        sizes = [size for size in SIZES if size == 0 or size - kernel >= 1]
        times = {size: [] for size in sizes}
        for _ in range(7):
            for size in sizes:
                times[size].append(milliseconds(x, layers, size))
        medians = {size: statistics.median(values[1:]) for size, values in times.items()}
        rows.append((medians[chosen], min(medians.values()), medians[0], chosen))
    return rows


def errors(channels, columns, kernel, side):
    """Return the root mean square and the largest error of each size, over the results' standard deviation."""
    x = torch.randn(16, channels, side, side).relu().contiguous(memory_format=torch.channels_last)
    layers = layer(channels, columns, kernel, torch.float32)._replace(activations=["none"])
    exact = F.conv2d(x.double(), layers.weights[0].double(), layers.biases[0].double(), padding=kernel // 2)
    found = {}
    for size in SIZES:
        force(size)
        error = (dispatch.mlpconv(x, layers).double() - exact) / exact.std()
        found[size] = error.square().mean().sqrt().item(), error.abs().max().item()
    return found


def main(seconds):
    """Measure, and write the page."""
    keep_freed_memory()
    random.seed(0)
    torch.manual_seed(0)
    lines = [
        "# Winograd's transforms beside the taps one by one",
        "",
        f"`python benchmarks/cpu-kernel/winograd.py {seconds:g}`; {processor_name()}, {torch.get_num_threads()} "
        f"threads, {backends()['cpu'].split(',')[0]}, torch {torch.__version__}; {datetime.date.today().isoformat()}.",
        "",
        f"Random layers (3×3 to 7×7, 4 to 56 pixels a side, {CHANNELS[0]} to {CHANNELS[-1]} channels in and out, 1 "
        "to 64 images, both layouts): geometric means of ratios of times.",
        "",
        "| dtype | layers | by transforms | faster than tap by tap, of those | slower by 5 % or more, of those | "
        "over the fastest of the three, of all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            rows = compare(dtype, seconds)
            served = [(taps / mine, mine) for mine, _, taps, size in rows if size]
            gain = statistics.geometric_mean([ratio for ratio, _ in served])
            slower = sum(ratio < 0.95 for ratio, _ in served) / len(served)
            lost = statistics.geometric_mean([mine / best for mine, best, _, _ in rows])
            lines.append(f"| {str(dtype)[6:]} | {len(rows)} | {len(served)} | {gain:.2f} | {slower:.1%} | {lost:.2f} |")
        lines += ["", "Error of float32 results over their standard deviation, images behind a ReLU:", ""]
        lines += ["| layer | tap by tap: rms, largest | squares of 6 | squares of 8 |", "|---|---:|---:|---:|"]
        for shape in ((64, 64, 3, 56), (192, 192, 3, 8), (96, 192, 5, 16)):
            cells = [f"{rms:.1e}, {most:.1e}" for rms, most in errors(*shape).values()]
            lines.append(f"| {shape[2]}×{shape[2]}, {shape[0]} → {shape[1]}, {shape[3]} pixels | {' | '.join(cells)} |")
    (FOLDER / "winograd.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
