"""The report of a run: its data (`build_report`), its HTML page (`render_report`), and the file (`write_report`)."""

from nin.report.build import Report, build_report, write_report
from nin.report.heatmaps import overlay, symmetric_limit
from nin.report.html_page import render_report
from nin.report.image_grid import ImageRow, MapPanel, draw_image_grid, example_rows
from nin.report.narrowing_report import render_narrowing_report

__all__ = [
    "ImageRow",
    "MapPanel",
    "Report",
    "build_report",
    "draw_image_grid",
    "example_rows",
    "overlay",
    "render_narrowing_report",
    "render_report",
    "symmetric_limit",
    "write_report",
]
