"""Predictions of any number of images, streamed into a CSV or Parquet file that survives a kill."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nin import data
from nin.data.decoder import DecodeError
from nin.data.loader import map_in_threads
from nin.distribution import install_command
from nin.errors import UserError
from nin.inference.classifier import BATCH, Classifier
from nin.runtime import distributed
from nin.runtime.files import open_atomically, sync_folder, write_atomically
from nin.runtime.fingerprint import fingerprint

SECONDS_BETWEEN_MARKS = 2.0

# CSV that becomes Parquet at a time
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Share:
    """Which part of the images this process takes: the ``rank``-th of ``world`` runs of neighbours.

    Attributes:
        rank: from 0.
        world: how many processes there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """Return what torchrun says, or all of the images."""
        return cls(distributed.rank(), distributed.world_size())

    def bounds(self, count: int) -> tuple[int, int]:
        """Return where this share begins and ends."""
        return count * self.rank // self.world, count * (self.rank + 1) // self.world


@dataclass(frozen=True)
class Tabulated:
    """What a call of `tabulate` did.

    Attributes:
        images: rows in this share.
        before: how many of them an earlier call had written.
        unreadable: how many of the others cannot be read.
    """

    images: int
    before: int
    unreadable: int


@dataclass
class _Mark:
    """How far the rows on the disk are whole: written after them, so what is behind it is cut off."""

    images: str  # what the rows are about, see `_fingerprint`
    rows: int = 0
    bytes: int = 0


def tabulate(
    classifier: Classifier,
    images: Sequence[str] | data.ShardSet,
    out: Path,
    *,
    resume: bool = False,
    share: Share | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tabulated:
    """Classify images and write one row for each, in their order: image, label, confidence, every class, problem.

    A class that is called as one of the others has "class " before its name in the first row. Memory does not grow with
    the number of images. Rows are written to ``out`` with ".partial" behind it, which takes the file's place when it is
    whole. A file that cannot be read gets a row with the reason as its problem.

    Args:
        classifier: of the images.
        images: paths, or shards.
        out: the file; Parquet if its name ends in .parquet, else CSV.
        resume: go on after the rows that an interrupted call wrote, if there are any.
        share: the part to do, where several processes work. The one with rank 0 joins the parts when all are whole.
        on_progress: called with (rows, rows in all).

    Returns:
        What was done.

    Raises:
        UserError: there are rows of an interrupted call and nobody said to resume, or they are about other images or
            of another network.
        OSError: the file cannot be written; it is named.
    """
    share = share or Share()
    source = _Source(images, classifier)
    start, stop = share.bounds(len(images))
    part = _partial(out, share)
    mark = _Mark(_fingerprint(images, classifier))
    if resume:
        mark = _read_mark(part, mark)
    elif part.exists() and mark_file(part).exists():
        raise UserError(f"{part} holds predictions of an interrupted call: go on with --resume, or remove it")
    before, unreadable = mark.rows, 0
    with part.open("r+b" if mark.bytes else "wb") as file:
        file.truncate(mark.bytes)
        file.seek(mark.bytes)
        if share.rank == 0 and not mark.bytes:
            file.write(_line(_columns(classifier.classes)))
        marked = time.monotonic()
        for rows, bad in source.rows(start + before, stop):
            file.write(b"".join(rows))
            unreadable += bad
            mark.rows += len(rows)
            if time.monotonic() - marked > SECONDS_BETWEEN_MARKS:
                marked = time.monotonic()
                _write_mark(file, part, mark)
            if on_progress is not None:
                on_progress(mark.rows, stop - start)
        _write_mark(file, part, mark)
    if share.rank == 0:
        _join(out, share, len(images), mark, classifier.classes)
    return Tabulated(stop - start, before, unreadable)


class _Source:
    """Images that are decoded by threads ahead of the network."""

    def __init__(self, images: Sequence[str] | data.ShardSet, classifier: Classifier) -> None:
        p = classifier.info.preprocessing
        self.images, self.classifier, self.size, self.channels = images, classifier, p.size, p.channels
        self.names = images.names if isinstance(images, data.ShardSet) else images

    def rows(self, start: int, stop: int) -> Iterator[tuple[list[bytes], int]]:
        """Yield the rows of one batch after the other, and how many images in it cannot be read.

        A sum depends on its order in the last bit: batches begin at multiples of `BATCH` from the first row, wherever
        a call goes on, so that its rows are those of a call that nobody interrupted.
        """
        batches = [range(first, min(first + BATCH, stop)) for first in range(start, stop, BATCH)]
        for indices, (pixels, problems) in zip(batches, map_in_threads(self.decode, batches), strict=True):
            scores = self.classifier.score_pixels(torch.from_numpy(pixels)).softmax(1)
            yield [self.row(i, p, problems.get(i)) for i, p in zip(indices, scores, strict=True)], len(problems)

    def decode(self, indices: range) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], dict[int, str]]:
        """Return uint8 (B, C, size, size), zeros where an image cannot be read, and why by index."""
        pixels = np.zeros((len(indices), self.channels, self.size, self.size), dtype=np.uint8)
        problems = {}
        for place, index in enumerate(indices):
            name = self.names[index]
            try:
                content = self.images.read(index) if isinstance(self.images, data.ShardSet) else name
                pixels[place] = data.decode(content, size=self.size, channels=self.channels).numpy()
            except DecodeError as error:
                problems[index] = error.reason
        return pixels, problems

    def row(self, index: int, probabilities: Tensor, problem: str | None) -> bytes:
        """Return the line of one image."""
        name, classes = self.names[index], self.classifier.classes
        if problem is not None:
            return _line([name, "", "", *[""] * len(classes), problem])
        best = int(probabilities.argmax())
        values = [f"{value:.6f}" for value in probabilities.tolist()]
        return _line([name, classes[best], values[best], *values, ""])


