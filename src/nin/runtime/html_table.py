"""Tables for notebooks: rows of text become HTML, every cell escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as an HTML table, the first of them its head.

    Example:
        >>> html_table([("layer", "MACs"), ("<b>", "1")])
        '<table><tr><th>layer</th><th>MACs</th></tr><tr><td>&lt;b&gt;</td><td>1</td></tr></table>'
    """
    head, *body = rows
    lines = [_row("th", head), *(_row("td", row) for row in body)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
