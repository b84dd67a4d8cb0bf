"""Reads the images of a folder: in memory where they fit, else decoded on demand."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from nin.data.dataset import Data, FileSet, ImageSet, channel_mean_std, default_shift
from nin.data.folder_issues import find, imbalance
from nin.data.folder_listing import FolderListing, list_folder
from nin.data.folder_scan import FolderScan, LoadOptions, Problems
from nin.data.sampling import stratified_holdout
from nin.errors import UserError


def read_folder(root: Path, options: LoadOptions) -> Data:
    """Makes an image folder into Data; see `nin.data.load`."""
    examination = examine(root, options)
    listing = examination.listing
    channels, size = channels_and_size(examination)
    bytes_needed = len(listing.names) * channels * size * size
    pixels = None
    if bytes_needed <= options.memory_limit_bytes:
        pixels = np.zeros((len(listing.names), channels, size, size), dtype=np.uint8)
    examination.decode(size, channels, pixels)
    is_test = split(listing, examination.problems, options)
    good = examination.good()

    def subset(indices: NDArray[np.int64]) -> ImageSet | FileSet:
        labels, names = torch.from_numpy(listing.labels[indices]), listing.names.select(indices)
        if pixels is None:
            return FileSet(root, labels, names, channels, size)
        return ImageSet(torch.from_numpy(pixels[indices]), labels, tuple(names))

    train, test = subset(good[~is_test[good]]), subset(good[is_test[good]])
    mean, std = channel_mean_std(train)
    counts = torch.bincount(train.labels, minlength=len(listing.classes)).tolist()
    return Data(
        name=root.resolve().name,
        train=train,
        test=test,
        classes=listing.classes,
        channels=channels,
        size=size,
        mean=mean,
        std=std,
        # Classes called by single characters are most likely pictures of them: a mirrored 2 is no 2.
        flip=not all(len(name) == 1 for name in listing.classes),
        shift=default_shift(size),
        skipped=tuple((listing.names[index], problem) for index, problem in sorted(examination.problems.items())),
        notes=(*listing.notes, *imbalance(listing.classes, counts)),
        findings=find(examination, size, is_test),
    )


def examine(root: Path, options: LoadOptions) -> FolderScan:
    """Lists a folder and looks at every file in it.

    Raises:
        UserError: it has no layout of ours, or none of its images can be read.
    """
    examination = FolderScan(list_folder(root), options)
    examination.read_headers()
    if len(examination.good()) == 0:
        name, reason = examination.listing.names[0], examination.problems[0]
        count = len(examination.records)
        raise UserError(f"{root}: none of the {count} images can be read; the first is {name}: {reason}")
    return examination


def channels_and_size(examination: FolderScan) -> tuple[int, int]:
    """Returns how many channels the images have, and the size to train at."""
    records = examination.records[examination.good()]
    channels = 1 if records["grey"].all() else 3
    return channels, examination.options.size or default_size(records["width"], records["height"])


def default_size(widths: NDArray[np.int64], heights: NDArray[np.int64]) -> int:
    """Chooses the size to train at: small square images as they are, else by the median shorter side."""
    shorter = np.minimum(widths, heights)
    if shorter[0] <= 64 and (widths == shorter[0]).all() and (heights == shorter[0]).all():
        return int(shorter[0])
    middle = median(shorter.tolist())
    return next((size for limit, size in ((48, 32), (96, 64), (160, 128)) if middle <= limit), 224)


def split(listing: FolderListing, problems: Problems, options: LoadOptions) -> NDArray[np.bool_]:
    """Returns which images are for testing; every class must keep a readable one to learn from."""
    readable = np.ones(len(listing.names), dtype=np.bool_)
    readable[list(problems)] = False
    is_test = np.zeros_like(readable)
    if listing.is_test is not None:
        is_test = listing.is_test & readable
    else:
        names, labels = listing.names.select(np.flatnonzero(readable)), listing.labels[readable]
        is_test[readable] = stratified_holdout(
            names, labels.tolist(), fraction=options.test_fraction or 0.2, seed=options.seed
        )
    learnable = np.bincount(listing.labels[readable & ~is_test], minlength=len(listing.classes))
    for label in np.flatnonzero(learnable == 0)[:1]:
        unreadable = sum(int(listing.labels[index]) == label for index in problems)
        raise UserError(
            f"{listing.root}: class {listing.classes[label]!r} has no readable training image "
            f"({unreadable} unreadable); add images to its folder, or remove the folder"
        )
    if not is_test.any():
        raise UserError(f"{listing.root}: no image is left for testing; expected two images or more in a class")
    return is_test
