"""Shards become Data, and an image folder becomes shards."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nin.data.dataset import Data, channel_mean_std, default_shift
from nin.data.decoder import read_header
from nin.data.folder import channels_and_size, default_size, examine, split
from nin.data.folder_scan import FolderScan, LoadOptions
from nin.data.sampling import epoch_order, stratified_holdout
from nin.data.webdataset import METADATA_FILE, ShardSet, is_shards, open_shards, shard_classes
from nin.errors import UserError
from nin.runtime.files import open_atomically, write_atomically
from nin.runtime.progress import ProgressCallback

# So many headers tell the size and the kind of all images.
_HEADERS = 1000

# So many classes may have no names: a label is a number of nine digits at most, and each class takes memory.
_MOST_UNNAMED = 100_000

# While shards are being written, what they are made from; it becomes METADATA_FILE when all are there.
_UNFINISHED_FILE = "nin-shards.partial.json"


def read_shards(source: str | Path, options: LoadOptions) -> Data:
    """Makes shards into Data; see `nin.data.load`.

    A folder with shards called train-*.tar and test-*.tar (or val-*.tar) is split so; else each class is.
    """
    shards = open_shards(source)
    labels = shards.labels.numpy()
    if (labels < 0).any():
        missing = shards.names[int(np.flatnonzero(labels < 0)[0])]
        raise UserError(f"{source}: {missing} has no label; expected a member of the same name ending in .cls")
    classes = tuple(shard_classes(source).get("classes") or map(str, range(min(int(labels.max()) + 1, _MOST_UNNAMED))))
    if labels.max() >= len(classes) or len(classes) < 2:
        raise UserError(f"{source}: label {labels.max()} does not fit {len(classes)} classes")
    channels, size = _kind(shards, options.size)
    shards = dataclasses.replace(shards, channels=channels, size=size)
    is_test = _split(shards, labels, options)
    train, test = (shards.select(np.flatnonzero(is_test == part)) for part in (False, True))
    if not len(train) or not len(test):
        raise UserError(f"{source}: no image is left for {'testing' if len(train) else 'training'}")
    mean, std = channel_mean_std(train)
    return Data(
        name=Path(source).name.removesuffix(".tar"),
        train=train,
        test=test,
        classes=classes,
        channels=channels,
        size=size,
        mean=mean,
        std=std,
        flip=not all(len(name) == 1 for name in classes),
        shift=default_shift(size),
    )


def write_shards(
    source: str | Path,
    out: str | Path,
    *,
    images_per_shard: int = 10_000,
    test_fraction: float | None = None,
    seed: int = 0,
    workers: int = 1,
    on_progress: ProgressCallback | None = None,
) -> tuple[Path, ...]:
    """Writes an image folder as WebDataset shards: OUT/train-000000.tar, …, OUT/test-000000.tar, ….

    The images are copied as they are, in an order shuffled by the seed; those that cannot be read are left out. Each
    shard is whole or not there; the same call goes on where an earlier one was stopped. The same folder gives the same
    bytes.

    Args:
        source: the folder, as `nin.data.load` takes it.
        out: the folder of the shards.
        images_per_shard: at most.
        test_fraction: share of each class for the test shards, 0.2 by default, where the folder has no test images.
        seed: of the order and of the split.
        workers: threads that look at the images first.
        on_progress: called with (what is being done, number done, number of all).

    Returns:
        The shards.

    Raises:
        UserError: the folder has no images, or ``out`` holds something else.
        OSError: a shard cannot be written; it is named.
    """
    if images_per_shard < 1:
        raise UserError(f"images_per_shard must be at least 1, got {images_per_shard}")
    if is_shards(source):
        raise UserError(f"{source} holds shards already; expected an image folder")
    options = LoadOptions(None, test_fraction, seed, False, workers, 0, on_progress)
    examination, out = examine(Path(source), options), Path(out)
    channels, size = channels_and_size(examination)
    examination.decode(size, channels, None)
    is_test, listing = split(examination.listing, examination.problems, options), examination.listing
    good = examination.good()
    description = {
        "format_version": 1,
        "classes": list(listing.classes),
        "images": {"train": int((~is_test[good]).sum()), "test": int(is_test[good].sum())},
        "made_from": _fingerprint(examination, is_test, images_per_shard, seed),
    }
    _begin(out, description)
    shards = []
    for part, indices in (("train", good[~is_test[good]]), ("test", good[is_test[good]])):
        order = indices[epoch_order(len(indices), seed=seed, epoch=0).numpy()]
        pieces = [order[start : start + images_per_shard] for start in range(0, len(order), images_per_shard)]
        for number, piece in enumerate(pieces):
            path = out / f"{part}-{number:06d}.tar"
            if not path.exists():
                _write_shard(path, examination, piece, first=number * images_per_shard)
            shards.append(path)
            if on_progress is not None:
                on_progress(f"writing {part} shards", number + 1, len(pieces))
    os.replace(out / _UNFINISHED_FILE, out / METADATA_FILE)
    return tuple(shards)


def _kind(shards: ShardSet, size: int | None) -> tuple[int, int]:
    """Return channels and size from the headers of images spread evenly over the shards."""
    headers = []
    for index in range(0, len(shards), max(1, len(shards) // _HEADERS)):
        try:
            headers.append(read_header(shards.read(index)))
        except UserError:
            continue  # training lists it when it meets it; what is sought here are those that can be read
    if not headers:
        raise UserError(f"{shards.shards[0]}: none of the images looked at can be read")
    widths, heights = (np.array([getattr(h, side) for h in headers]) for side in ("width", "height"))
    return 1 if all(h.grey for h in headers) else 3, size or default_size(widths, heights)


def _split(shards: ShardSet, labels: NDArray[np.int64], options: LoadOptions) -> NDArray[np.bool_]:
    """Return which images are for testing."""
    names = np.array([path.name for path in shards.shards])
    for part in ("test", "val"):
        chosen = np.char.startswith(names, part)
        if chosen.any() and not chosen.all():
            return chosen[shards.shard]
    fraction = options.test_fraction or 0.2
    return stratified_holdout(shards.names, labels.tolist(), fraction=fraction, seed=options.seed)


def _fingerprint(examination: FolderScan, is_test: NDArray[np.bool_], images_per_shard: int, seed: int) -> str:
    """Return a text that is another one whenever the shards would be others."""
    digest = hashlib.blake2b(f"{images_per_shard} {seed}".encode(), digest_size=16)
    digest.update(examination.records["key"].tobytes() + is_test.tobytes() + examination.listing.labels.tobytes())
    return digest.hexdigest()


def _begin(out: Path, description: dict[str, object]) -> None:
    """Make the folder, or see that what was begun in it can be gone on with."""
    text, unfinished = json.dumps(description, indent=1), out / _UNFINISHED_FILE
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not unfinished.is_file() or unfinished.read_text(encoding="utf-8") != text:
            raise UserError(f"{out} is not empty, and not what this command began: give another --out, or remove it")
        for leftover in out.glob(".*.tar.*"):
            leftover.unlink()
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(unfinished, text)


def _write_shard(path: Path, examination: FolderScan, indices: NDArray[np.int64], *, first: int) -> None:
    """Write images and labels as one tar file; times and owners are left out, so that it is always the same."""
    with open_atomically(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, index in enumerate(indices.tolist(), start=first):
            extension = os.path.splitext(examination.listing.names[index])[1].lower()
            label = str(int(examination.listing.labels[index])).encode()
            try:
                content = Path(examination.path(index)).read_bytes()
            except OSError as error:
                raise UserError(f"{examination.path(index)}: cannot be opened ({error.strerror})") from error
            for name, data in ((f"{number:09d}{extension}", content), (f"{number:09d}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