def mark_file(part: Path) -> Path:
    """Return the file that says how much of a part is whole."""
    return part.with_name(f"{part.name}.json")


def _partial(out: Path, share: Share) -> Path:
    return out.with_name(f"{out.name}.partial" if share.world == 1 else f"{out.name}.{share.rank}.partial")


def _columns(classes: Sequence[str]) -> list[str]:
    own = ("image", "label", "confidence", "problem")
    return [*own[:3], *(f"class {name}" if name in own else name for name in classes), own[3]]


def _line(fields: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().encode(errors="surrogateescape")  # a path may be no valid Unicode


def _fingerprint(images: Sequence[str] | data.ShardSet, classifier: Classifier) -> str:
    """Return a hash of the images' names and the network's weights."""
    names = images.names if isinstance(images, data.ShardSet) else images
    weights = sorted(classifier.model.state_dict().items())
    parts = itertools.chain(
        (os.fsencode(name) + b"\0" for name in names),
        (part for name, tensor in weights for part in (name, tensor)),
    )
    return fingerprint(parts, hashlib.blake2b(digest_size=16))


def _write_mark(file: BinaryIO, part: Path, mark: _Mark) -> None:
    """Bring the rows to the disk, then say so."""
    file.flush()
    os.fsync(file.fileno())
    mark.bytes = file.tell()
    write_atomically(mark_file(part), json.dumps(vars(mark)))


def _read_mark(part: Path, fresh: _Mark) -> _Mark:
    """Return how far the rows of an earlier call go; nowhere, if it wrote none."""
    path = mark_file(part)
    if not path.exists() or not part.exists():
        return fresh
    try:
        mark = _Mark(**json.loads(path.read_text(encoding="utf-8")))
        usable = 0 <= mark.bytes <= part.stat().st_size and mark.rows >= 0
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: remove it to begin again") from error
    if not usable:
        raise UserError(f"{path} does not fit {part}: remove both to begin again")
    if mark.images != fresh.images:
        raise UserError(f"{part} is about other images or of another network: remove it to begin again")
    return mark


def _to_parquet(rows: Path, out: Path, classes: Sequence[str]) -> None:
    """Write CSV rows as a Parquet file, some at a time: three columns of text, numbers, null where there is none."""
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        reading = importlib.import_module("pyarrow.csv")
    except ImportError as error:
        raise UserError(f"{out}: Parquet needs: {install_command('parquet')}") from error
    names = [name.encode(errors="surrogateescape").decode(errors="backslashreplace") for name in _columns(classes)]
    is_text = [True, True, *[False] * (len(names) - 3), True]
    # read by their places, as text may be no valid Unicode
    types = {str(place): arrow.binary() if text else arrow.float64() for place, text in enumerate(is_text)}
    reader = reading.open_csv(
        rows,
        read_options=reading.ReadOptions(column_names=list(types), skip_rows_after_names=1, block_size=BLOCK_BYTES),
        parse_options=reading.ParseOptions(newlines_in_values=True),
        convert_options=reading.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False),
    )
    columns = [(name, arrow.string() if text else arrow.float64()) for name, text in zip(names, is_text, strict=True)]
    schema = arrow.schema(columns)
    with open_atomically(out) as file, parquet.ParquetWriter(file, schema) as writer:
        for batch in reader:
            values = [
                # with backslashes, as a text in Parquet is valid Unicode
                arrow.array([value.decode(errors="backslashreplace") for value in column.to_pylist()], arrow.string())
                if text
                else column
                for column, text in zip(batch.columns, is_text, strict=True)
            ]
            writer.write_batch(arrow.record_batch(values, schema=schema))


def _join(out: Path, share: Share, count: int, mark: _Mark, classes: Sequence[str]) -> None:
    """Put the parts of all processes behind each other when they are whole, and the result into its place.

    Another process that dies ends this wait too: whoever started them ends them all.
    """
    first = _partial(out, share)
    with first.open("ab") as file:
        for rank in range(1, share.world):
            other = Share(rank, share.world)
            part, (start, stop) = _partial(out, other), other.bounds(count)
            while _read_mark(part, _Mark(mark.images)).rows < stop - start:
                time.sleep(0.2)
            with part.open("rb") as rows:
                shutil.copyfileobj(rows, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    if out.suffix == ".parquet":
        _to_parquet(first, out, classes)
    else:
        os.replace(first, out)
        sync_folder(out.parent)
    for rank in range(share.world):
        part = _partial(out, Share(rank, share.world))
        mark_file(part).unlink(missing_ok=True)
        part.unlink(missing_ok=True)
