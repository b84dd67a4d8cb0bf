"""The page of a search: loss against time of every combination, with the front that no other is better than."""

import math
from collections.abc import Sequence
from typing import Any

from nin.display.svg_chart import WIDTH, Plot, element, round_steps, text
from nin.engines.catalog import ENGINES
from nin.report.html_page import load_template
from nin.speed_search.result import Row, SpeedResult, format_latency, pareto

# corners of each engine's sign around its middle; the circle has none
_CORNERS: dict[str, Sequence[tuple[float, float]]] = {
    "compile": ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
    "nin": ((0, -6), (6, 0), (0, 6), (-6, 0)),
    "onnxruntime": ((0, -5.5), (5.5, 4.5), (-5.5, 4.5)),
    "openvino": ((0, 5.5), (5.5, -4.5), (-5.5, -4.5)),
}
_FILLS = {"float32": "float32, filled", "bfloat16": "bfloat16, grey", "int8": "int8, empty"}

# Losses above so many times the limit (and this many points) are drawn at the upper edge: where a quantised network
# answers at random, all others would be one line at the bottom.
LARGEST_LOSS, LEAST_RANGE = 4, 2.0


def render_page(result: SpeedResult) -> str:
    """Return the page as HTML text; it loads and runs nothing, and every name is escaped."""
    rows, lines = result.table(), result.lines()
    machine = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    before, after = machine["load"]
    lost = "Accuracy lost" if result.labelled else "Answers changed"
    chosen = next((i for i, row in enumerate(rows[1:]) if row[2].endswith("←")), None)
    return str(
        load_template("speed_report.html").render(
            title=f"{result.network}: what makes it fast",
            choice=lines[0].removeprefix("← the").replace(" fastest", "The fastest", 1),
            lines=lines[1:],
            charts={batch: chart(result, batch) for batch in result.batches},
            lost_title=lost,
            explanation=explanation(result),
            key=key(result),
            rows=rows,
            chosen=chosen,
            machine=f"{machine['processor']}, {machine['cores']} cores, {machine['kernel']}; load {before:g} at the "
            f"beginning and {after:g} at the end; {versions}; {machine['date']}",
        )
    )


def explanation(result: SpeedResult) -> str:
    """Return what a chart shows, in words."""
    what = "points of accuracy on the test images" if result.labelled else "per cent of the answers that changed"
    most = _largest_shown(result)
    is_cut = any(row.latency and _lost(row) > most for row in result.rows)
    beyond = f" Signs at the upper edge lost {most:g} or more: the table has the figures." if is_cut else ""
    return (
        f"Down is better, left is faster. Upwards: {what}, lost in comparison with the original; the dashed line is "
        f"the limit, {result.lose:g}. To the right: milliseconds, each step of the scale a multiple. The thin line "
        "joins the combinations that no other is better than. Under the chart stand the figures of the sign that is "
        f"pointed at, or reached with the Tab key; until then, those of the fastest.{beyond}"
    )


def key(result: SpeedResult) -> list[tuple[str, str]]:
    """Return the signs of the chart and what they mean."""
    engines = dict.fromkeys(row.combination.engine for row in result.rows if row.latency)
    numbers = dict.fromkeys(row.combination.number for row in result.rows if row.latency)
    signs = [(_key_sign(engine, "float32"), ENGINES[engine].title) for engine in engines]
    return [*signs, *((_key_sign("eager", number), _FILLS[number]) for number in numbers)]


def _key_sign(engine: str, number: str) -> str:
    shapes = element("g", _mark(engine, 9, 9), class_=number)
    return element("svg", shapes, class_="key", viewBox="0 0 18 18", aria_hidden="true")


