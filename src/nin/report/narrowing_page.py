"""The page of a narrowed network: what it cost before and after, as a whole and layer by layer."""

from __future__ import annotations

from importlib import resources

from nin.narrowing import NarrowReport


def render_narrowing(report: NarrowReport, title: str) -> str:
    """Return the page as HTML text; it needs nothing that is not in it.

    Args:
        report: of `nin.narrow`.
        title: the heading.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = resources.files("nin.report").joinpath("narrowing.html").read_text("utf-8")
    counted = [layer for layer in report.layers if layer.macs_before]
    longest = max((max(layer.macs_before, layer.macs_after) for layer in counted), default=1)
    bars = [
        {
            "name": layer.name if len(layer.name) <= 34 else f"…{layer.name[-33:]}",
            "before": round(510 * layer.macs_before / longest, 1),
            "after": round(510 * layer.macs_after / longest, 1),
        }
        for layer in counted
    ]
    header, *rows = report.rows()
    return environment.from_string(text).render(
        title=title, notes=report.notes, summary=report.summary(), bars=bars, header=header, rows=rows
    )
