"""Time the ways of computing a group of layers, within a budget, and the tile sizes of each kernel.

The first shape of its kind on a GPU takes about a second more: `time_engines` times the library and the kernels on the
call's own tensors. What a measurement found is kept, see `timing_cache`.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from nin.ops.gpu.timing_cache import warn_once

BUDGET_S = 1.0
# How long kernels are compiled that turn out not to fit, before the library takes their place: in float32 some take a
# minute each.
MAX_FAILING_S = 20.0
RUNS = 5

Tiles = TypeVar("Tiles")


class KernelUnavailableError(RuntimeError):
    """A kernel does not compile for this GPU or does not fit it; the message says why.

    Attributes:
        group: the group of layers that it was to compute, once it is known; an `engine_plan.LayerGroup`.
    """

    group: Any = None


@dataclasses.dataclass
class Tuning:
    """The measurements of one call, or the tiles that earlier ones chose.

    Attributes:
        tiles: the tiles to take, as text, by kernel.
        time_us: returns the GPU time of a call in microseconds; None where nothing is to be measured.
        clock: in seconds.
        ends: when to begin no further measurement, by the clock.
        left_out: what was not measured for want of time.
    """

    tiles: dict[str, str] = dataclasses.field(default_factory=dict)
    time_us: Callable[[Callable[[], Any]], float] | None = None
    clock: Callable[[], float] = time.monotonic
    ends: float = 0.0
    left_out: list[str] = dataclasses.field(default_factory=list)


_tuning: ContextVar[Tuning | None] = ContextVar("tuning", default=None)


@contextlib.contextmanager
def use(tuning: Tuning) -> Iterator[Tuning]:
    """Have the kernels that this thread launches meanwhile take their tiles by ``tuning``."""
    token = _tuning.set(tuning)
    try:
        yield tuning
    finally:
        _tuning.reset(token)


@contextlib.contextmanager
def without_measurement() -> Iterator[None]:
    """Take the tiles that the measurement has chosen so far, and measure no others meanwhile."""
    tuning = _tuning.get() or Tuning()
    with use(Tuning(tuning.tiles)):
        yield


@contextlib.contextmanager
def running(group: Any) -> Iterator[None]:
    """Take the tiles that were chosen for a group of a plan, unless they are being measured; name it in errors."""
    try:
        with use(_tuning.get() or Tuning(dict(group.choice.tiles))):
            yield
    except KernelUnavailableError as error:
        error.group = error.group or group
        raise


# (kernel, shape, tiles) that did not compile or fit
_unavailable: set[tuple[Any, ...]] = set()


def launch_tuned(
    kernel: str, shape: Sequence[Any], x: Tensor, candidates: Sequence[Tiles], launch: Callable[[Tiles], None]
) -> None:
    """Launch a kernel with the tiles that were chosen for it; measure them first where that is wanted.

    Tiles that do not compile or fit give way to the next ones, which is said once.

    Args:
        kernel: its name.
        shape: the numbers that the compiled kernel depends on.
        x: the input, for its dtype and device.
        candidates: tiles, the default first.
        launch: of the kernel with some tiles; it may be called several times.

    Raises:
        KernelUnavailableError: no tiles compile and fit.
    """
    tuning = _tuning.get() or Tuning()
    problem = kernel, *shape, x.dtype, x.device
    left = [tiles for tiles in candidates if (*problem, str(tiles)) not in _unavailable]
    if tuning.time_us is not None and kernel not in tuning.tiles and len(left) > 1:
        tuning.tiles[kernel] = str(_fastest(kernel, left, launch, tuning))
    left.sort(key=lambda tiles: str(tiles) != tuning.tiles.get(kernel))
    reason, start = KernelUnavailableError(f"{kernel}: no tiles fit"), tuning.clock()
    for tiles in left:
        try:
            return launch(tiles)
        except KernelUnavailableError as error:
            reason = error
            _unavailable.add((*problem, str(tiles)))
            warn_once(f"nin: {error}; other tiles, or else the library, take its place")
        if tuning.clock() - start > MAX_FAILING_S:
            break
    raise reason


def _fastest(kernel: str, candidates: Sequence[Tiles], launch: Callable[[Tiles], None], tuning: Tuning) -> Tiles:
    """Return the tiles whose launch takes the least time; those after the first are tried while there is time."""
    times: dict[int, float] = {}
    longest_s = 0.0
    for i, tiles in enumerate(candidates):
        start = tuning.clock()
        # A compilation cannot be stopped half way. The first one is not for the measurement's sake: without any, the
        # kernel could not run.
        if times and start + longest_s > tuning.ends:
            tuning.left_out += [f"{kernel} {tiles}" for tiles in candidates[i:]]
            break
        try:
            launch(tiles)
            assert tuning.time_us is not None
            times[i] = tuning.time_us(lambda tiles=tiles: launch(tiles))  # type: ignore[misc]
        except KernelUnavailableError:
            if not times:  # `launch_tuned` goes on from here, and says so
                return tiles
        longest_s = max(longest_s, tuning.clock() - start)
    return candidates[min(times, key=times.__getitem__)]


def time_engines(engines: Mapping[str, Callable[[], Any]], tuning: Tuning) -> dict[str, float]:
    """Return the time of each engine in microseconds, the library's first; one that fails has none, which is said once.

    Args:
        engines: by name, a function that makes what is to be timed: it compiles, chooses tiles, and returns a call.
        tuning: time function, clock and end; it gets the tiles that were chosen.
    """
    times: dict[str, float] = {}
    assert tuning.time_us is not None
    for name, prepare in engines.items():
        if times and tuning.clock() > tuning.ends:
            tuning.left_out.append(name)
            continue
        try:
            with use(tuning):
                call = prepare()
            times[name] = tuning.time_us(call)
        except (KernelUnavailableError, torch.OutOfMemoryError) as error:
            warn_once(f"nin: {name} is not among the engines here: {error}")
    return times


class GpuTimer:
    """Time calls on a GPU: its own time, without that of the launches.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        # written between the runs, so that no run finds its input in the L2 cache
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(max(size, 1), dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        """Return the median time of a call in microseconds, of five."""
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        launched_s = time.perf_counter() - start
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)]
        for begin, end in events:
            # The GPU is kept busy until the whole call is launched: what is timed is the kernels, not the waiting for
            # them. Two cycles a nanosecond, and twice the time.
            torch.cuda._sleep(int(launched_s * 4e9) + 100_000)
            self._flushed.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(1e3 * begin.elapsed_time(end) for begin, end in events)
