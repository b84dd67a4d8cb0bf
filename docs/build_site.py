"""Builds the documentation site into build/site; a warning or a dead link ends it with an error.

    make docs

The site is laid out as the repository is: README.md is its first page, and a link that works in the repository works
in the site. Formulas become MathML while it is built, so the pages need no script and nothing from another host.
"""

from __future__ import annotations

import html
import logging
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import latex2mathml.converter
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parents[1]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"

# What is not named here comes under "Guides"; the benchmarks' pages come by themselves.
SECTIONS = {
    "Start": ["install", "tutorial-learner", "tutorial-images", "tutorial-engineer", "tutorial-pytorch"],
    "Understand": ["one-by-one", "mathematics", "page"],
    "Guides": [
        "pretrained",
        "finetuning",
        "choosing",
        "speed",
        "narrowing",
        "fuse",
        "export",
        "scikit-learn",
        "timm",
        "hub",
    ],
    "How it works": ["kernels", "gpu", "design"],
    "Reference": ["api"],
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def main() -> int:
    """Build the site and look for dead links; return the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    stage()
    config = load_config(str(ROOT / "mkdocs.yml"), nav=navigation(), strict=True)
    config.plugins.events["page_content"].append(render_formulas)
    try:
        build(config)
    except Abort as error:
        print(f"build_site: {error}", file=sys.stderr)
        return 1
    problems = dead_links(SITE)
    print("\n".join(problems) or f"{SITE.relative_to(ROOT)}: {len(list(SITE.rglob('*.html')))} pages, no dead link")
    return 1 if problems else 0


def stage() -> None:
    """Copy what the site is made of, as it lies in the repository."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    unwanted = shutil.ignore_patterns(".*", "__pycache__")
    for folder in ("docs", "benchmarks"):
        shutil.copytree(ROOT / folder, SOURCE / folder, ignore=unwanted)
    for path in (*ROOT.glob("*.md"), ROOT / "LICENSE"):
        shutil.copy(path, SOURCE)


def navigation() -> list[Any]:
    """Return the menu: every page of the staged site is in it once."""
    named = {page for pages in SECTIONS.values() for page in pages}
    others = sorted(path.stem for path in (SOURCE / "docs").glob("*.md") if path.stem not in named)
    menu: list[Any] = [{"Home": "README.md"}]
    for title, pages in SECTIONS.items():
        pages = [*pages, *(others if title == "Guides" else [])]
        menu.append({title: [f"docs/{page}.md" for page in pages if (SOURCE / "docs" / f"{page}.md").exists()]})
    benchmarks = sorted(path.relative_to(SOURCE).as_posix() for path in (SOURCE / "benchmarks").rglob("*.md"))
    return [*menu, {"Benchmarks": benchmarks}, {"Project": ["CONTRIBUTING.md", "CHANGELOG.md"]}]


@event_priority(0)
def render_formulas(content: str, **_: Any) -> str:
    """Replace formulas by MathML."""

    def convert(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return latex2mathml.converter.convert(html.unescape(match[3]).replace("\n", " "), display=display)

    return FORMULA.sub(convert, content)


class Links(HTMLParser):
    """Collects what a page can be linked by, what it links to, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name == "href" and tag == "a" and value:
                self.targets.append(value)
            elif name in ("src", "href") and value:
                self.loaded.append(value)


def dead_links(site: Path) -> list[str]:
    """Return a line for each link inside the site that leads nowhere, and for what is loaded from another host."""
    pages = {path.resolve(): Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    problems = []
    for path, links in pages.items():
        where = path.relative_to(site.resolve())
        for target in (*links.targets, *links.loaded):
            url = urlsplit(target)
            if url.scheme or url.netloc:
                if target in links.loaded and url.scheme != "data":
                    problems.append(f"{where} loads {target} from another host")
                continue
            if where.name == "404.html":  # its links are from the site's root, wherever that is
                continue
            aim = (path.parent / unquote(url.path)).resolve() if url.path else path
            aim = aim / "index.html" if aim.is_dir() else aim
            if not aim.is_file():
                problems.append(f"{where} links to {target}: there is no such file")
            elif url.fragment and aim in pages and unquote(url.fragment) not in pages[aim].anchors:
                problems.append(f"{where} links to {target}: there is no such place in that page")
    return problems


if __name__ == "__main__":
    sys.exit(main())
