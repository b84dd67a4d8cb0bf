"""Reads the images of a folder: in memory where they fit, else checked once and decoded on demand."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from nin.data.batching import in_order
from nin.data.folder import Listing, list_folder
from nin.data.images import decode_pixels, read_header
from nin.data.randomness import held_out
from nin.data.sets import Data, FileSet, ImageSet, sensible_shift, statistics
from nin.errors import UserError

Progress = Callable[[str, int, int], None]
Problems = dict[int, str]  # why the image at an index cannot be read

_CHUNK = 64  # images that a thread reads between two reports of progress


@dataclass(frozen=True)
class ReadingOptions:
    """How to read a folder; `nin.data.load` documents each field."""

    size: int | None
    test_fraction: float
    seed: int
    strict: bool
    workers: int
    memory_limit_bytes: int
    on_progress: Progress | None


def read_folder(root: Path, options: ReadingOptions) -> Data:
    """Makes an image folder into Data; see `nin.data.load`."""
    listing = list_folder(root)
    channels, size, problems = _survey(listing, options)
    bytes_needed = len(listing.names) * channels * size * size
    pixels = None
    if bytes_needed <= options.memory_limit_bytes:
        pixels = np.zeros((len(listing.names), channels, size, size), dtype=np.uint8)
    problems |= _decode_all(listing, channels, size, pixels, problems, options)
    good = np.array([index for index in range(len(listing.names)) if index not in problems], dtype=np.int64)
    is_test = _split(listing, good, problems, options)

    def subset(indices: NDArray[np.int64]) -> ImageSet | FileSet:
        labels, names = torch.from_numpy(listing.labels[indices]), listing.names.select(indices)
        if pixels is None:
            return FileSet(root, labels, names, channels, size)
        return ImageSet(torch.from_numpy(pixels[indices]), labels, tuple(names))

    train, test = subset(good[~is_test]), subset(good[is_test])
    mean, std = statistics(train)
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
        shift=sensible_shift(size),
        skipped=tuple((listing.names[index], problems[index]) for index in sorted(problems)),
        notes=listing.notes,
    )


def usual_size(widths: NDArray[np.int64], heights: NDArray[np.int64]) -> int:
    """Chooses the size to train at: small square images as they are, else by the median shorter side."""
    shorter = np.minimum(widths, heights)
    if shorter[0] <= 64 and (widths == shorter[0]).all() and (heights == shorter[0]).all():
        return int(shorter[0])
    middle = median(shorter.tolist())
    return next((size for limit, size in ((48, 32), (96, 64), (160, 128)) if middle <= limit), 224)


def _survey(listing: Listing, options: ReadingOptions) -> tuple[int, int, Problems]:
    """Reads every header: the number of channels, the size, and what cannot be opened."""
    count = len(listing.names)
    widths, heights = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    grey = np.zeros(count, dtype=np.bool_)

    def read(index: int) -> None:
        header = read_header(_path(listing, index))
        widths[index], heights[index], grey[index] = header.width, header.height, header.grey

    problems = _for_each(range(count), read, listing, "reading headers", options)
    readable = widths > 0
    if not readable.any():
        name, reason = listing.names[0], problems[0]
        raise UserError(f"{listing.root}: none of the {count} images can be read; the first is {name}: {reason}")
    channels = 1 if grey[readable].all() else 3
    return channels, options.size or usual_size(widths[readable], heights[readable]), problems


def _decode_all(
    listing: Listing,
    channels: int,
    size: int,
    pixels: NDArray[np.uint8] | None,
    known: Problems,
    options: ReadingOptions,
) -> Problems:
    """Decodes every image, into `pixels` where there is one: only then is it known to be whole."""

    def read(index: int) -> None:
        image = decode_pixels(_path(listing, index), size=size, channels=channels)
        if pixels is not None:
            pixels[index] = image

    indices = [index for index in range(len(listing.names)) if index not in known]
    return _for_each(indices, read, listing, "reading images", options)


def _for_each(
    indices: range | list[int],
    read: Callable[[int], None],
    listing: Listing,
    stage: str,
    options: ReadingOptions,
) -> Problems:
    """Calls read(index) in threads; returns why it failed where it did, or raises that if strict."""

    def read_chunk(chunk: range | list[int]) -> Problems:
        problems = {}
        for index in chunk:
            try:
                read(index)
            except UserError as error:
                problems[index] = str(error).removeprefix(f"{_path(listing, index)}: ")
        return problems

    problems: Problems = {}
    chunks = (indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK))
    for number, found in enumerate(in_order(read_chunk, chunks, workers=options.workers), start=1):
        problems |= found
        if options.strict and found:
            index = min(found)
            raise UserError(f"{_path(listing, index)}: {found[index]}; replace or remove the file")
        if options.on_progress is not None:
            options.on_progress(stage, min(number * _CHUNK, len(indices)), len(indices))
    return problems


def _split(listing: Listing, good: NDArray[np.int64], problems: Problems, options: ReadingOptions) -> NDArray[np.bool_]:
    """Returns which of the readable images are for testing; every class must keep one to learn from."""
    labels = listing.labels[good]
    if listing.is_test is not None:
        is_test = listing.is_test[good]
    else:
        names = listing.names.select(good)
        is_test = held_out(names, labels.tolist(), fraction=options.test_fraction, seed=options.seed)
    learnable = np.bincount(labels[~is_test], minlength=len(listing.classes))
    for label in np.flatnonzero(learnable == 0)[:1]:
        unreadable = sum(int(listing.labels[index]) == label for index in problems)
        raise UserError(
            f"{listing.root}: class {listing.classes[label]!r} has no readable training image "
            f"({unreadable} unreadable); add images to its folder, or remove the folder"
        )
    if not is_test.any():
        raise UserError(f"{listing.root}: no image is left for testing; expected two images or more in a class")
    return is_test


def _path(listing: Listing, index: int) -> str:
    return os.path.join(listing.root, listing.names[index])
