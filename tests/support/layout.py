"""What is wrong with the layout of a page in a browser: what overflows, what is broken in two, what cannot be read."""

from pathlib import Path

FAULTS = (Path(__file__).parent / "layout.js").read_text(encoding="utf-8")

WIDTHS = (320, 390, 820, 1280)
SCHEMES = ("light", "dark")
TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")


def layout_faults(page):
    """Return what is wrong with the layout of a page as sentences."""
    return page.evaluate(FAULTS)


def axe_faults(axe, page):
    """Return what axe-core finds on a page: rules with the elements that break them."""
    found = axe.run(page, options={"runOnly": {"type": "tag", "values": list(TAGS)}, "resultTypes": ["violations"]})
    return [(rule["id"], [node["html"][:150] for node in rule["nodes"]][:3]) for rule in found.response["violations"]]
