"""Times calls side by side, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long a call took over several runs.

    Attributes:
        median_ms: half of the runs were faster, in milliseconds.
        low_ms: the 20th percentile.
        high_ms: the 80th percentile.
        runs: how many were measured, the warm-up not among them.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def compare(
    callables: dict[str, Callable[[], object]], *, runs: int = 15, warmup: int = 3, settle_ms: float = 0.0
) -> dict[str, Timing]:
    """Time calls in turn: each round runs every one of them once.

    A call that works on a GPU has to wait for it itself.

    Args:
        callables: what to call, by name.
        runs: measured rounds, at least 2.
        warmup: rounds before them that are not measured.
        settle_ms: for how long a call is repeated right before it is measured, until nothing is left of what another
            one left running or in the caches: idle threads of some libraries spin for milliseconds.

    Returns:
        The timing of each call, in the order given.

    Raises:
        ValueError: ``runs`` is less than 2 or ``warmup`` less than 0.

    Example:
        >>> nin.runtime.timer.compare({"sum": lambda: sum(range(1000))})["sum"].runs
        15
    """
    if runs < 2:
        raise ValueError(f"runs must be at least 2, got {runs}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    times_ms: dict[str, list[float]] = {name: [] for name in callables}
    for turn in range(-warmup, runs):
        for name, call in callables.items():
            settled_ns = time.perf_counter_ns() + settle_ms * 1e6
            while settle_ms > 0 and time.perf_counter_ns() < settled_ns:
                call()
            start = time.perf_counter_ns()
            call()
            elapsed_ms = (time.perf_counter_ns() - start) / 1e6
            if turn >= 0:
                times_ms[name].append(elapsed_ms)
    return {name: summary(values) for name, values in times_ms.items()}


def summary(times_ms: Sequence[float]) -> Timing:
    """Return the median and the percentiles of measured milliseconds, of at least two runs."""
    low, _, _, high = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Timing(statistics.median(times_ms), low, high, len(times_ms))
