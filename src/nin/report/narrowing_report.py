"""The report of a narrowed network as HTML: what it cost before and after, as a whole and layer by layer."""

from nin.display.svg_chart import Bar, SpreadPoint, bar_chart, point_chart
from nin.narrowing import NarrowReport
from nin.narrowing.report import format_share
from nin.report.html_page import load_template
from nin.runtime.timer import Timing


def render_narrowing_report(report: NarrowReport, title: str) -> str:
    """Return the page as HTML text; it needs nothing that is not in it.

    Args:
        report: of `nin.narrow`.
        title: the heading.
    """
    return load_template("narrowing_report.html").render(
        title=title,
        notes=report.notes,
        environment=[f"{name}: {value}" for name, value in report.environment.items()],
        accuracies=set(report.accuracy),
        charts={batch: latency_chart(report, batch) for batch in report.latency},
        macs=macs_chart(report),
        **report.tables_by_name(),
    )


def macs_chart(report: NarrowReport) -> str:
    """Return the bars of each layer's multiply-accumulates before and after, as SVG."""
    bars = [
        Bar(
            layer.name if len(layer.name) <= 48 else f"…{layer.name[-47:]}",
            [("before", layer.macs_before, 12), ("after", layer.macs_after, 6)],
        )
        for layer in report.layers
        if layer.macs_before
    ]
    description = "Multiply-accumulates of each layer before and after; the figures are in the table below."
    return bar_chart(bars, description=description, note_width=0)


def latency_chart(report: NarrowReport, batch: int) -> str:
    """Return accuracy against milliseconds for a batch size, as SVG; "" where there were not several budgets.

    Each point stands at its median, its line goes from the 20th to the 80th percentile.
    """
    if not report.curve or "original" not in report.accuracy:
        return ""
    original, narrowed = report.latency[batch]
    points = [_point("original", "original", original, report.accuracy["original"])]
    points += [
        _point("narrowed", format_share(p.share), p.latency[batch][1], p.accuracy["corrected"]) for p in report.curve
    ]
    if "finetuned" in report.accuracy:
        points.append(_point("tuned", "fine-tuned", narrowed, report.accuracy["finetuned"]))
    if report.control is not None and batch in report.control.latency:
        points.append(_point("control", "control", report.control.latency[batch][1], report.control.accuracy))
    description = f"Accuracy against milliseconds at batch {batch}; the figures are in the table below."
    return point_chart(points, x_label=f"milliseconds, batch {batch}", description=description, highest=100)


def _point(kind: str, label: str, time: Timing, accuracy: float) -> SpreadPoint:
    return SpreadPoint(kind, label, time.low_ms, time.median_ms, time.high_ms, 100 * accuracy)
