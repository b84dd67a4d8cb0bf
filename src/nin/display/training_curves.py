"""The curves of a training as SVG."""

import math
from collections.abc import Mapping, Sequence

from nin.display.svg_chart import line_chart

NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"


def training_curves(curves: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return the training curves as SVG by their titles; none of fewer than two epochs, which make no line."""
    if len(curves) < 2:
        return {}
    epochs = [row.get("epoch", i + 1) for i, row in enumerate(curves)]
    charts = {}
    for kind, title, factor, format_value, highest in (
        ("accuracy", "accuracy, %", 100, lambda v: f"{v:.1f}{NARROW_SPACE}%", 100.0),
        ("loss", "loss (cross entropy), nats", 1, lambda v: f"{v:.3g}", math.inf),
    ):
        series = {
            name: [factor * row[f"{part}_{kind}"] for row in curves]
            for name, part in (("test", "test"), ("validation", "validation"), ("training", "train"))
            if f"{part}_{kind}" in curves[0]
        }
        if series:
            charts[title] = line_chart(
                title, epochs, series, x_label="epoch", format_value=format_value, highest=highest
            )
    return charts


def range_test_curve(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return the range test of the learning rate as SVG by its title; nothing where there was none."""
    if len(rows) < 2:
        return {}
    title = "range test of the learning rate: smoothed loss"
    exponents = [math.log10(row["learning_rate"]) for row in rows]
    series = {"training": [row["loss"] for row in rows]}
    label = "learning rate, power of ten"
    return {title: line_chart(title, exponents, series, x_label=label, format_value=lambda v: f"{v:.3g}")}
