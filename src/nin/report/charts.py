"""The geometry of line charts: numbers become places in a drawing, which the template fills with SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# In units of the drawing, which is scaled to the width of the page. At 328 units, the width of a narrow phone's
# page, a unit is a pixel or more and the 12-unit text stays readable.
WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 34, 102, 12, 40

# Two labels at the ends of lines stand at least this far apart.
LABEL_DISTANCE = 15


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where it is, and what stands beside it."""

    position: float
    text: str


@dataclass(frozen=True)
class Line:
    """One curve: its name, the SVG path, its end, and the label beside the end."""

    name: str
    path: str
    end: tuple[float, float]
    label: str
    label_y: float


@dataclass(frozen=True)
class Chart:
    """A line chart, ready to be drawn.

    Attributes:
        title: what it shows, with the unit.
        description: the same in words, for those who do not see it.
        x_label: what runs along the horizontal axis.
        x_ticks: marks along it.
        y_ticks: marks along the vertical axis.
        lines: the curves.
    """

    title: str
    description: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


def line_chart(
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    write: Callable[[float], str],
    highest: float = math.inf,
) -> Chart:
    """Lay out curves over a common x.

    Args:
        title: what is shown, with the unit.
        x: places along the horizontal axis, ascending.
        series: the values at these places by the curve's name.
        x_label: what x is.
        write: a value as text, for the labels at the ends.
        highest: the axis does not go above it (100 for percentages).
    """
    finite = [v for values in series.values() for v in values if math.isfinite(v)] or [0.0]
    y_marks = round_steps(min(finite), max(finite), about=4)
    if y_marks[-1] > highest:
        y_marks = [mark for mark in y_marks if mark < highest] + [highest]
    low, high = y_marks[0], y_marks[-1]
    first, last = min(x), max(x)

    def place(a: float, b: float) -> tuple[float, float]:
        along = (a - first) / (last - first) if last > first else 0.5
        return (
            round(LEFT + along * (WIDTH - LEFT - RIGHT), 1),
            round(TOP + (high - b) / (high - low) * (HEIGHT - TOP - BOTTOM), 1),
        )

    lines = []
    for name, values in series.items():
        points = [place(a, b) for a, b in zip(x, values, strict=True) if math.isfinite(b)]
        if points:
            path = "M" + " L".join(f"{a:g} {b:g}" for a, b in points)
            end = next(v for v in reversed(values) if math.isfinite(v))
            lines.append(Line(name, path, points[-1], write(end), points[-1][1]))
    x_marks = [mark for mark in round_steps(first, last, about=5) if first <= mark <= last and mark == int(mark)]
    words = "; ".join(f"{line.name} ends at {line.label}" for line in lines)
    return Chart(
        title,
        f"{title} over {x_label}: {words}.",
        x_label,
        tuple(Tick(place(mark, low)[0], f"{mark:g}") for mark in x_marks or [first]),
        tuple(Tick(place(first, mark)[1], f"{mark:g}") for mark in y_marks),
        tuple(_apart(lines)),
    )


def round_steps(low: float, high: float, *, about: int) -> list[float]:
    """Return evenly spaced round numbers (1, 2 or 5 times a power of ten apart) that enclose a range.

    Example:
        >>> round_steps(0.13, 0.87, about=4)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    # A value on a mark does not open another interval because of rounding.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _apart(lines: list[Line]) -> list[Line]:
    """Return the lines with labels that do not overlap, each near its line's end."""
    order = sorted(lines, key=lambda line: line.end[1])
    for i in range(1, len(order)):
        above, below = order[i - 1], order[i]
        missing = LABEL_DISTANCE - (below.label_y - above.label_y)
        if missing > 0:
            order[i - 1] = _labelled_at(above, above.label_y - missing / 2)
            order[i] = _labelled_at(below, below.label_y + missing / 2)
    return order


def _labelled_at(line: Line, y: float) -> Line:
    return Line(line.name, line.path, line.end, line.label, round(y, 1))
