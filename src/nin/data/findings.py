"""What may be odd about single files of a data set, and the kinds of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from nin.display.tables import csv_lines

UNREADABLE, TWO_CLASSES, IN_BOTH = "unreadable", "in two classes", "in training and test"
IN_VALIDATION = "in validation and another part"
DUPLICATE, EXTENSION, FRAMES, HUGE, TINY = "duplicate", "wrong extension", "several frames", "huge", "tiny"
NO_LABEL, EXTRA, MASK, OUTPUT = "no label", "beside the image", "mask", "output of nin"
NO_IMAGE, HIDDEN = "no image", "hidden"

# The worst first, and what each means.
FINDING_KINDS = {
    UNREADABLE: "left out",
    TWO_CLASSES: "the network is taught both",
    IN_BOTH: "the test accuracy will be too good",
    IN_VALIDATION: "what is chosen by the validation images will look too good",
    DUPLICATE: "the same bytes as another of its class",
    NO_LABEL: "left out",
    HUGE: "reading takes memory",
    TINY: "less than a quarter of the size to which images are brought",
    EXTENSION: "read as what it is",
    FRAMES: "the first is read",
    MASK: "left out",
    EXTRA: "left out, one image of a sample is read",
    OUTPUT: "left out",
    NO_IMAGE: "left out",
    HIDDEN: "left out, as systems and programs leave such files",
}

# These are no images that somebody meant to train on.
HARMLESS_KINDS = {NO_IMAGE, HIDDEN, OUTPUT}


@dataclass(frozen=True)
class Finding:
    """What is odd about one file.

    Attributes:
        path: of the file, relative to its folder; it ends in "/" for a folder with all that is in it.
        kind: one of `nin.data.FINDING_KINDS`.
        detail: the rest of the sentence.
    """

    path: str
    kind: str
    detail: str


def findings_csv(findings: Sequence[Finding]) -> bytes:
    """Return the findings as CSV: path, kind, detail."""
    return csv_lines([("path", "kind", "detail"), *((f.path, f.kind, f.detail) for f in findings)])
