"""Time several functions in interleaved runs, so that other load on the machine slows all of them alike."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

# A ratio of times is no better than they are: beyond this spread it is not told as a result.
STEADY = 1.2


@dataclasses.dataclass(frozen=True)
class Timing:
    """The wall time of a function over several runs.

    Attributes:
        median_ms: in milliseconds.
        low_ms: the 20th percentile.
        high_ms: the 80th percentile.
        runs: how many were measured, without the warm-up.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int

    def times(self, factor: float) -> "Timing":
        """Return the timing of so many times the work."""
        return Timing(factor * self.median_ms, factor * self.low_ms, factor * self.high_ms, self.runs)


def time_interleaved(
    callables: dict[str, Callable[[], object]], *, runs: int = 15, warmup: int = 3, settle_ms: float = 0.0
) -> dict[str, Timing]:
    """Time functions in rounds, each of which runs every one of them once.

    A function that computes on a GPU has to synchronise with it itself.

    Args:
        callables: the functions, by name.
        runs: measured rounds, at least 2.
        warmup: rounds before them that are not measured.
        settle_ms: how long a function is repeated right before its measured run, so that neither the caches nor idle
            threads of the one before disturb it; those of some libraries spin for milliseconds.

    Returns:
        The timing of each function, in the order given.

    Raises:
        ValueError: ``runs`` is less than 2 or ``warmup`` less than 0.

    Example:
        >>> nin.runtime.timer.time_interleaved({"sum": lambda: sum(range(1000))})["sum"].runs
        15
    """
    if runs < 2:
        raise ValueError(f"runs must be at least 2, got {runs}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    times_ms: dict[str, list[float]] = {name: [] for name in callables}
    for number in range(-warmup, runs):
        for name, call in callables.items():
            settled_ns = time.perf_counter_ns() + settle_ms * 1e6
            while settle_ms > 0 and time.perf_counter_ns() < settled_ns:
                call()
            start = time.perf_counter_ns()
            call()
            elapsed_ms = (time.perf_counter_ns() - start) / 1e6
            if number >= 0:
                times_ms[name].append(elapsed_ms)
    return {name: summarize(values) for name, values in times_ms.items()}


def time_until_steady(
    callables: dict[str, Callable[[], object]], *, seconds: float = 4.0, tolerance: float = STEADY
) -> tuple[dict[str, Timing], bool]:
    """Time functions as `time_interleaved` does, again while something else on the machine scatters the times.

    Args:
        callables: the functions, by name.
        seconds: no other attempt begins after so many.
        tolerance: the times are steady where the 80th percentile of none is more than so many times its 20th.

    Returns:
        The timings of the attempt that scattered least, and whether they are steady.
    """
    started, least = time.monotonic(), math.inf
    best: dict[str, Timing] = {}
    while least > tolerance:
        timings = time_interleaved(callables, warmup=0 if best else 3)
        spread = max(timing.high_ms / timing.low_ms for timing in timings.values())
        if spread < least:
            best, least = timings, spread
        if time.monotonic() - started > seconds:
            break
    return best, least <= tolerance


def summarize(times_ms: Sequence[float]) -> Timing:
    """Return the median and the percentiles of at least two times in milliseconds."""
    low, _, _, high = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Timing(statistics.median(times_ms), low, high, len(times_ms))
