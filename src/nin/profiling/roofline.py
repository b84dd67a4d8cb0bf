"""Time each layer of a network on the CPU, beside its roofline bound from peak arithmetic and memory bandwidth."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.display.numbers import format_number_of
from nin.ops.cpu.peak_throughput import measure_copy_bandwidth, measure_peak_flops
from nin.runtime.timer import Timing, summarize

# of the runs of the whole model; as many follow with a timer at each layer
SECONDS_OF_RUNS, MIN_RUNS, MAX_RUNS = 1.0, 5, 50


@dataclasses.dataclass(frozen=True)
class LayerTiming:
    """The time of one module, and its lower bound from peak arithmetic and bandwidth.

    Attributes:
        module: its path in the model.
        timing: of its forward pass within the model's; of all its calls together, where the model calls it again.
        bound_ms: the roofline's bound (Williams, Waterman and Patterson 2009): the longer of the time that its
            multiply-accumulates need at the measured peak of the arithmetic and the time that its input, weights and
            result need at the measured bandwidth of a copy in main memory. Data that are still in a cache can be read
            faster than that. None where nin was installed without its compiled library.
        bound_by: "arithmetic" or "memory", whichever needs longer; None as above.
    """

    module: str
    timing: Timing
    bound_ms: float | None
    bound_by: str | None


@dataclasses.dataclass(frozen=True)
class ModelTiming:
    """The times of a model and its layers on this machine's CPU.

    Attributes:
        total: of the whole forward pass, without the layers' timers.
        layers: of the modules that were timed, in the order in which they run.
        threads: of PyTorch.
        peak_flops: FLOP/s of multiply-adds on registers with all threads; None without the compiled library.
        copy_bandwidth: bytes/s, read and written, of a copy in main memory; None as above.
    """

    total: Timing
    layers: tuple[LayerTiming, ...]
    threads: int
    peak_flops: float | None
    copy_bandwidth: float | None

    def __str__(self) -> str:
        """Return the time of the whole, and the limits behind the bounds, in two lines."""
        spread = f"{self.total.low_ms:.2f} to {self.total.high_ms:.2f} ms in 3 of 5 runs"
        lines = [f"{self.total.median_ms:.2f} ms ({spread}) on {format_number_of(self.threads, 'thread')} of the CPU"]
        if self.peak_flops is not None and self.copy_bandwidth is not None:
            limits = f"{self.peak_flops / 1e9:.0f} GFLOP/s and {self.copy_bandwidth / 1e9:.0f} GB/s of copying"
            lines.append(f"at least: by {limits}, both measured here; from a cache it can take less")
        return "\n".join(lines)


def time_model(
    model: nn.Module,
    x: Tensor,
    macs: Mapping[str, int],
    on_progress: Callable[[int, int], object] | None = None,
    whole: nn.Module | None = None,
) -> ModelTiming:
    """Time a model's forward pass, whole and layer by layer.

    Args:
        model: as it is to be timed, on the CPU; gets hooks that stay.
        x: its input.
        macs: multiply-accumulates of the modules to time, by their paths.
        on_progress: called with (runs done, runs in all).
        whole: what computes the same, and is timed as a whole in the model's place; the model itself if not given.

    Returns:
        Medians over as many runs as fit into two seconds, at least five.
    """
    report = on_progress or (lambda done, total: None)
    whole = model if whole is None else whole
    with torch.inference_mode():
        whole(x)  # kernels are chosen and weights packed in the first call
        start = time.perf_counter()
        whole(x)
        runs = max(MIN_RUNS, min(MAX_RUNS, int(SECONDS_OF_RUNS / (time.perf_counter() - start))))
        total_ms: list[float] = []
        for run in range(runs):
            start_ns = time.perf_counter_ns()
            whole(x)
            total_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
            report(run + 1, 2 * runs)
        # after the whole: the hooks themselves take time
        model(x)
        timers = {name: _ModuleTimer(module) for name, module in model.named_modules() if name in macs}
        for run in range(runs):
            model(x)
            for timer in timers.values():
                timer.end_run()
            report(runs + run + 1, 2 * runs)
    peak = measure_peak_flops(x.dtype) if x.dtype in (torch.float32, torch.bfloat16) else None
    bandwidth = measure_copy_bandwidth()
    layers = tuple(
        LayerTiming(name, summarize(timer.runs_ms), *roofline_bound(2 * macs[name], timer.bytes, peak, bandwidth))
        for name, timer in sorted(timers.items(), key=lambda item: item[1].started_ns)
    )
    return ModelTiming(summarize(total_ms), layers, torch.get_num_threads(), peak, bandwidth)


def roofline_bound(
    flops: int, moved_bytes: int, peak_flops: float | None, bandwidth: float | None
) -> tuple[float, str] | tuple[None, None]:
    """Return the lower bound in milliseconds, and which limit sets it; None for both where a limit is unknown.

    Args:
        flops: to compute; a multiply-accumulate is two.
        moved_bytes: read from and written to main memory.
        peak_flops: FLOP/s.
        bandwidth: bytes/s.
    """
    if peak_flops is None or bandwidth is None:
        return None, None
    return max((1e3 * flops / peak_flops, "arithmetic"), (1e3 * moved_bytes / bandwidth, "memory"))


class _ModuleTimer:
    """Times one module in each run of its model, and counts the bytes that it reads and writes."""

    def __init__(self, module: nn.Module) -> None:
        self.runs_ms: list[float] = []
        self.run_ms, self.started_ns, self.bytes = 0.0, 0, 0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, module: nn.Module, _: Any) -> None:
        self.started_ns = time.perf_counter_ns()

    def _stop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.run_ms += (time.perf_counter_ns() - self.started_ns) / 1e6
        if not self.runs_ms:  # the same in every run
            tensors = [*pytree.tree_leaves((inputs, output)), *module.parameters()]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def end_run(self) -> None:
        """Store the time of this run."""
        self.runs_ms.append(self.run_ms)
        self.run_ms = 0.0