def chart(result: SpeedResult, batch: int) -> str:
    """Return the loss of every combination against its time at a batch size, as SVG."""
    rows = [row for row in result.rows if batch in row.latency]
    lows = min(row.latency[batch].low for row in rows)
    highs = max(row.latency[batch].high for row in rows)
    most = _largest_shown(result)
    losses = [min(_lost(row), most) for row in rows]
    y_ticks = round_steps(min(0.0, *losses), max(result.lose, *losses), about=5)
    x_range = math.log10(lows / 1.15), math.log10(highs * 1.15)
    plot = Plot(WIDTH, 332, 36, WIDTH - 8, 14, 220, x_range, (y_ticks[0], y_ticks[-1]))
    limit_y = plot.y(result.lose)
    shapes = [
        text(f"milliseconds, {batch} at a time", plot.right, plot.bottom + 34, "end"),
        element("line", class_="limit", x1=plot.left, x2=plot.right, y1=limit_y, y2=limit_y),
        element("path", class_="front", d=_front_path(plot, pareto(tuple(rows), batch), batch)),
    ]
    # the chosen one last, above the others
    ordered = sorted(rows, key=lambda row: (row.combination == result.chosen, -row.latency[batch].median))
    shapes += [_point(plot, result, row, batch, is_first=row is ordered[-1]) for row in ordered]
    marks = time_marks(lows / 1.15, highs * 1.15)
    below = [text(f"{mark:g}", plot.x(math.log10(mark)), plot.bottom + 17, "middle") for mark in marks]
    description = f"{explanation(result).split('.')[0]}. The figures are in the table below."
    drawn = plot.draw([*below, *shapes], [], y_ticks, description)
    # what can be gone through is no single picture
    return drawn.replace('role="img"', 'role="group"', 1)


def time_marks(low: float, high: float) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) between two times; both ends where there are few.

    Example:
        >>> time_marks(0.8, 12)
        [1.0, 2.0, 5.0, 10.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [round(step * 10.0**power, 12) for power in powers for step in (1, 2, 5)]
    inside = [mark for mark in marks if low <= mark <= high]
    return inside if len(inside) >= 2 else [float(f"{low:.3g}"), float(f"{high:.3g}")]


def _largest_shown(result: SpeedResult) -> float:
    """Return the loss above which all stand at the chart's upper edge, so that the others can be told apart."""
    return max(LARGEST_LOSS * result.lose, LEAST_RANGE)


def _lost(row: Row) -> float:
    assert row.quality is not None
    return row.quality.lost


def _place(plot: Plot, row: Row, batch: int) -> tuple[float, float]:
    """Return where a combination stands; losses beyond the range stand at its upper edge."""
    low, high = plot.y_range
    return plot.x(math.log10(row.latency[batch].median)), plot.y(min(max(_lost(row), low), high))


def _front_path(plot: Plot, front: Sequence[Row], batch: int) -> str:
    places = [_place(plot, row, batch) for row in front]
    return "M" + " L".join(f"{x:g} {y:g}" for x, y in places)


def _mark(engine: str, x: float, y: float) -> str:
    corners = _CORNERS.get(engine)
    if corners is None:
        return element("circle", class_="mark", cx=x, cy=y, r=4.5)
    points = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in corners)
    return element("polygon", class_="mark", points=points)


def _point(plot: Plot, result: SpeedResult, row: Row, batch: int, *, is_first: bool) -> str:
    """Return the sign of a combination with its spread, and the words that are shown while it is pointed at.

    Args:
        plot: where it is drawn.
        result: that it is of.
        row: the combination.
        batch: images at a time.
        is_first: whether the words are shown before any is pointed at.
    """
    (x, y), latency, told = _place(plot, row, batch), row.latency[batch], describe(result, row, batch)
    ends = {"x1": plot.x(math.log10(latency.low)), "x2": plot.x(math.log10(latency.high)), "y1": y, "y2": y}
    words = "".join(text(line, 4, plot.bottom + 56 + 16 * i) for i, line in enumerate(told))
    parts = [
        element("line", class_="spread", **ends),
        element("circle", class_="ring", cx=x, cy=y, r=9),
        _mark(row.combination.engine, x, y),
        element("g", words, class_="told", aria_hidden="true"),
    ]
    chosen = " chosen" if row.combination == result.chosen else ""
    kind = f"point {row.combination.number}{chosen}{' first' if is_first else ''}"
    return element("g", "".join(parts), class_=kind, tabindex="0", role="img", aria_label="; ".join(told))


def describe(result: SpeedResult, row: Row, batch: int) -> list[str]:
    """Return short lines with the figures of a combination."""
    quality, combination = row.quality, row.combination
    assert quality is not None
    setting: Any = row.settings[batch]
    threads = f"{setting.threads} thread{'' if setting.threads == 1 else 's'}"
    lost = f"{quality.lost:+.2f} ± {quality.lost_error:.2f} points" if result.labelled else f"{quality.lost:.2f} %"
    return [
        f"{combination.form}, {combination.number}, {ENGINES[combination.engine].title}",
        f"{format_latency(row.latency[batch])} ms, {result.speedup(row, batch):.2f} ×, {threads}",
        f"lost {lost}",
        f"files {row.file_bytes / 1e6:.1f} MB, memory {row.peak_bytes / 1e6:.0f} MB",
    ]
