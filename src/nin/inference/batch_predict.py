"""Batch prediction: any number of images into a CSV or Parquet file, by one process or several, resumable."""

import csv
import glob
import hashlib
import importlib
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
from nin.data.decoder import DecodeError, decode_pixels
from nin.data.loader import map_in_threads
from nin.data.value_range import Pixels
from nin.display.tables import csv_lines
from nin.errors import UserError
from nin.inference.classifier import INFERENCE_BATCH_SIZE, Classifier
from nin.runtime.files import open_atomically, sync_folder, write_atomically
from nin.runtime.fingerprint import fingerprint
from nin.version import install_command

SECONDS_BETWEEN_SYNCS = 2.0

# CSV that is converted at a time: one row group of the Parquet file
PARQUET_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Partition:
    """The images of one process: those from one index to another, so that the parts can be joined as files.

    Attributes:
        rank: of the process, from 0.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    def bounds(self, count: int) -> tuple[int, int]:
        """Return the first index and the one after the last, of ``count`` images."""
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size


@dataclass(frozen=True)
class PredictionCounts:
    """Numbers of the rows of one call of `predict_to_file`.

    Attributes:
        total: rows of this partition.
        resumed: those of them that an earlier call wrote.
        unreadable: those that this call wrote for files that cannot be read.
    """

    total: int
    resumed: int
    unreadable: int


@dataclass
class _SyncPoint:
    """The rows that fsync has brought to the disk. A call that resumes cuts off what was written after them."""

    images: str  # of the images and the network, see `_fingerprint`
    rows: int = 0
    bytes: int = 0


def predict_to_file(
    classifier: Classifier,
    images: Sequence[str] | data.ShardSet,
    out: Path,
    *,
    resume: bool = False,
    partition: Partition | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_unreadable: Callable[[str], None] | None = None,
) -> PredictionCounts:
    """Classify images and write one row for each, in their order: image, label, confidence, every class, problem.

    A class with the name of another column has "class " before it in the header. Memory does not grow with the number
    of images. Rows are appended to a file whose name ends in ".partial", and ``out`` is replaced when all are there. A
    file that cannot be read gets a row with the reason as its problem.

    Args:
        classifier: of the images.
        images: paths, or shards.
        out: the file; Parquet if its name ends in .parquet, else CSV.
        resume: go on after the rows that an interrupted call wrote, if there are any. A file that is finished is left
            as it is.
        partition: the images of this process of several. The one of rank 0 merges the files when all are complete.
        on_progress: called with the rows that are written and their number in the end.
        on_unreadable: called with the name of each image that this call cannot read.

    Returns:
        How many rows there are, and how they came about.

    Raises:
        UserError: there are rows of an interrupted call without ``resume``, rows of other images or of another
            network, or ``resume`` meets a finished file of other images or classes.
        OSError: the file cannot be written; it is named.
    """
    partition = partition or Partition()
    start, stop = partition.bounds(len(images))
    part = _partial_path(out, partition)
    if resume and out.exists() and not any(out.parent.glob(f"{glob.escape(out.name)}.*partial")):
        _check_finished(out, images, classifier.classes)
        return PredictionCounts(stop - start, stop - start, 0)
    synced = _SyncPoint(_fingerprint(images, classifier))
    if resume:
        synced = _read_sync_point(part, synced)
    elif part.exists() and _sync_point_path(part).exists():
        raise UserError(f"{part} holds predictions of an interrupted call: go on with --resume, or remove it")
    before, unreadable = synced.rows, 0
    with part.open("r+b" if synced.bytes else "wb") as file:
        file.truncate(synced.bytes)
        file.seek(synced.bytes)
        if partition.rank == 0 and not synced.bytes:
            file.write(csv_lines([_column_names(classifier.classes)]))
        synced_at = time.monotonic()
        for rows, failed in _predict_rows(classifier, images, range(start + before, stop)):
            file.write(csv_lines(rows))
            unreadable += len(failed)
            if on_unreadable is not None:
                for name in failed:
                    on_unreadable(name)
            synced.rows += len(rows)
            if time.monotonic() - synced_at > SECONDS_BETWEEN_SYNCS:
                synced_at = time.monotonic()
                _write_sync_point(file, part, synced)
            if on_progress is not None:
                on_progress(synced.rows, stop - start)
        _write_sync_point(file, part, synced)
    if partition.rank == 0:
        _merge(out, partition, len(images), synced, classifier.classes)
    return PredictionCounts(stop - start, before, unreadable)


def _check_finished(out: Path, images: Sequence[str] | data.ShardSet, classes: Sequence[str]) -> None:
    """Check that a finished file has a row for each of the images, and a column for each class.

    Raises:
        UserError: it has others, or is no such file.
    """
    is_parquet = out.suffix == ".parquet"
    expected = itertools.chain([_column_names(classes)], ([name] for name in _image_names(images)))
    found = _parquet_rows(out) if is_parquet else _csv_rows(out)
    try:
        same = all(
            row is not None
            and names is not None
            and row[: len(names)] == (list(map(_utf8, names)) if is_parquet else names)
            for row, names in itertools.zip_longest(found, expected)
        )
    except (ValueError, LookupError, csv.Error):
        same = False
    if not same:
        raise UserError(
            f"{out} exists, and is no finished table of these images and classes: give another name, or --overwrite"
        )


def _csv_rows(out: Path) -> Iterator[list[str]]:
    """Yield the rows of a CSV file, the header first."""
    with out.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield from csv.reader(file)


def _parquet_rows(out: Path) -> Iterator[list[str]]:
    """Yield the names of the columns of a Parquet file, then the image of each row."""
    pq = _pyarrow(out, "pyarrow.parquet")[0]
    file = pq.ParquetFile(out)
    yield file.schema_arrow.names
    for batch in file.iter_batches(columns=["image"]):
        yield from ([name] for name in batch.column(0).to_pylist())


def _image_names(images: Sequence[str] | data.ShardSet) -> Sequence[str]:
    return images.names if isinstance(images, data.ShardSet) else images


def _predict_rows(
    classifier: Classifier, images: Sequence[str] | data.ShardSet, indices: range
) -> Iterator[tuple[list[list[str]], list[str]]]:
    """Yield the rows of each batch, and the names of its images that cannot be read; threads decode ahead."""
    p, names = classifier.info.preprocessing, _image_names(images)

    def decode(batch: range) -> tuple[Pixels, dict[int, str]]:
        """Return uint8 (B, C, size, size), zeros for an image that cannot be read, and the reasons by index."""
        pixels, problems = np.zeros((len(batch), p.channels, p.size, p.size), dtype=np.uint8), {}
        for image, index in zip(pixels, batch, strict=True):
            try:
                source = images.read(index) if isinstance(images, data.ShardSet) else images[index]
                image[:] = decode_pixels(source, name=names[index], **p.decoding)
            except DecodeError as error:
                problems[index] = error.reason
        return pixels, problems

    # Sums depend on the size of the batch in the last bit: an image that cannot be read keeps its place. The sync point
    # is written after whole batches only, so a call that resumes has the batches, and the bytes, of one that was not
    # interrupted.
    batches = [indices[i : i + INFERENCE_BATCH_SIZE] for i in range(0, len(indices), INFERENCE_BATCH_SIZE)]
    for batch, (pixels, problems) in zip(batches, map_in_threads(decode, batches), strict=True):
        scores = classifier.probabilities(classifier.score_pixels(torch.from_numpy(pixels)))
        scored = zip(batch, scores, strict=True)
        yield (
            [_row(names[i], row, classifier.classes, problems.get(i)) for i, row in scored],
            [names[i] for i in problems],
        )


def _row(name: str, probabilities: Tensor, classes: Sequence[str], problem: str | None) -> list[str]:
    """Return the cells of one image."""
    if problem is not None:
        return [name, "", "", *[""] * len(classes), problem]
    best = int(probabilities.argmax())
    values = [f"{value:.6f}" for value in probabilities.tolist()]
    return [name, classes[best], values[best], *values, ""]


def _sync_point_path(part: Path) -> Path:
    """Return the path of the JSON file with the sync point of a partial file."""
    return part.with_name(f"{part.name}.json")


def _partial_path(out: Path, partition: Partition) -> Path:
    return out.with_name(f"{out.name}.partial" if partition.world_size == 1 else f"{out.name}.{partition.rank}.partial")


def _column_names(classes: Sequence[str]) -> list[str]:
    own = ("image", "label", "confidence", "problem")
    return [*own[:3], *(f"class {name}" if name in own else name for name in classes), own[3]]


def _fingerprint(images: Sequence[str] | data.ShardSet, classifier: Classifier) -> str:
    """Return a hash of the images' names, the network's weights and the temperature, where there is one."""
    weights = sorted(classifier.model.state_dict().items())
    parts = itertools.chain(
        (os.fsencode(name) + b"\0" for name in _image_names(images)),
        (part for name, tensor in weights for part in (name, tensor)),
        [f"temperature {classifier.temperature}"] if classifier.temperature != 1 else [],
    )
    return fingerprint(parts, hashlib.blake2b(digest_size=16))


def _write_sync_point(file: BinaryIO, part: Path, synced: _SyncPoint) -> None:
    """Bring the rows to the disk before the sync point that counts them."""
    file.flush()
    os.fsync(file.fileno())
    synced.bytes = file.tell()
    write_atomically(_sync_point_path(part), json.dumps(vars(synced)))


def _read_sync_point(part: Path, fresh: _SyncPoint) -> _SyncPoint:
    """Return the sync point of an earlier call, or ``fresh`` where there is none."""
    path = _sync_point_path(part)
    if not path.exists() or not part.exists():
        return fresh
    try:
        synced = _SyncPoint(**json.loads(path.read_text(encoding="utf-8")))
        usable = 0 <= synced.bytes <= part.stat().st_size and synced.rows >= 0
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: remove it to begin again") from error
    if not usable:
        raise UserError(f"{path} does not fit {part}: remove both to begin again")
    if synced.images != fresh.images:
        raise UserError(f"{part} is about other images or of another network: remove it to begin again")
    return synced


def _pyarrow(out: Path, *modules: str) -> list[Any]:
    """Import modules of PyArrow."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ImportError as error:
        raise UserError(f"{out}: Parquet needs: {install_command('parquet')}") from error


