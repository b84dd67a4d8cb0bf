"""Looking: a trained run becomes plain data (`collect`), one HTML page (`render`), and both in one step (`write`)."""

from nin.report.collecting import collect
from nin.report.contents import Report
from nin.report.rendering import render, write

__all__ = ["Report", "collect", "render", "write"]
