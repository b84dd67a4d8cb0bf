"""Tables as text, HTML, Markdown and CSV, of rows of cells with the header first."""

import csv
import html
import io
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows, left: int | None = None) -> str:
    """Return rows as lines of aligned columns: the first ``left`` of them, or all, flush left, the others right.

    Example:
        >>> print(text_table([("layer", "MACs"), ("conv", "1,024")], left=1))
        layer   MACs
        conv   1,024
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def html_table(rows: Rows) -> str:
    """Return rows as an HTML table, every cell escaped.

    Example:
        >>> html_table([("layer", "MACs"), ("<b>", "1")])
        '<table><tr><th>layer</th><th>MACs</th></tr><tr><td>&lt;b&gt;</td><td>1</td></tr></table>'
    """
    head, *body = rows
    lines = [_html_row("th", head), *(_html_row("td", row) for row in body)]
    return f"<table>{''.join(lines)}</table>"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def markdown_table(rows: Rows) -> str:
    """Return rows as a Markdown table, every cell escaped.

    Example:
        >>> print(markdown_table([("layer", "MACs"), ("a_b", "1")]))
        | layer | MACs |
        |---|---|
        | a&#95;b | 1 |
    """
    head, *body = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is; what cannot be printed is replaced.

    Example:
        >>> escape_markdown("<b> *x*")
        '&#60;b&#62; &#42;x&#42;'
    """
    visible = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>()#|!&~$" else c for c in visible)


def csv_lines(rows: Rows) -> bytes:
    r"""Return rows as lines of a CSV file, in UTF-8; the bytes of a path that is no valid Unicode stay as they are.

    Example:
        >>> csv_lines([("image", "label"), ("a,b.png", "7")])
        b'image,label\n"a,b.png",7\n'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")
