"""`nin check`: find unreadable, duplicate and mislabelled files in an image folder."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import nin
from nin import folders, names
from nin.cli.console import ProgressBar, messages, print_json, print_table
from nin.config import check_seed
from nin.display.numbers import format_number_of
from nin.runtime.files import write_atomically

# classes in the table; a longer one is not read
MAX_ROWS = 40


def check(
    data: str,
    /,
    *,
    size: int | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    strict: bool = False,
    csv: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Look at every image of a folder: can it be read, is it there twice, is it what it says. Changes nothing.

    The exit status is 1 where an image cannot be read or a training would not begin, and 0 where the images can be
    trained on; see --strict.

    Args:
        data: An image folder: DIR/CLASS/*, or DIR/train and DIR/test. Or WebDataset shards.
        size: Height and width that images would be brought to, in pixels. Chosen from the images if not given.
        test_fraction: Share of each class that would be held out, where the folder has no test images of its own.
        seed: Chooses which.
        strict: Exit with status 1 at anything that is found, such as an image in two classes, but for files that are
            no images.
        csv: Write what was found into this file: path, kind, detail.
        overwrite: Replace a file of that name.
        json: Print what was found as JSON on standard output.
    """
    check_seed(seed)
    names.check_source(data)
    if csv is not None:
        folders.check_new_file(csv, overwrite=overwrite)
    with ProgressBar(f"Reading {data}") as bar:
        found = nin.data.check(data, size=size, test_fraction=test_fraction, seed=seed, on_progress=bar.on_progress)
    if csv is not None:
        write_atomically(csv, nin.data.findings_csv(found.findings))
    if json:
        print_json(found.to_dict())
    else:
        show_check(found)
    kinds = {finding.kind for finding in found.findings}
    if found.refusal is not None or (kinds - nin.data.HARMLESS_KINDS if strict else kinds & {nin.data.UNREADABLE}):
        sys.exit(1)


def show_check(found: nin.data.Check) -> None:
    """Print the classes, and the findings."""
    rows = [["class", "to train on", "to test"]]
    rows += [[name, f"{train:,}", f"{test:,}"] for name, train, test in found.classes[:MAX_ROWS]]
    if found.validation:
        cells = ["to choose by", *(f"{count:,}" for count in found.validation)]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=False)]
    if len(found.classes) > MAX_ROWS:
        rows.append([f"… and {len(found.classes) - MAX_ROWS} more", *[""] * (len(rows[0]) - 1)])
    print_table(rows, left=1)
    for note in found.notes:
        messages.print(note)
    show_findings(found.findings, most=10)
    if found.refusal is not None:
        messages.print(f"A training would not begin: {found.refusal}")
    elif all(finding.kind in nin.data.HARMLESS_KINDS for finding in found.findings):
        messages.print(f"{format_number_of(found.images, 'image')}: each is whole, there once, and what it says it is.")


def show_findings(findings: Sequence[nin.data.Finding], *, most: int = 3) -> None:
    """Print the number of findings of each kind, and the first ones."""
    for kind, count in Counter(finding.kind for finding in findings).items():
        files = "file" if count == 1 else "files"
        messages.print(f"{kind}, {count:,} {files}: {nin.data.FINDING_KINDS[kind]}", style="bold")
        for finding in [finding for finding in findings if finding.kind == kind][:most]:
            messages.print(f"  {finding.path}: {finding.detail}")
        if count > most:
            messages.print(f"  … and {count - most:,} more")
