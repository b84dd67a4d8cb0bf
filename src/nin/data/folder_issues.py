"""What a person should know about the files of a folder before a network learns from them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nin.data.dataset import Finding
from nin.data.folder_scan import FORMAT_NAMES, FolderScan

UNREADABLE, TWO_CLASSES, IN_BOTH = "unreadable", "in two classes", "in training and test"
DUPLICATE, EXTENSION, FRAMES, HUGE, TINY = "duplicate", "wrong extension", "several frames", "huge", "tiny"

# The worst first, and what each means.
FINDING_KINDS = {
    UNREADABLE: "left out",
    TWO_CLASSES: "the network is taught both",
    IN_BOTH: "the test accuracy will be too good",
    DUPLICATE: "the same bytes as another of its class",
    HUGE: "reading takes memory",
    TINY: "less than a quarter of the size to which images are brought",
    EXTENSION: "read as what it is",
    FRAMES: "the first is read",
}

# From here on a class with few images is learned badly, and the accuracy does not show it.
IMBALANCE = 10

# From here on Pillow warns of a decompression bomb; from twice as many on it refuses.
HUGE_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485

_EXTENSIONS = {
    "JPEG": {".jpg", ".jpeg"},
    "MPO": {".jpg", ".jpeg"},
    "PNG": {".png"},
    "WEBP": {".webp"},
    "GIF": {".gif"},
    "BMP": {".bmp"},
    "TIFF": {".tif", ".tiff"},
}


def find(examination: FolderScan, size: int, is_test: NDArray[np.bool_]) -> tuple[Finding, ...]:
    """Returns what there is to know, the worst kind first, files in their order.

    Args:
        examination: of the files, decoded.
        size: height and width that images are brought to, in pixels.
        is_test: bool (N,), which files are for testing.
    """
    found = [
        *((index, UNREADABLE, reason) for index, reason in examination.problems.items()),
        *_duplicates(examination, is_test),
        *_odd_sizes(examination, size),
        *_odd_formats(examination),
    ]
    order = {kind: place for place, kind in enumerate(FINDING_KINDS)}
    names = examination.listing.names
    found.sort(key=lambda row: (order[row[1]], row[0]))
    return tuple(Finding(names[index], kind, detail) for index, kind, detail in found)


def _duplicates(examination: FolderScan, is_test: NDArray[np.bool_]) -> Iterator[tuple[int, str, str]]:
    """Yields files whose bytes another file has: (index, kind, detail)."""
    good = examination.good()
    digests = examination.records["digest"][good]
    order = np.lexsort((good, digests[:, 1], digests[:, 0]))
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (digests[order][1:] != digests[order][:-1]).any(axis=1)
    groups = np.split(good[order], np.flatnonzero(new)[1:])
    listing = examination.listing
    for group in (group for group in groups if len(group) > 1):
        first, labels = int(group[0]), listing.labels[group]
        learned = group[~is_test[group]]
        for index in group.tolist():
            other = first if index != first else int(group[1])
            if (labels != labels[0]).any():
                other = int(group[labels != listing.labels[index]][0])
                yield index, TWO_CLASSES, f"the same as {listing.names[other]}"
            elif is_test[index] and len(learned):
                yield index, IN_BOTH, f"the same as {listing.names[int(learned[0])]}"
            elif index != first:
                yield index, DUPLICATE, f"the same as {listing.names[other]}"


def _odd_sizes(examination: FolderScan, size: int) -> Iterator[tuple[int, str, str]]:
    """Yields files with very many or very few pixels."""
    width, height = (examination.records[side].astype(np.int64) for side in ("width", "height"))
    tiny = (np.minimum(width, height) * 4 < size) & (width > 0)
    for kind, odd in ((HUGE, width * height > HUGE_PIXELS), (TINY, tiny)):
        for index in np.flatnonzero(odd).tolist():
            yield index, kind, f"{width[index]} × {height[index]} pixels"


def _odd_formats(examination: FolderScan) -> Iterator[tuple[int, str, str]]:
    """Yields files that are not what their extension says, or more than one picture."""
    for index in examination.good().tolist():
        record, name = examination.records[index], examination.listing.names[index]
        kind = FORMAT_NAMES[int(record["format"])]
        extension = os.path.splitext(name)[1].lower()
        if extension not in _EXTENSIONS[kind]:
            yield index, EXTENSION, f"it is {kind}"
        if record["frames"] and kind != "MPO":  # phones put a second picture behind a JPEG
            yield index, FRAMES, kind


def imbalance(classes: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    """Returns a sentence where the largest class has many times the training images of the smallest."""
    most, least = int(np.argmax(counts)), int(np.argmin(counts))
    if counts[most] < IMBALANCE * max(counts[least], 1):
        return ()
    return (
        f"{classes[most]} has {counts[most]:,} images for training and {classes[least]} only {counts[least]:,}: "
        f"the test accuracy says little about {classes[least]}",
    )


def findings_csv(findings: Sequence[Finding]) -> bytes:
    """Returns the findings as CSV: path, kind, detail."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("path", "kind", "detail"))
    rows.writerows((finding.path, finding.kind, finding.detail) for finding in findings)
    return text.getvalue().encode(errors="surrogateescape")  # a path may be no valid Unicode
