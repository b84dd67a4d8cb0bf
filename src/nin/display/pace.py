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


class StageFraction:
    """The part that is done of work in stages whose number is not known: each takes half of what is left before it.

    Example:
        >>> from nin.display.pace import StageFraction
        >>> fraction = StageFraction()
        >>> fraction(1, 2), fraction(2, 2), fraction(1, 4), fraction(0, 0), fraction(3, 4)
        (0.25, 0.5, 0.5625, 0.5625, 0.6875)
    """

    def __init__(self) -> None:
        self.base = self.reached = self.before = 0.0

    def __call__(self, done: int, total: int) -> float:
        """Return the part of all that is done, where so many steps of a stage are; a smaller part begins another."""
        if not total:  # not known
            return self.reached
        part = done / total
        if part < self.before:
            self.base = self.reached
        self.before = part
        self.reached = max(self.reached, self.base + (1 - self.base) * part / 2)
        return self.reached
