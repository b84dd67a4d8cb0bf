"""Run the benchmark: each case with every engine in turn, beside the roofline bound of this machine."""

import dataclasses
import datetime
import importlib.metadata
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nin.errors import UserError
from nin.ops import backends
from nin.ops.cpu.peak_throughput import measure_copy_bandwidth, measure_peak_flops
from nin.ops.gpu import dispatch
from nin.profiling.bench.cases import CASES, Case
from nin.profiling.bench.engines import ENGINES, Call, UnavailableError, prepare
from nin.profiling.cost import cost
from nin.profiling.roofline import roofline_bound
from nin.runtime.device import choose_device, keep_freed_memory, processor_name
from nin.runtime.progress import ProgressCallback, ignore_progress
from nin.runtime.timer import Timing, time_interleaved

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# for the measured rounds of all engines of a case together, of which there are 5 to 200
SECONDS_PER_CASE = 12.0
# For how long an engine is called before each measured call, see `nin.runtime.timer.time_interleaved`. ONNX Runtime's
# threads spin for 30 to 50 ms after its last call: with 8 ms, the next engine took twice its time on two cores.
SETTLE_MS = 100.0
VERSIONS = ("torch", "onnxruntime", "openvino", "nin")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The processor, its measured limits, the versions of the engines, and the date.

    Attributes:
        peak_gflops: by dtype, of multiply-adds on registers with all threads; 1 multiply-add = 2 FLOP.
        copy_gbytes_per_second: read and written, with all threads.
        malloc: "tuned" where freed memory stays in the process (glibc's mallopt), else "default".
    """

    processor: str
    threads: int
    kernel: str
    peak_gflops: dict[str, float | None]
    copy_gbytes_per_second: float | None
    malloc: str
    versions: dict[str, str]
    python: str
    system: str
    date: str


@dataclasses.dataclass(frozen=True)
class EngineResult:
    """The times of one engine on one case, or why there are none.

    Attributes:
        case: its name in `CASES`.
        dtype: "float32" or "bfloat16".
        engine: its name in `ENGINES`.
        timing: the times, or None.
        reason: why there are none, else empty.
        share_of_limit: the roofline bound over the median: the longer of the times that the machine's limits allow
            for the arithmetic and for reading the input and the weights and writing the result once. The arithmetic
            is that of the taps one by one: Winograd's transforms need less, and may give more than 1. (A fraction;
            files have it under this name.)
        ran: on a GPU, the engines that computed nin's operator.
        choices: why those, by the microseconds of each that were measured or expected.
    """

    case: str
    dtype: str
    engine: str
    timing: Timing | None
    reason: str = ""
    share_of_limit: float | None = None
    ran: str = ""
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The result of `run`."""

    machine: Machine
    measurements: list[EngineResult]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return dataclasses.asdict(self)

    def cases(self) -> list[tuple[str, str]]:
        """Return each case and dtype once, in order."""
        return list(dict.fromkeys((m.case, m.dtype) for m in self.measurements))

    def results_of(self, case: str, dtype: str) -> list[EngineResult]:
        """Return the results of one case and dtype, in order."""
        return [m for m in self.measurements if (m.case, m.dtype) == (case, dtype)]

    def ratio(self, case: str, dtype: str) -> float | None:
        """Return the fastest other engine's median over ``nin``'s, each in its better layout; None without both."""
        times = {m.engine: m.timing.median_ms for m in self.results_of(case, dtype) if m.timing}
        own = [ms for engine, ms in times.items() if engine.startswith("nin")]
        others = [ms for engine, ms in times.items() if not engine.startswith("nin")]
        return min(others) / min(own) if own and others else None


