"""Looking: a trained run becomes plain data (`collect`), one HTML page (`render`), and both in one step (`write`)."""

from nin.report.collecting import collect
from nin.report.contents import Report
from nin.report.examples import example_rows
from nin.report.narrowing_page import render_narrowing
from nin.report.pictures import overlay, symmetric_limit
from nin.report.rendering import render, write
from nin.report.sheets import Panel, SheetRow, contact_sheet

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
