"""Compare Winograd with direct convolution, in winograd.md: ``python winograd.py [SECONDS]``.

The cost model: random k×k layers, each computed directly and with Winograd tiles of 6 and 8, interleaved, for SECONDS
in float32 and in bfloat16; how much time is lost where the model did not choose the fastest. The accuracy: float32
results of three layers against float64.
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
MAX_MACS = 4e9  # of a layer
CHOOSE_WINOGRAD = abi.choose_winograd


def layer(channels, columns, kernel, dtype):
    """Return a k×k layer that keeps height and width."""
    weight = (torch.randn(columns, channels, kernel, kernel) * (channels * kernel**2) ** -0.5).to(dtype)
    padding = (kernel // 2, kernel // 2)
    return ChainArguments([weight], [torch.randn(columns).to(dtype)], (1, 1), padding, (1, 1), ["relu"])


def force(size):
    """Compute every layer with Winograd tiles of one size (0: directly); None: as the cost model chooses."""

    def choose(kernels, packed_chain, chain):
        return packed_chain[:-8] + struct.pack("q", size), size

    abi.choose_winograd = CHOOSE_WINOGRAD if size is None else choose


def milliseconds(x, chain, size, goal_s=0.008):
    """Return the mean time of a call, over as many as take about a hundredth of a second."""
    force(size)
    start = time.perf_counter()
    dispatch.mlpconv(x, chain)
    count = max(1, int(goal_s / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(count):
        dispatch.mlpconv(x, chain)
    return (time.perf_counter() - start) / count * 1e3


def compare(dtype, seconds):
    """Return (time as chosen, best time, time of direct convolution, the tile size chosen) of each random layer."""
    rows, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        kernel, side = random.choice((3, 3, 3, 4, 5, 5, 7)), random.choice((4, 7, 8, 14, 16, 28, 32, 56))
        count, channels, columns = random.choice((1, 1, 2, 4, 16, 64)), random.choice(CHANNELS), random.choice(CHANNELS)
        if count * side**2 * channels * columns * kernel**2 > MAX_MACS:
            continue
        layout = torch.channels_last if random.random() < 0.7 else torch.contiguous_format
        x = torch.randn(count, channels, side, side).to(dtype).contiguous(memory_format=layout)
        chain = layer(channels, columns, kernel, dtype)
        force(None)
        y = dispatch.mlpconv(x, chain)
        chosen = CHOOSE_WINOGRAD(dispatch.KERNELS, abi.pack_chain(x, y, chain), chain)[1]
        sizes = [size for size in SIZES if size == 0 or size - kernel >= 1]
        times = {size: [] for size in sizes}
        for _ in range(7):
            for size in sizes:
                times[size].append(milliseconds(x, chain, size))
        medians = {size: statistics.median(values[1:]) for size, values in times.items()}
        rows.append((medians[chosen], min(medians.values()), medians[0], chosen))
    return rows


def errors(channels, columns, kernel, side):
    """Return the root-mean-square and the largest error of each tile size, relative to the output's deviation."""
    x = torch.randn(16, channels, side, side).relu().contiguous(memory_format=torch.channels_last)
    chain = layer(channels, columns, kernel, torch.float32)._replace(activations=["none"])
    exact = F.conv2d(x.double(), chain.weights[0].double(), chain.biases[0].double(), padding=kernel // 2)
    found = {}
    for size in SIZES:
        force(size)
        error = (dispatch.mlpconv(x, chain).double() - exact) / exact.std()
        found[size] = error.square().mean().sqrt().item(), error.abs().max().item()
    return found


def main(seconds):
    """Measure, and write the page."""
    keep_freed_memory()
    random.seed(0)
    torch.manual_seed(0)
    lines = [
        "# Winograd beside direct convolution",
        "",
        f"`python benchmarks/cpu-kernel/winograd.py {seconds:g}`; {processor_name()}, {torch.get_num_threads()} "
        f"threads, {backends()['cpu'].split(',')[0]}, torch {torch.__version__}; {datetime.date.today().isoformat()}.",
        "",
        f"Random layers (3×3 to 7×7, 4 to 56 pixels a side, {CHANNELS[0]} to {CHANNELS[-1]} channels in and out, 1 "
        "to 64 images, both layouts): geometric means of ratios of times.",
        "",
        "| dtype | layers | with Winograd | faster than direct, of those | slower by 5 % or more, of those | "
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
        lines += ["| layer | direct: rms, largest | tiles of 6 | tiles of 8 |", "|---|---:|---:|---:|"]
        for shape in ((64, 64, 3, 56), (192, 192, 3, 8), (96, 192, 5, 16)):
            cells = [f"{rms:.1e}, {most:.1e}" for rms, most in errors(*shape).values()]
            lines.append(f"| {shape[2]}×{shape[2]}, {shape[0]} → {shape[1]}, {shape[3]} pixels | {' | '.join(cells)} |")
    (FOLDER / "winograd.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
