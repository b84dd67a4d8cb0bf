"""The report of a run as one HTML file, which loads and runs nothing."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from numpy.typing import NDArray

from nin.display.numbers import format_count, format_percent, format_percent_range
from nin.display.svg_chart import reliability_chart
from nin.display.training_curves import range_test_curve, training_curves
from nin.epoch_metrics import evaluated_part
from nin.report import heatmaps
from nin.report.data import Calibration, ConfusedPair, ExamplePrediction, ReportData
from nin.report.settings import used_settings

# Nobody reads a confusion matrix of more classes, and it is wider than the page.
MAX_MATRIX_CLASSES = 30

# A longer table of layers is folded: on a phone it would be several screens of the page.
MAX_OPEN_LAYERS = 20

# Misclassified photos shown: each takes 20 times the bytes of a small image.
MAX_PHOTOS = 12

MINUS, NO_VALUE, NARROW_SPACE = "−", "–", "\N{NARROW NO-BREAK SPACE}"


def render_report(report: ReportData) -> str:
    """Return the page as HTML text.

    Every name is escaped, and the page's own policy forbids it to load or run anything.

    Args:
        report: what `nin.report.build_report` returns.

    Returns:
        One self-contained file: pictures, charts and styles are in it.
    """
    are_photos = report.preprocessing["size"] > heatmaps.LARGEST_PIXELATED
    mistakes = report.mistakes[:MAX_PHOTOS] if are_photos else report.mistakes
    images = {name: value for name, value in report.preprocessing.items() if value is not None}
    template = load_template("run_report.html", trim_blocks=True, lstrip_blocks=True, finalize=_printable)
    return template.render(
        report=report,
        evaluated_part=evaluated_part,
        samples=[_sample(example) for example in report.samples],
        mistakes=[(example, _image(example.pixels)) for example in mistakes],
        charts={**training_curves(report.curves), **range_test_curve(report.range_test)},
        reliability=[(calibration, _reliability_chart(calibration)) for calibration in report.calibration],
        matrix=_matrix(report) if len(report.classes) <= MAX_MATRIX_CLASSES else None,
        confused=_bars(report.confused),
        per_class=_per_class(report),
        layers=report.cost.rows(),
        folds_layers=len(report.cost.layers) > MAX_OPEN_LAYERS,
        is_1x1=[layer.is_1x1 for layer in report.cost.layers],
        fractions=[layer.macs / max(1, report.cost.macs) for layer in report.cost.layers],
        settings=[
            ("Recipe", used_settings(report.recipe, report.preprocessing["size"])),
            ("Images", images),
            ("Made with", report.environment),
        ],
    )


@functools.cache
def load_template(name: str, **options: Any) -> Any:
    """Return the Jinja template in a file of this package; ``options`` are those of its environment."""
    import jinja2  # takes 0.16 s, which `import nin.report` is spared

    loader = jinja2.FunctionLoader(lambda name: resources.files("nin.report").joinpath(name).read_text("utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, **options)
    environment.filters |= {
        "percent": percent,
        "score": score,
        "count": lambda n: f"{n:,}",
        "short": lambda n: format_count(n, NARROW_SPACE),
        "setting": setting,
        "minutes": minutes,
        "interval": interval,
        "figure": lambda v: f"{v:.6g}",
        "breakable": breakable,
    }
    return environment.get_template(name)


def _printable(value: Any) -> Any:
    """Return text without control characters and without the lone surrogates that file names can hold."""
    if type(value) is not str:  # Markup is the template's own
        return value
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in value)


def breakable(words: str) -> Any:
    """Return escaped text that may go on in the next line after a slash, a dot, a hyphen or an underscore.

    Browsers break long file names at any letter, else.
    """
    from markupsafe import Markup, escape  # comes with Jinja

    return Markup("<wbr>").join(escape(_printable(part)) for part in re.split(r"(?<=[/\\._-])(?=\w)", words))


def percent(fraction: float | None, of: int | None = None) -> str:
    """Return a percentage, with as many decimals as ``of`` images tell apart."""
    return NO_VALUE if fraction is None else format_percent(fraction, _decimals(of), NARROW_SPACE)


def interval(pair: Sequence[float], of: int) -> str:
    """Return both ends of an interval as percentages."""
    return f"{format_percent_range(pair, _decimals(of))}{NARROW_SPACE}%"


def _decimals(images: int | None) -> int:
    return 1 if images is None or images < 2000 else 2


def score(value: float) -> str:
    """Return a score with its sign and one decimal."""
    text = f"{abs(value):.1f}"
    return "0.0" if text == "0.0" else f"{MINUS if value < 0 else '+'}{text}"


def minutes(value: float | None) -> str:
    """Return a duration in seconds, minutes or hours."""
    if value is None:
        return NO_VALUE
    if value < 1:
        return f"{60 * value:.0f}{NARROW_SPACE}s"
    return f"{value:.1f}{NARROW_SPACE}min" if value < 100 else f"{value / 60:.1f}{NARROW_SPACE}h"


def setting(value: Any) -> str:
    """Return a setting as text."""
    match value:
        case None:
            return NO_VALUE
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(setting(item) for item in value)
        case dict():
            return "; ".join(f"{name}: {setting(item)}" for name, item in value.items())
        case _:
            return str(value)


def _image(pixels: NDArray[Any]) -> str:
    """Return an image as a ``data:`` URI; a small one in its own size, which the page enlarges."""
    side = pixels.shape[-1]
    return heatmaps.data_uri(heatmaps.resized_image(torch.from_numpy(pixels), min(side, heatmaps.display_size(side))))


def _sample(example: ExamplePrediction) -> dict[str, Any]:
    """Return an image and its maps, drawn on one scale, as ``data:`` URIs."""
    pixels = torch.from_numpy(example.pixels)
    values = [torch.from_numpy(m.values) for m in example.maps]
    limit = heatmaps.symmetric_limit(torch.stack(values)) if values else 1.0
    size = heatmaps.display_size(pixels.shape[-1])
    overlays = [heatmaps.data_uri(heatmaps.overlay(pixels, v, limit=limit, size=size)) for v in values]
    return {
        "example": example,
        "image": _image(example.pixels),
        "maps": list(zip(example.maps, overlays, strict=True)),
        "limit": f"{limit:.1f}" if limit >= 0.05 else f"{limit:.1g}",
    }


def _reliability_chart(calibration: Calibration) -> str:
    bins = [(100 * b.low, 100 * b.high, 100 * b.confidence, 100 * b.accuracy) for b in calibration.bins]
    said = "; ".join(
        f"{b.images:,} images answered with {percent(b.confidence)}, {percent(b.accuracy)} of them right"
        for b in calibration.bins
    )
    return reliability_chart(
        bins, x_label="probability of the answer, %", y_label="answers that are right, %", description=f"{said}."
    )


def _matrix(report: ReportData) -> list[dict[str, Any]]:
    """Return the rows of the confusion matrix; each cell with the opacity of its colour."""
    rows = []
    for i, (name, counts) in enumerate(zip(report.classes, report.confusion, strict=True)):
        fractions = [n / max(1, sum(counts)) for n in counts]
        # At most 0.55, so that the numbers keep a contrast of 4.5 in light and dark.
        shades = [0.55 * (f if i == j else min(1, 3 * f)) for j, f in enumerate(fractions)]
        cells = [
            {"count": n, "shade": f"{shade:.3f}", "right": i == j}
            for j, (n, shade) in enumerate(zip(counts, shades, strict=True))
        ]
        rows.append({"name": name, "cells": cells})
    return rows


def _bars(confused: Sequence[ConfusedPair]) -> list[tuple[ConfusedPair, float]]:
    """Return the pairs, each with the length of its bar: 1 for the longest."""
    longest = max((pair.images for pair in confused), default=1)
    return [(pair, pair.images / longest) for pair in confused]


def _per_class(report: ReportData) -> list[Any]:
    """Return the classes in their order; where there are many, those of the lowest recall first."""
    rows = list(report.per_class)
    if len(rows) > MAX_MATRIX_CLASSES:
        rows.sort(key=lambda row: 2.0 if row.recall is None else row.recall)
    return rows
