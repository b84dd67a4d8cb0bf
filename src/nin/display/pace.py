"""The pace of a work, from which the time that is left follows."""

from collections import deque

# What of the steps so far is looked at is divided into so many parts at least.
PARTS = 32


class Pace:
    """Seconds per step, over the later half of the steps so far.

    The first steps often take longer than the others: something is loaded, compiled, or decoded and kept.

    Example:
        >>> pace = Pace()
        >>> for step, seconds in enumerate((0, 60, 61, 62, 63)):
        ...     pace.add(step, seconds)
        >>> pace.seconds_per_step
        1.0
    """

    def __init__(self) -> None:
        self.marks: deque[tuple[int, float]] = deque()  # steps and seconds
        self.first = 0
        self.last: tuple[int, float] | None = None

    def add(self, step: int, seconds: float) -> None:
        """Record that so many steps are done after so many seconds."""
        if self.last is None:
            self.first = step
        self.last = (step, seconds)
        done = step - self.first
        if not self.marks or step - self.marks[-1][0] > done // (2 * PARTS):
            self.marks.append(self.last)
        while len(self.marks) > 1 and 2 * (self.marks[1][0] - self.first) <= done:
            self.marks.popleft()

    @property
    def seconds_per_step(self) -> float | None:
        """The pace; None before a second step."""
        if self.last is None or self.last[0] <= self.marks[0][0]:
            return None
        return (self.last[1] - self.marks[0][1]) / (self.last[0] - self.marks[0][0])
