"""The page of a narrowed network: what it cost before and after, as a whole and layer by layer."""

from __future__ import annotations

from importlib import resources
from typing import Any

from nin.narrowing import NarrowReport
from nin.runtime.timer import Timing

# Of the curve's picture, in its own units: the drawing area is between these.
LEFT, RIGHT, TOP, BOTTOM = 56.0, 700.0, 14.0, 250.0


def render_narrowing_report(report: NarrowReport, title: str) -> str:
    """Return the page as HTML text; it needs nothing that is not in it.

    Args:
        report: of `nin.narrow`.
        title: the heading.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = resources.files("nin.report").joinpath("narrowing.html").read_text("utf-8")
    header, *rows = report.rows()
    return environment.from_string(text).render(
        title=title,
        notes=report.notes,
        environment=[f"{name}: {value}" for name, value in report.environment.items()],
        summary=report.summary(),
        curves=[curve for curve in (curve_picture(report, n) for n in report.latency) if curve],
        curve=report.curve_rows(),
        control=report.control_rows(),
        bars=layer_bars(report),
        header=header,
        rows=rows,
    )


def layer_bars(report: NarrowReport) -> list[dict[str, Any]]:
    """Return the bars of each layer's multiply-accumulates."""
    counted = [layer for layer in report.layers if layer.macs_before]
    longest = max((max(layer.macs_before, layer.macs_after) for layer in counted), default=1)
    return [
        {
            "name": layer.name if len(layer.name) <= 34 else f"…{layer.name[-33:]}",
            "before": round(510 * layer.macs_before / longest, 1),
            "after": round(510 * layer.macs_after / longest, 1),
        }
        for layer in counted
    ]


def curve_picture(report: NarrowReport, batch: int) -> dict[str, Any] | None:
    """Return accuracy against milliseconds, as places in the picture; None where there is no curve.

    Each point stands at its median, its line goes from the 20th to the 80th percentile.
    """
    points: list[tuple[str, str, Timing, float]] = []
    if report.curve and "original" in report.accuracy:
        points.append(("original", "original", report.latency[batch][0], report.accuracy["original"]))
        points += [("narrowed", f"{p.share:g}", p.latency[batch][1], p.accuracy["corrected"]) for p in report.curve]
        if "finetuned" in report.accuracy:
            points.append(("tuned", "fine-tuned", report.latency[batch][1], report.accuracy["finetuned"]))
        if report.control is not None and batch in report.control.latency:
            points.append(("control", "control", report.control.latency[batch][1], report.control.accuracy))
    if not points:
        return None
    longest = 1.08 * max(time.high_ms for _, _, time, _ in points)
    low, high = min(p[3] for p in points), max(p[3] for p in points)
    margin = max(0.1 * (high - low), 0.002)
    low, high = low - margin, min(1.0, high) + margin

    levels = [low + (high - low) * i / 4 for i in range(5)]

    def x(ms: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * ms / longest, 1)

    def y(accuracy: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (accuracy - low) / (high - low), 1)

    return {
        "batch": batch,
        "points": [
            {"kind": kind, "label": label, "x": x(t.median_ms), "from": x(t.low_ms), "to": x(t.high_ms), "y": y(value)}
            for kind, label, t, value in points
        ],
        "across": [{"x": x(longest * i / 5), "text": f"{longest * i / 5:.3g}"} for i in range(6)],
        "up": [{"y": y(value), "text": f"{100 * value:.1f} %"} for value in levels],
        "left": LEFT,
        "right": RIGHT,
        "bottom": BOTTOM,
    }