def _utf8(name: str) -> str:
    """Return a name as Parquet holds it: bytes that are no valid UTF-8 are escaped."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _csv_to_parquet(rows: Path, out: Path, classes: Sequence[str]) -> None:
    """Convert the rows to Parquet in blocks: image, label and problem are text, the others float64; empty is null."""
    pa, pq, pa_csv = _pyarrow(out, "pyarrow", "pyarrow.parquet", "pyarrow.csv")
    names = [_utf8(name) for name in _column_names(classes)]
    is_text = [True, True, *[False] * (len(names) - 3), True]
    # bytes, and numbers for names: PyArrow's CSV reader takes valid UTF-8 only, which paths and classes need not be
    types = {str(i): pa.binary() if text else pa.float64() for i, text in enumerate(is_text)}
    reader = pa_csv.open_csv(
        rows,
        read_options=pa_csv.ReadOptions(
            column_names=list(types), skip_rows_after_names=1, block_size=PARQUET_BLOCK_BYTES
        ),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False),
    )
    columns = [(name, pa.string() if text else pa.float64()) for name, text in zip(names, is_text, strict=True)]
    schema = pa.schema(columns)
    with open_atomically(out) as file, pq.ParquetWriter(file, schema) as writer:
        for batch in reader:
            values = [
                # Parquet's strings are valid UTF-8: other bytes are escaped
                pa.array([value.decode(errors="backslashreplace") for value in column.to_pylist()], pa.string())
                if text
                else column
                for column, text in zip(batch.columns, is_text, strict=True)
            ]
            writer.write_batch(pa.record_batch(values, schema=schema))


def _merge(out: Path, partition: Partition, count: int, synced: _SyncPoint, classes: Sequence[str]) -> None:
    """Wait for the files of the other processes, append them to the first one's, and replace ``out``.

    A process that dies leaves its file incomplete; torchrun then ends this one too, so the wait needs no limit.
    """
    first = _partial_path(out, partition)
    with first.open("ab") as file:
        for rank in range(1, partition.world_size):
            other = Partition(rank, partition.world_size)
            part, (start, stop) = _partial_path(out, other), other.bounds(count)
            while _read_sync_point(part, _SyncPoint(synced.images)).rows < stop - start:
                time.sleep(0.2)
            with part.open("rb") as rows:
                shutil.copyfileobj(rows, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    if out.suffix == ".parquet":
        _csv_to_parquet(first, out, classes)
    else:
        os.replace(first, out)
        sync_folder(out.parent)
    for rank in range(partition.world_size):
        part = _partial_path(out, Partition(rank, partition.world_size))
        _sync_point_path(part).unlink(missing_ok=True)
        part.unlink(missing_ok=True)
