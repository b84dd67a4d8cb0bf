"""Times of many processes, taken in turn until each median is known well enough, and their intervals."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

# Rounds at least: fewer times have no interval of 95 % (with 6, smallest and largest hold the median in 97 % of cases).
MIN_ROUNDS, MAX_ROUNDS = 7, 40

# A median is known well enough where its interval is narrower than this fraction of it.
PRECISION = 0.04


@dataclasses.dataclass(frozen=True)
class Interval:
    """A median with the interval that holds it in 95 % of cases.

    Attributes:
        median: of all values.
        low: end of the interval.
        high: end of the interval.
        count: of the values.
    """

    median: float
    low: float
    high: float
    count: int

    @property
    def is_precise(self) -> bool:
        """Whether the interval is narrow enough to end the rounds."""
        return self.count >= MIN_ROUNDS and self.high - self.low <= PRECISION * self.median

    def overlaps(self, other: "Interval") -> bool:
        """Return whether the two may be the same."""
        return self.low <= other.high and other.low <= self.high


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median of values, and the interval between two of them that holds it in 95 % of cases.

    Which two are taken follows from the binomial distribution, whatever that of the values is.

    Example:
        >>> median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 9.0, 7.0])
        Interval(median=4.0, low=1.0, high=9.0, count=7)
    """
    ordered, n = sorted(values), len(values)
    below, outside = 0.0, 0  # the probability that fewer than that many values lie below the median
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n
        if below > 0.025:
            break
        outside = k
    return Interval(statistics.median(ordered), ordered[outside], ordered[n - 1 - outside], n)


def time_in_rounds(
    timers: Mapping[str, Callable[[], float]],
    *,
    seconds: float,
    on_round: Callable[[int], object] = lambda number: None,
    before: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, list[float]]:
    """Time each in turn, round by round, until all medians are known well enough, or the time is over.

    Args:
        timers: return milliseconds, by name.
        seconds: after which no round begins; but `MIN_ROUNDS` are made in any case.
        on_round: called with the number of rounds done, after each.
        before: times of earlier rounds, which count.

    Returns:
        The times by name, one for each round.
    """
    times = {name: list((before or {}).get(name, ())) for name in timers}
    end = time.monotonic() + seconds
    while True:
        done = min((len(values) for values in times.values()), default=MAX_ROUNDS)
        over = time.monotonic() >= end or done >= MAX_ROUNDS
        if done >= MIN_ROUNDS and (over or all(median_interval(values).is_precise for values in times.values())):
            return times
        for name, timer in timers.items():
            times[name].append(timer())
        on_round(done + 1)
