"""Image folders: read one as a data set, and check one: unreadable files, duplicates, train-test leaks, odd sizes."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nin.config import PHOTO_SIZE
from nin.data.builtin import DATASET_NAMES
from nin.data.dataset import Data, DecodedSet, FileSet, ImageSet, LoadOptions
from nin.data.findings import (
    DUPLICATE,
    EXTENSION,
    FINDING_KINDS,
    FRAMES,
    HUGE,
    IN_BOTH,
    IN_VALIDATION,
    TINY,
    TWO_CLASSES,
    UNREADABLE,
    Finding,
)
from nin.data.folder_scan import FolderScan
from nin.data.held_set import hold
from nin.data.image_formats import named_format
from nin.data.image_scan import FORMAT_NAMES, ImageScan
from nin.data.resizing import photo_bytes
from nin.data.shard_scan import ShardScan
from nin.data.value_range import Pixels
from nin.data.webdataset import is_shards
from nin.errors import UserError
from nin.runtime.progress import ProgressCallback

# From here on a class with few images is learned badly, and the accuracy does not show it.
IMBALANCE_RATIO = 10

# From here on Pillow warns of a decompression bomb; from twice as many on it refuses. The number is Pillow's default,
# for a program that has switched its limit off.
HUGE_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485


@dataclasses.dataclass(frozen=True)
class Check:
    """What `check` found in an image folder.

    Attributes:
        root: the folder.
        images: files found.
        size: height and width that they would be brought to, in pixels.
        channels: 1 or 3.
        classes: of each class its name, its readable images for training, and those for testing.
        validation: of each class its readable images in a validation part; empty where there is none.
        findings: about single files, the worst kind first.
        notes: about the folder, in sentences.
        refusal: why a training would not begin, or None.
    """

    root: Path
    images: int
    size: int
    channels: int
    classes: tuple[tuple[str, int, int], ...]
    validation: tuple[int, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    refusal: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {**dataclasses.asdict(self), "root": str(self.root)}


def read_folder(root: Path, options: LoadOptions) -> Data:
    """Return an image folder as Data; see `nin.data.load`."""
    scan = FolderScan(root, options)
    listing = scan.listing
    shape = (len(listing.names), scan.channels, scan.size, scan.size)
    pixels = np.zeros(shape, dtype=np.uint8) if prod(shape) <= options.memory_limit_bytes else None
    photos = _room_for_photos(scan, options)
    scan.decode(pixels, photos)
    is_test = scan.test_mask()

    room = options.memory_limit_bytes - (0 if pixels is None else pixels.nbytes)

    def subset(indices: NDArray[np.int64], *, has_photos: bool) -> ImageSet | DecodedSet:
        labels, names = torch.from_numpy(listing.labels[indices]), listing.names.select(indices)
        files = FileSet(
            labels=labels,
            names=names,
            channels=scan.channels,
            size=scan.size,
            value_range=scan.value_range,
            resize=options.resize,
            root=root,
        )
        if pixels is None:
            return files
        whole: list[Pixels] | DecodedSet | None = None
        if has_photos and scan.size >= PHOTO_SIZE:
            if photos is None:
                (whole,) = hold(files, limit=room if options.photos else 0)
            else:
                whole = [photos[index] for index in indices.tolist()]
        return ImageSet(torch.from_numpy(pixels[indices]), labels, tuple(names), whole)

    parts = scan.partition(is_test)
    train, test = subset(parts.train, has_photos=True), subset(parts.test, has_photos=False)
    validation = subset(parts.validation, has_photos=False)
    if isinstance(train, DecodedSet) and isinstance(test, DecodedSet) and isinstance(validation, DecodedSet):
        train, test, validation = hold(train, test, validation, limit=room)
    counts = torch.bincount(train.labels, minlength=len(listing.classes)).tolist()
    return Data.from_sets(
        root.resolve().name,
        train,
        test,
        listing.classes,
        skipped=tuple((listing.names[index], problem) for index, problem in sorted(scan.problems.items())),
        notes=(*listing.notes, *scan.notes(), *imbalance_notes(listing.classes, counts)),
        findings=collect_findings(scan, is_test),
        value_range=scan.value_range,
        resize=options.resize,
        validation=validation if len(validation) else None,
    )


def _room_for_photos(scan: FolderScan, options: LoadOptions) -> dict[int, Pixels] | None:
    """Return where to put the whole photos, or None where random crops take none or they do not fit into memory.

    Those for testing are known only when all are decoded: they are put there too, and dropped.
    """
    known = scan.records[scan.readable()]
    squares = len(known) * scan.channels * scan.size**2
    whole = photo_bytes(known["width"].astype(np.int64), known["height"].astype(np.int64), scan.channels, scan.size)
    fits = squares + whole <= options.memory_limit_bytes
    return {} if options.photos and scan.size >= PHOTO_SIZE and fits else None


def check(
    source: str | Path,
    *,
    size: int | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> Check:
    """Read every image of a folder or of shards; report what cannot be read, is there twice, or is not what it says.

    All images are decoded, and nothing is changed. What was found of a file is kept in the cache folder
    (``~/.cache/nin``) until its path, size or time of modification changes.

    Args:
        source: an image folder or shards, as `nin.data.load` takes them.
        size: height and width in pixels that images would be brought to; chosen from them if None.
        test_fraction: fraction of each class held out, 0.2 by default, where there are no test images.
        seed: chooses which.
        workers: threads; one for each usable core by default.
        on_progress: called with (what is being done, number done, number of all).

    Returns:
        What was found.

    Raises:
        UserError: it is no image folder, none of its images can be read, or a shard is damaged or cut off.
    """
    if str(source) in DATASET_NAMES and not Path(source).is_dir():
        raise UserError(f"{source}: a named set is read as it is; expected an image folder to check")
    options = LoadOptions(size, test_fraction, seed, workers=workers, on_progress=on_progress)
    scan: ImageScan = ShardScan(source, options) if is_shards(source) else FolderScan(Path(source), options)
    listing, refusal = scan.listing, None
    scan.decode()
    try:
        is_test = scan.test_mask()
    except UserError as error:
        is_test, refusal = np.zeros(len(listing.names), dtype=np.bool_), str(error)
    train, test, validation = (
        np.bincount(listing.labels[indices], minlength=len(listing.classes)).tolist()
        for indices in scan.partition(is_test)
    )
    return Check(
        root=Path(source),
        images=len(listing.names),
        size=scan.size,
        channels=scan.channels,
        classes=tuple(zip(listing.classes, train, test, strict=True)),
        validation=tuple(validation) if any(validation) else (),
        findings=collect_findings(scan, is_test),
        notes=(*listing.notes, *scan.notes(), *imbalance_notes(listing.classes, train)),
        refusal=refusal,
    )


def collect_findings(scan: ImageScan, is_test: NDArray[np.bool_]) -> tuple[Finding, ...]:
    """Return what is odd about the files, the worst kind first, files in their order.

    Args:
        scan: of the files, decoded.
        is_test: bool (N,), which files are for testing.
    """
    found = [
        *((index, UNREADABLE, reason) for index, reason in scan.problems.items()),
        *_duplicates(scan, is_test),
        *_odd_sizes(scan),
        *_odd_formats(scan),
    ]
    order = {kind: place for place, kind in enumerate(FINDING_KINDS)}
    names = scan.listing.names
    found.sort(key=lambda row: (order[row[1]], row[0]))
    findings = [*(Finding(names[index], kind, detail) for index, kind, detail in found), *scan.listing.findings]
    return tuple(sorted(findings, key=lambda finding: order[finding.kind]))


def _duplicates(scan: ImageScan, is_test: NDArray[np.bool_]) -> Iterator[tuple[int, str, str]]:
    """Yield files whose bytes another file has: (index, kind, detail)."""
    readable = scan.readable()
    digests = scan.records["digest"][readable]
    # a million files: 0.8 s, where np.unique(axis=0) takes 3.3 s
    order = np.lexsort((readable, digests[:, 1], digests[:, 0]))
    new = (digests[order][1:] != digests[order][:-1]).any(axis=1)
    groups = np.split(readable[order], np.flatnonzero(new) + 1)
    listing = scan.listing
    for group in (group for group in groups if len(group) > 1):
        first, labels = int(group[0]), listing.labels[group]
        is_validation = scan.listing.is_validation[group]
        train, elsewhere = group[~is_test[group] & ~is_validation], group[~is_validation]
        for index in group.tolist():
            other = first if index != first else int(group[1])
            if (labels != labels[0]).any():
                other = int(group[labels != listing.labels[index]][0])
                yield index, TWO_CLASSES, f"the same as {listing.names[other]}"
            elif is_test[index] and len(train):
                yield index, IN_BOTH, f"the same as {listing.names[int(train[0])]}"
            elif scan.listing.is_validation[index] and len(elsewhere):
                yield index, IN_VALIDATION, f"the same as {listing.names[int(elsewhere[0])]}"
            elif index != first:
                yield index, DUPLICATE, f"the same as {listing.names[other]}"


def _odd_sizes(scan: ImageScan) -> Iterator[tuple[int, str, str]]:
    """Yield files with very many or very few pixels."""
    width, height = (scan.records[side].astype(np.int64) for side in ("width", "height"))
    tiny = (np.minimum(width, height) * 4 < scan.size) & (width > 0)
    for kind, odd in ((HUGE, width * height > HUGE_PIXELS), (TINY, tiny)):
        for index in np.flatnonzero(odd).tolist():
            yield index, kind, f"{width[index]} × {height[index]} pixels"


def _odd_formats(scan: ImageScan) -> Iterator[tuple[int, str, str]]:
    """Yield files that are not what their extension says, or more than one picture."""
    for index in scan.readable().tolist():
        record, name = scan.records[index], scan.listing.names[index]
        file_format = FORMAT_NAMES[int(record["format"])]
        phone_photo = file_format == "MPO"  # a JPEG with a second picture behind it
        named = named_format(name)
        if named != ("JPEG" if phone_photo else file_format) and os.path.splitext(name)[1]:
            yield index, EXTENSION, f"it is {file_format}"
        if record["frames"] and not phone_photo:
            yield index, FRAMES, file_format


def imbalance_notes(classes: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    """Return a sentence where the largest class has many times the training images of the smallest."""
    most, least = int(np.argmax(counts)), int(np.argmin(counts))
    if counts[most] < IMBALANCE_RATIO * max(counts[least], 1):
        return ()
    return (
        f"{classes[most]} has {counts[most]:,} images for training and {classes[least]} only {counts[least]:,}: "
        f"the test accuracy says little about {classes[least]}",
    )
