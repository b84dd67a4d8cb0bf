"""How long each layer of a network takes, beside the least that this machine's arithmetic and memory allow."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.ops.cpu import peak as limits
from nin.runtime import timer as timing
from nin.runtime.timer import Timing

# What all runs together may take, and how many there are at least and at most.
SECONDS, RUNS = 2.0, (5, 50)


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """What one module took, and what it takes at least.

    Attributes:
        module: its path in the model.
        timing: of its forward pass within the model's; of all its calls together, where the model calls it again.
        bound_ms: the roofline's bound (Williams, Waterman and Patterson 2009): the longer of the time that its
            multiply-accumulates take at the measured peak of the arithmetic and the time that its input, weights and
            result take at the measured bandwidth of a copy in main memory. What is still in a cache can be faster
            than the memory's part of it. None where nin was installed without its compiled library.
        bound_by: "arithmetic" or "memory", whichever takes longer; None as above.
    """

    module: str
    timing: Timing
    bound_ms: float | None
    bound_by: str | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """How long a model and its layers took on this machine's CPU.

    Attributes:
        total: of the whole forward pass, without the layers' clocks.
        layers: of the modules that were timed, in the order in which they run.
        threads: how many PyTorch worked with.
        peak_flops: FLOP/s of multiply-adds on registers with all threads; None without the compiled library.
        copy_bandwidth: bytes/s, read and written, of a copy in main memory; None as above.
    """

    total: Timing
    layers: tuple[LayerTime, ...]
    threads: int
    peak_flops: float | None
    copy_bandwidth: float | None

    def __str__(self) -> str:
        """Return two lines about the whole."""
        spread = f"{self.total.low_ms:.2f} to {self.total.high_ms:.2f} ms in 3 of 5 runs"
        lines = [f"{self.total.median_ms:.2f} ms ({spread}) on {self.threads} threads of the CPU"]
        if self.peak_flops is not None and self.copy_bandwidth is not None:
            limits = f"{self.peak_flops / 1e9:.0f} GFLOP/s and {self.copy_bandwidth / 1e9:.0f} GB/s of copying"
            lines.append(f"at least: by {limits}, both measured here; from a cache it can take less")
        return "\n".join(lines)


def measure(
    model: nn.Module,
    x: Tensor,
    macs: Mapping[str, int],
    on_progress: Callable[[int, int], object] | None = None,
) -> Measured:
    """Time a model's forward pass, whole and layer by layer.

    Args:
        model: as it is to be timed, on the CPU; gets hooks that stay.
        x: its input.
        macs: multiply-accumulates of the modules to time, by their paths.
        on_progress: called with the runs that are done and their number.

    Returns:
        Medians over as many runs as fit into two seconds, at least five.
    """
    tell = on_progress or (lambda done, total: None)
    with torch.inference_mode():
        model(x)  # PyTorch chooses and packs in the first
        start = time.perf_counter()
        model(x)
        runs = max(RUNS[0], min(RUNS[1], int(SECONDS / 2 / (time.perf_counter() - start))))
        whole_ms: list[float] = []
        for turn in range(runs):
            start_ns = time.perf_counter_ns()
            model(x)
            whole_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
            tell(turn + 1, 2 * runs)
        clocks = {name: _Clock(module) for name, module in model.named_modules() if name in macs}
        for turn in range(runs):
            model(x)
            for clock in clocks.values():
                clock.end_run()
            tell(runs + turn + 1, 2 * runs)
    known = x.dtype in (torch.float32, torch.bfloat16)
    peak = limits.measure_peak_flops(x.dtype) if known else None
    bandwidth = limits.measure_copy_bandwidth()
    layers = tuple(
        LayerTime(name, timing.summarize(clock.runs_ms), *_bound(2 * macs[name], clock.bytes, peak, bandwidth))
        for name, clock in sorted(clocks.items(), key=lambda item: item[1].started_ns)
    )
    return Measured(timing.summarize(whole_ms), layers, torch.get_num_threads(), peak, bandwidth)


class _Clock:
    """Times one module in each run of its model."""

    def __init__(self, module: nn.Module) -> None:
        self.runs_ms: list[float] = []
        self.run_ms, self.started_ns, self.bytes = 0.0, 0, 0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, module: nn.Module, _: Any) -> None:
        self.started_ns = time.perf_counter_ns()

    def _stop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.run_ms += (time.perf_counter_ns() - self.started_ns) / 1e6
        if not self.runs_ms:
            tensors = [*pytree.tree_leaves((inputs, output)), *module.parameters()]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def end_run(self) -> None:
        """Keep the time of the run that is over."""
        self.runs_ms.append(self.run_ms)
        self.run_ms = 0.0


def _bound(
    flops: int, moved_bytes: int, peak: float | None, bandwidth: float | None
) -> tuple[float, str] | tuple[None, None]:
    if peak is None or bandwidth is None:
        return None, None
    return max((1e3 * flops / peak, "arithmetic"), (1e3 * moved_bytes / bandwidth, "memory"))
