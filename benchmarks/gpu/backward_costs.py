"""Count the bytes and products of the backward pass, ours and cuDNN's, and write what they allow into backward.md.

    python benchmarks/gpu/backward_costs.py

No GPU needed and none used: the floors are those of an H100 (2.98 TB/s measured for a copy, 800 TFLOP/s about what
cuBLAS reaches), the times of cuDNN and of the former kernels were measured there, and ours is an ESTIMATE.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch
from compile_check import CASES, Case, record_launches

BYTES_PER_S, FLOP_PER_S = 2.98e12, 800e12
ITEMSIZE = 2  # bf16
# What the estimate supposes: of its floor the forward chain reached 57 % there; a launch that waits for the one before.
FRACTION_OF_FLOOR, LAUNCH_US = 0.57, 3.0
# One H100 80GB HBM3, PyTorch 2.11.0, 2026-11-28, in a CUDA graph: forward + backward less forward, microseconds.
MEASURED_US = {
    "chain 192→160→96": (1057, 2590),
    "mlpconv 5×5 3→192→160→96": (2552, 4916),
    "chain 192→192→192": (556, 1280),
    "chain 192→192→10": (433, 155),
    "5×5 96→192": (762, 3002),
    "3×3 192→192": (209, 626),
    "1×1 192→32": (213, 796),
    "ConvNeXt 96→384→96, GELU": (745, 3190),
}


@dataclasses.dataclass
class Cost:
    """What a pixel of a backward pass costs: values to and from memory and the L2 cache, and multiply-accumulates."""

    memory: int = 0
    cache: int = 0
    macs: int = 0

    def floor_us(self, pixels: int) -> float:
        """Return the longer of the times for memory and for arithmetic, in microseconds."""
        return 1e6 * pixels * max(self.memory * ITEMSIZE / BYTES_PER_S, 2 * self.macs / FLOP_PER_S)

    def __iadd__(self, other: Cost) -> Cost:
        self.memory, self.cache, self.macs = (
            self.memory + other.memory,
            self.cache + other.cache,
            self.macs + other.macs,
        )
        return self


def library_layer(channels: int, filters: int, taps: int, activation: str) -> Cost:
    """Return the cost of a layer's gradients in cuDNN: activation, input, weight and bias, one kernel each."""
    through = 3 * filters if activation != "none" else 0
    return Cost(through + (filters + channels) + (filters + channels) + filters, 0, 2 * channels * filters * taps)


def library(case: Case) -> Cost:
    """Return the cost of the whole backward pass layer by layer; the hidden layers were kept."""
    cost = Cost()
    for i, (channels, filters) in enumerate(itertools.pairwise((case.input_shape[1], *case.widths))):
        cost += library_layer(channels, filters, case.kernel_size**2 if i == 0 else 1, case.activation)
    return cost


def ours(case: Case) -> Cost:
    """Return the cost of the kernel and products: pairs from the end, an odd layer first."""
    widths, smooth = (case.input_shape[1], *case.widths), case.activation in ("gelu", "silu")
    cost, last = Cost(), len(case.widths)
    while last >= 2:
        c, c1, c2 = widths[last - 2 : last + 1]
        # x twice, for the kernel and for its product; dx; the gradient, and the result for ReLU's derivative
        cost += Cost(3 * c + c2 * (1 if smooth else 2), 2 * (2 * c1 + c2), 3 * c * c1 + 2 * c1 * c2)
        cost.macs += c * c1 + c1 * c2 if smooth else 0  # the second layer's argument again
        last -= 2
    if last and case.kernel_size == 1:
        c, n = widths[:2]
        cost += Cost(2 * c + n * (1 if smooth else 2), 2 * n, c * n * (3 if smooth else 2))
    elif last:
        # cuDNN's; a pair behind it has taken the gradient through the ReLU, and the layer is computed again for it
        behind = len(widths) > 2
        cost += library_layer(widths[0], widths[1], case.kernel_size**2, "none" if behind else case.activation)
        if behind:
            cost += Cost(widths[0] + widths[1], 0, widths[0] * widths[1] * case.kernel_size**2)
    return cost


def former(case: Case) -> Cost:
    """Return the cost of the former kernels of a pair: input and weight gradients apart, hidden chunks of 64."""
    widths, chunks = (case.input_shape[1], *case.widths), -(-case.widths[0] // 64)
    if len(case.widths) != 2:
        return Cost()
    c, c1, c2 = widths
    once = c + 2 * c2
    return Cost(2 * once + c, (chunks - 1) * once, 3 * c * c1 + 2 * c1 * c2 + c * c1 + c1 * c2)


def count_launches(case: Case) -> int:
    """Return the launches of ours: kernels as recorded, and two products for each piece of the pixels."""
    names = [k.__name__ for k, *_ in record_launches(case, torch.bfloat16, torch.channels_last)]
    return 3 * names.count("pair_gradients") + 2 * names.count("layer_gradients") + names.count("add_parts")


def row(case: Case) -> str:
    """Return a case's line of the table."""
    pixels = case.input_shape[0] * case.input_shape[2] * case.input_shape[3]
    (cudnn_us, former_us), launches = MEASURED_US[case.name], count_launches(case)
    texts = [case.name]
    for cost, measured in ((library(case), cudnn_us), (former(case), former_us), (ours(case), None)):
        if not cost.macs:
            texts += ["", "", f"– / {measured}"]
            continue
        texts.append(f"{cost.memory * pixels * ITEMSIZE / 1e6:.0f} + {cost.cache * pixels * ITEMSIZE / 1e6:.0f}")
        texts.append(f"{2e-9 * cost.macs * pixels:.0f}")
        floor = cost.floor_us(pixels)
        # the library's part keeps the library's time
        estimate = floor / FRACTION_OF_FLOOR + LAUNCH_US * launches
        if measured is None and case.kernel_size > 1:
            texts.append(f"{floor:.0f} / cuDNN's first layer" if launches else f"{floor:.0f} / cuDNN")
        else:
            texts.append(f"{floor:.0f} / {measured if measured else f'≈ {estimate:.0f}'}")
    return "| " + " | ".join([*texts, str(launches)]) + " |"


def main() -> None:
    """Write the table."""
    kinds = ("cuDNN", "former kernels", "kernel and products")
    head = [f"{kind}: {what}" for kind in kinds for what in ("MB + MB in L2", "GFLOP", "floor / time, µs")]
    lines = ["| case | " + " | ".join([*head, "launches"]) + " |", "|" + "---|" * (len(head) + 2)]
    lines += [row(case) for case in CASES]
    text = f"""# The backward pass: bytes and products

`python benchmarks/gpu/backward_costs.py`, counted and not measured: bfloat16, channels_last, all gradients. "MB" travel
to and from memory, "MB in L2" are written and read again there, by the scratch of a piece or a second reading. The
floor is the longer of memory at 2.98 TB/s and arithmetic at 800 TFLOP/s. The times of cuDNN and of the former kernels
are those of one H100 (in a CUDA graph, forward + backward less forward). **Those with "≈" are estimates**: the floor
over {FRACTION_OF_FLOOR}, which is what the forward chain reached there, and {LAUNCH_US:.0f} µs a launch. Nothing of
ours has run on a GPU.

"""
    (Path(__file__).parent / "backward.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
