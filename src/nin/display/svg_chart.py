"""Charts as SVG text: lines over a common x, points with their spread, and horizontal bars.

Shapes have CSS classes and no colours, so that a page's styles adapt them to light and dark. The units of a drawing
are scaled to the width that the page gives it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

# Two labels at the ends of lines stand at least this far apart.
LABEL_DISTANCE = 15

# Width of every drawing: on the narrowest phones, whose pages leave 288 pixels for it, text of 13 units has 10 pixels.
WIDTH = 360

# Room for a letter of a label, in units; the page's styles may make letters this large and no larger.
LETTER_WIDTH, LETTER_HEIGHT = 7, 12


@dataclasses.dataclass(frozen=True)
class Plot:
    """The area between the axes of a chart, and the values at its edges.

    Attributes:
        width: of the whole drawing.
        height: of the whole drawing.
        left: the smallest x.
        right: the largest x.
        top: the largest y.
        bottom: the smallest y.
        x_range: values at the left and the right edge.
        y_range: values at the bottom and the top edge.
    """

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Return the horizontal position of a value; the middle where the axis has one value only."""
        first, last = self.x_range
        fraction = (value - first) / (last - first) if last > first else 0.5
        return round(self.left + fraction * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """Return the vertical position of a value."""
        low, high = self.y_range
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)

    def draw(self, shapes: Sequence[str], x_ticks: Sequence[float], y_ticks: Sequence[float], label: str) -> str:
        """Return the SVG with a line across and a number for each tick of y, a number for each tick of x."""
        grid = [
            element("line", class_="grid", x1=self.left, x2=self.right, y1=self.y(mark), y2=self.y(mark))
            + text(f"{mark:g}", self.left - 7, self.y(mark) + 4, "end")
            for mark in y_ticks
        ]
        below = [text(f"{mark:g}", self.x(mark), self.bottom + 17, "middle") for mark in x_ticks]
        return svg(self.width, self.height, label, [*grid, *below, *shapes])


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """Return an SVG element; ``class_`` is its class, and underscores in other names become hyphens.

    Example:
        >>> element("text", "a", class_="label", text_anchor="end")
        '<text class="label" text-anchor="end">a</text>'
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    written = "".join(f' {name}="{escape(str(value))}"' for name, value in named.items())
    return f"<{tag}{written}>{content}</{tag}>"


def text(words: str, x: float, y: float, anchor: str = "start") -> str:
    """Return a line of text, escaped, which starts, ends or has its middle at x."""
    return element("text", escape(words), x=round(x, 1), y=round(y, 1), text_anchor=anchor)


def svg(width: float, height: float, label: str, shapes: Sequence[str]) -> str:
    """Return a drawing; ``label`` says in words what it shows."""
    return element("svg", "\n".join(shapes), viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def line_chart(
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    format_value: Callable[[float], str],
    highest: float = math.inf,
) -> str:
    """Draw curves over a common x, each with its name and its last value beside its end.

    Args:
        title: what is shown, with the unit; for those who do not see it.
        x: places along the horizontal axis, ascending.
        series: the values at these places by the curve's name, which is its CSS class too; those that are not finite
            are left out.
        x_label: what x is.
        format_value: a value as text, for the labels at the ends.
        highest: the axis does not go above it (100 for percentages).
    """
    finite = {
        name: points
        for name, values in series.items()
        if (points := [(a, b) for a, b in zip(x, values, strict=True) if math.isfinite(b)])
    }
    values = [b for points in finite.values() for _, b in points] or [0.0]
    y_ticks = round_steps(min(values), max(values), about=4)
    if y_ticks[-1] > highest:
        y_ticks = [mark for mark in y_ticks if mark < highest] + [highest]
    x_range = (min(x), max(x))
    x_ticks = [m for m in round_steps(*x_range, about=5) if x_range[0] <= m <= x_range[1] and m == int(m)]
    ends = {name: f"{name} {format_value(points[-1][1])}" for name, points in finite.items()}
    room = 10 + LETTER_WIDTH * max((len(label) for label in ends.values()), default=0)
    plot = Plot(WIDTH, 236, 34, WIDTH - room, 12, 196, x_range, (y_ticks[0], y_ticks[-1]))
    label_y = _spread_out({name: plot.y(points[-1][1]) for name, points in finite.items()})
    shapes = [text(x_label, (plot.left + plot.right) / 2, plot.height - 4, "middle")]
    for name, points in finite.items():
        places = [(plot.x(a), plot.y(b)) for a, b in points]
        end_x, end_y = places[-1]
        path = "M" + " L".join(f"{a:g} {b:g}" for a, b in places)
        curve = element("path", class_="line", d=path) + element("circle", class_="dot", cx=end_x, cy=end_y, r=3)
        shapes.append(element("g", curve + text(ends[name], end_x + 8, label_y[name] + 4), class_=name))
    description = f"{title} over {x_label}; at the end: {'; '.join(ends.values())}."
    return plot.draw(shapes, x_ticks or [x_range[0]], y_ticks, description)


@dataclasses.dataclass(frozen=True)
class SpreadPoint:
    """A point with a horizontal line for its spread.

    Attributes:
        kind: CSS class of both.
        label: beside the point.
        low: x where the line begins.
        x: of the point.
        high: x where the line ends.
        y: of both.
    """

    kind: str
    label: str
    low: float
    x: float
    high: float
    y: float


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle of a drawing: that of a label, or of what a label must not cover."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Return the area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        return max(0.0, width) * max(0.0, min(self.bottom, other.bottom) - max(self.top, other.top))

    @property
    def area(self) -> float:
        """Return width times height."""
        return (self.right - self.left) * (self.bottom - self.top)


def point_chart(points: Sequence[SpreadPoint], *, x_label: str, description: str, highest: float = math.inf) -> str:
    """Draw points with their spread in x, over an axis from 0, each with its label where there is room.

    Args:
        points: at least one.
        x_label: what x is, with its unit.
        description: what is shown, for those who do not see it.
        highest: no tick of y is above it (100 for percentages).
    """
    longest = 1.08 * max(point.high for point in points)
    low, high = min(point.y for point in points), max(point.y for point in points)
    margin = max(0.1 * (high - low), 0.2)  # room for the labels, and for a line where all are the same
    y_ticks = round_steps(low - margin, high + margin, about=4)
    plot = Plot(WIDTH, 272, 40, WIDTH - 6, 10, 230, (0, longest), (y_ticks[0], y_ticks[-1]))
    shapes = [text(x_label, plot.right, plot.bottom + 36, "end")]
    for point in points:
        x, y = plot.x(point.x), plot.y(point.y)
        ends = {"x1": plot.x(point.low), "x2": plot.x(point.high), "y1": y, "y2": y}
        shapes.append(element("line", class_=f"spread {point.kind}", **ends))
        shapes.append(element("circle", class_=point.kind, cx=x, cy=y, r=4.5))
    for point, box in zip(points, place_labels(plot, points), strict=True):
        x, y, middle = plot.x(point.x), plot.y(point.y), (box.left + box.right) / 2
        if box.bottom < y - 12 or box.top > y + 12:  # too far away to be seen as the point's own
            near = box.bottom if box.bottom < y else box.top
            shapes.append(element("line", class_="leader", x1=x, x2=round(middle, 1), y1=y, y2=round(near, 1)))
        shapes.append(text(point.label, middle, box.bottom - 2, "middle"))
    x_ticks = [mark for mark in round_steps(0, longest, about=5) if mark <= longest]
    return plot.draw(shapes, x_ticks, [mark for mark in y_ticks if mark <= highest], description)


def reliability_chart(
    bins: Sequence[tuple[float, float, float, float]], *, x_label: str, y_label: str, description: str
) -> str:
    """Draw bars over the ranges of x from 0 to 100 that they are for, a point in each, and the diagonal x = y.

    Args:
        bins: (low, high, x, y) of each: where the bar begins and ends, the point, whose y is the bar's height.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        description: what is shown, for those who do not see it.
    """
    plot = Plot(WIDTH, 330, 44, 346, 12, 286, (0, 100), (0, 100))
    shapes = []
    for low, high, x, y in bins:
        place = {"x": plot.x(low) + 0.5, "y": plot.y(y), "width": round(plot.x(high) - plot.x(low) - 1, 1)}
        shapes.append(element("rect", class_="bin", height=round(plot.bottom - plot.y(y), 1), **place))
        shapes.append(element("line", class_="gap", x1=plot.x(x), x2=plot.x(x), y1=plot.y(x), y2=plot.y(y)))
        shapes.append(element("circle", class_="point", cx=plot.x(x), cy=plot.y(y), r=3))
    ends = {"x1": plot.x(0), "y1": plot.y(0), "x2": plot.x(100), "y2": plot.y(100)}
    shapes.append(element("line", class_="diagonal", **ends))
    shapes.append(text(x_label, (plot.left + plot.right) / 2, plot.height - 6, "middle"))
    shapes.append(element("g", text(y_label, 0, 0, "middle"), transform=f"translate(11 {plot.y(50)}) rotate(-90)"))
    ticks = [0, 20, 40, 60, 80, 100]
    return plot.draw(shapes, ticks, ticks, description)


def place_labels(plot: Plot, points: Sequence[SpreadPoint]) -> list[Box]:
    """Return the room of each point's label: the nearest that covers no dot, no line and no other label.

    Where there is none, it is the one that covers least.
    """
    area = Box(plot.left, 0, plot.width, plot.bottom)
    taken = []
    for point in points:
        x, y = plot.x(point.x), plot.y(point.y)
        taken += [Box(x - 6, y - 6, x + 6, y + 6), Box(plot.x(point.low), y - 1.5, plot.x(point.high), y + 1.5)]
    placed = []
    for point in points:
        candidates = _label_candidates(plot, point)
        free = [
            candidate.area - area.overlap(candidate) + sum(candidate.overlap(box) for box in taken)
            for candidate in candidates
        ]
        best = candidates[free.index(min(free))]  # of equal ones the first, which is the nearest
        placed.append(best)
        taken.append(best)
    return placed


def _label_candidates(plot: Plot, point: SpreadPoint) -> list[Box]:
    """Return the places of a point's label, the nearest first: above, below, and at the ends of its line."""
    x, y = plot.x(point.x), plot.y(point.y)
    width = LETTER_WIDTH * len(point.label)
    # moved along the point as far as the edges ask for
    left = min(max(x - width / 2, plot.left + 1), plot.width - width)
    left_of, right_of = plot.x(point.low) - width - 8, plot.x(point.high) + 8
    boxes = []
    for away in range(6):
        height = away * LETTER_HEIGHT
        boxes += [(left, y - 7 - LETTER_HEIGHT - height), (left, y + 7 + height)]
        if away == 0:
            boxes += [(right_of, y - LETTER_HEIGHT / 2), (left_of, y - LETTER_HEIGHT / 2)]
        boxes += [(side, y + up) for side in (right_of, left_of) for up in (-20 - height, 8 + height)]
    return [Box(a, b, a + width, b + LETTER_HEIGHT) for a, b in boxes]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A row of a bar chart.

    Attributes:
        label: above the bars.
        lengths: (CSS class, value, height) of each bar in the row; later ones lie over earlier ones.
        spread: values between which a line is drawn; none where it is empty.
        note: behind the bar.
    """

    label: str
    lengths: Sequence[tuple[str, float, float]] = ()
    spread: tuple[float, float] | tuple[()] = ()
    note: str = ""


def bar_chart(bars: Sequence[Bar], *, description: str, note_width: float) -> str:
    """Draw rows of horizontal bars, each under its label; they fill the width where they or their spread are longest.

    Args:
        bars: from top to bottom.
        description: what is shown, for those who do not see it.
        note_width: room behind the longest bar.
    """
    lengths = [(*(value for _, value, _ in bar.lengths), *bar.spread) for bar in bars]
    scale = (WIDTH - note_width) / (max((max(values, default=0) for values in lengths), default=0) or 1)
    shapes, row = [], 32
    for i, (bar, values) in enumerate(zip(bars, lengths, strict=True)):
        middle = i * row + 22
        shapes.append(text(bar.label, 0, i * row + 12))
        for kind, value, height in bar.lengths:
            place = {"x": 0, "y": middle - height / 2, "width": round(scale * value, 1), "height": height}
            shapes.append(element("rect", class_=kind, **place))
        if bar.spread:
            low, high = (round(scale * value, 1) for value in bar.spread)
            shapes.append(element("line", class_="spread", x1=low, x2=high, y1=middle, y2=middle))
        if bar.note:
            shapes.append(text(bar.note, scale * max(values) + 6 if values else 0, middle + 4))
    return svg(WIDTH, len(bars) * row, description, shapes)


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


def _spread_out(heights: Mapping[str, float]) -> dict[str, float]:
    """Return the heights with neighbours moved apart until there is room for a label at each."""
    names = sorted(heights, key=lambda name: heights[name])
    placed = dict(heights)
    for above, below in itertools.pairwise(names):
        missing = max(0.0, LABEL_DISTANCE - (placed[below] - placed[above]))
        placed[above] -= missing / 2
        placed[below] += missing / 2
    return placed