def run(
    cases: Sequence[str] = tuple(CASES),
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    engines: Sequence[str] = tuple(ENGINES),
    device: str = "cpu",
    progress: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    on_progress: ProgressCallback = ignore_progress,
) -> Benchmark:
    """Time the cases with every engine, the engines in turn within one case and dtype.

    Args:
        cases: names in `CASES`.
        dtypes: "float32", "bfloat16".
        engines: names in `nin.profiling.bench.engines.ENGINES`.
        device: "cpu", "cuda", "cuda:1". Every call on a GPU is synchronised, so its times include the launches.
        progress: called with a line of text for each case.
        on_progress: called before each case with (what is being timed, number done, number of all).

    Returns:
        The machine and all measurements; an engine that is not installed has a reason instead of times.

    Raises:
        UserError: a name is not known, or there is no such device here.

    Example:
        >>> nin.profiling.bench.run([], engines=["nin"]).measurements
        []
    """
    for argument, given, known in (("cases", cases, CASES), ("dtypes", dtypes, DTYPES), ("engines", engines, ENGINES)):
        for name in given:
            if name not in known:
                raise UserError(f"{argument} must be among {', '.join(known)}, got {name!r}")
    torch_device = choose_device(device)
    # for every engine: returning memory to the system after each call would time page faults, not arithmetic
    malloc = "tuned" if keep_freed_memory() else "default"
    machine = _inspect_machine(malloc, torch_device)
    measurements: list[EngineResult] = []
    for name in cases:
        for dtype in dtypes:
            on_progress(f"Timing {name} {dtype}", len(measurements) // max(1, len(engines)), len(cases) * len(dtypes))
            results = _run_case(CASES[name], dtype, engines, machine, torch_device)
            measurements += results
            times = ", ".join(f"{m.engine} {m.timing.median_ms:.3f}" for m in results if m.timing)
            progress(f"{name} {dtype}, ms: {times}")
    return Benchmark(machine, measurements)


def _run_case(
    case: Case, dtype: str, engines: Sequence[str], machine: Machine, device: torch.device
) -> list[EngineResult]:
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    ran: dict[str, tuple[str, tuple[str, ...]]] = {}
    round_s = 0.0
    torch._dynamo.reset()  # it stops compiling code that eight models (its recompile_limit) have run
    for engine in engines:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of exporters and compilers, about their own code
                with dispatch.record_groups() as groups:
                    call = prepare(engine, case, DTYPES[dtype], device)
                    call()
                if device.type == "cuda" and engine.startswith("nin"):
                    ran[engine] = dispatch.engine_summary(groups), tuple(dispatch.choice_lines(groups))
                start = time.perf_counter()
                call()
                elapsed_s = time.perf_counter() - start
                round_s += elapsed_s + max(elapsed_s, SETTLE_MS / 1e3)
            calls[engine] = call
        except UnavailableError as error:
            reasons[engine] = str(error)
    runs = int(min(200, max(5, SECONDS_PER_CASE / max(round_s, 1e-6))))
    timings = time_interleaved(calls, runs=runs, warmup=1, settle_ms=SETTLE_MS)
    bound_ms = _bound_ms(case, dtype, machine)
    fractions = {engine: bound_ms / timing.median_ms for engine, timing in timings.items()} if bound_ms else {}
    return [
        EngineResult(case.name, dtype, e, timings.get(e), reasons.get(e, ""), fractions.get(e), *ran.get(e, ("", ())))
        for e in engines
    ]


def _bound_ms(case: Case, dtype: str, machine: Machine) -> float | None:
    """Return the roofline bound of a case: no engine that does all the arithmetic can be faster."""
    peak, copy = machine.peak_gflops[dtype], machine.copy_gbytes_per_second
    if peak is None or copy is None:
        return None
    model = case.model().eval()
    macs = cost(model, case.input_shape).macs
    with torch.no_grad():
        result = model(torch.empty(case.input_shape))
    values = torch.Size(case.input_shape).numel() + result.numel() + sum(p.numel() for p in model.parameters())
    # a training step computes the result, the gradient of the input and that of the weights
    passes = 3 if case.training else 1
    moved_bytes = values * DTYPES[dtype].itemsize * passes
    return roofline_bound(2 * macs * passes, moved_bytes, peak * 1e9, copy * 1e9)[0]


def _inspect_machine(malloc: str, device: torch.device) -> Machine:
    versions = {}
    for package in VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    on_gpu = device.type == "cuda"
    peaks = {name: None if on_gpu else measure_peak_flops(dtype) for name, dtype in DTYPES.items()}
    copy = None if on_gpu else measure_copy_bandwidth()
    return Machine(
        processor=torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        threads=torch.get_num_threads(),
        kernel=backends()["cuda" if on_gpu else "cpu"],
        peak_gflops={name: peak / 1e9 if peak else None for name, peak in peaks.items()},
        copy_gbytes_per_second=copy / 1e9 if copy else None,
        malloc=malloc,
        versions=versions,
        python=platform.python_version(),
        system=platform.system(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
