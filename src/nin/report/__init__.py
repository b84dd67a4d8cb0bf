"""Looking: a trained run becomes plain data (`collect`), one HTML page (`render`), and both in one step (`write`)."""

from nin.report.build import collect
from nin.report.data import Report
from nin.report.examples import example_rows
from nin.report.heatmaps import overlay, symmetric_limit
from nin.report.html_page import render, write
from nin.report.image_grid import Panel, SheetRow, contact_sheet
from nin.report.narrowing_report import render_narrowing

__all__ = [
    "Panel",
    "Report",
    "SheetRow",
    "collect",
    "contact_sheet",
    "example_rows",
    "overlay",
    "render",
    "render_narrowing",
    "symmetric_limit",
    "write",
]
