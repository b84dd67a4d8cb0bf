"""`nin check` and `nin shards`: what is odd about a folder, and its images in large files."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nin import data
from nin.cli.console import Bar, print_json, results, words
from nin.runtime.files import write_atomically

# A table of more classes is not read.
MOST_CLASSES = 40


def show_findings(findings: Sequence[data.Finding], *, most: int = 3) -> None:
    """Tell of each kind of finding how many there are, and the first ones."""
    kinds = Counter(finding.kind for finding in findings)
    for kind, count in kinds.items():
        words.print(f"{kind}, {count:,} {'file' if count == 1 else 'files'}: {data.FINDING_KINDS[kind]}", style="bold")
        for finding in [finding for finding in findings if finding.kind == kind][:most]:
            words.print(f"  {finding.path}: {finding.detail}")
        if count > most:
            words.print(f"  … and {count - most:,} more")


def check(source: str, *, as_json: bool, strict: bool, csv_path: Path | None, **options: Any) -> None:
    """Look at every image of a folder and show what was found.

    Raises:
        SystemExit: with status 1, strict and an image cannot be read or a training would not begin.
    """
    with Bar(f"Reading {source}") as bar:
        found = data.check(source, on_progress=lambda text, done, total: bar.update(done, total, text), **options)
    if csv_path is not None:
        write_atomically(csv_path, data.findings_csv(found.findings))
    if as_json:
        print_json(found.to_dict())
    else:
        show_check(found)
    bad = found.refusal is not None or any(finding.kind == "unreadable" for finding in found.findings)
    if strict and bad:
        sys.exit(1)


def show_check(found: data.Check) -> None:
    """Show the classes, and what is odd."""
    table = Table()
    for heading in ("class", "to train on", "to test"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, train_count, test_count in found.classes[:MOST_CLASSES]:
        table.add_row(name, f"{train_count:,}", f"{test_count:,}")
    if len(found.classes) > MOST_CLASSES:
        table.add_row(f"… and {len(found.classes) - MOST_CLASSES} more", "", "")
    results.print(table)
    for note in found.notes:
        words.print(note)
    show_findings(found.findings, most=10)
    if found.refusal is not None:
        words.print(f"Nobody can train on this: {found.refusal}")
    elif not found.findings:
        words.print(f"All {found.images:,} images are whole, each is there once, and each is what it says.")


def shards(source: str, out: Path, *, as_json: bool, **options: Any) -> None:
    """Write an image folder as shards."""
    with Bar(f"Reading {source}") as bar:
        written = data.write_shards(
            source, out, on_progress=lambda text, done, total: bar.update(done, total, text), **options
        )
    if as_json:
        print_json({"shards": [str(path) for path in written]})
    else:
        words.print(f"{len(written):,} shards in {out}\nUse them:  nin train {out} --out RUN")
