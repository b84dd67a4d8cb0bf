"""What `nin check` finds out about a folder before anybody trains on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from nin.data.builtin import DATASET_NAMES
from nin.data.dataset import Finding
from nin.data.folder import channels_and_size, examine, split
from nin.data.folder_issues import find, imbalance
from nin.data.folder_scan import LoadOptions
from nin.data.loader import usable_cores
from nin.errors import UserError
from nin.runtime.progress import ProgressCallback


@dataclasses.dataclass(frozen=True)
class Check:
    """The state of an image folder.

    Attributes:
        root: the folder.
        images: files found.
        size: height and width that they would be brought to, in pixels.
        channels: 1 or 3.
        classes: of each class its name, its readable images for training, and those for testing.
        findings: about single files, the worst kind first.
        notes: about the folder, in sentences.
        refusal: why a training would not begin, or None.
    """

    root: Path
    images: int
    size: int
    channels: int
    classes: tuple[tuple[str, int, int], ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    refusal: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {**dataclasses.asdict(self), "root": str(self.root)}


def check(
    source: str | Path,
    *,
    size: int | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> Check:
    """Looks at every image of a folder: can it be read, is it there twice, is it what it says.

    All images are decoded, and nothing is changed. What was found of a file is kept in the cache folder
    (``~/.cache/nin``) until its path, size or time of change is another.

    Args:
        source: an image folder, as `nin.data.load` takes it.
        size: height and width in pixels that images would be brought to; chosen from them if None.
        test_fraction: share of each class held out, 0.2 by default, where there are no test images.
        seed: chooses which.
        workers: threads; one for each usable core by default.
        on_progress: called with (what is being done, number done, number of all).

    Returns:
        What was found.

    Raises:
        UserError: it is no image folder, or none of its images can be read.
    """
    if str(source) in DATASET_NAMES and not Path(source).is_dir():
        raise UserError(f"{source}: a named set is read as it is; expected an image folder to check")
    options = LoadOptions(
        size=size,
        test_fraction=test_fraction,
        seed=seed,
        strict=False,
        workers=usable_cores() if workers is None else workers,
        memory_limit_bytes=0,
        on_progress=on_progress,
    )
    examination = examine(Path(source), options)
    listing, refusal = examination.listing, None
    channels, size = channels_and_size(examination)
    examination.decode(size, channels, None)
    try:
        is_test = split(listing, examination.problems, options)
    except UserError as error:
        is_test, refusal = np.zeros(len(listing.names), dtype=np.bool_), str(error)
    labels, good = listing.labels, examination.good()
    train, test = (
        np.bincount(labels[good[is_test[good] == part]], minlength=len(listing.classes)).tolist()
        for part in (False, True)
    )
    return Check(
        root=Path(source),
        images=len(listing.names),
        size=size,
        channels=channels,
        classes=tuple(zip(listing.classes, train, test, strict=True)),
        findings=find(examination, size, is_test),
        notes=(*listing.notes, *imbalance(listing.classes, train)),
        refusal=refusal,
    )
