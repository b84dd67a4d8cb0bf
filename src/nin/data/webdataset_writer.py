"""Write an image folder as WebDataset shards."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nin.data.cache import digest
from nin.data.dataset import LoadOptions
from nin.data.findings import Finding
from nin.data.folder import collect_findings
from nin.data.folder_scan import FolderScan
from nin.data.image_formats import file_extension
from nin.data.image_scan import FORMAT_NAMES
from nin.data.sampler import epoch_order
from nin.data.webdataset import is_shards
from nin.errors import UserError
from nin.names import PARTIAL_SHARDS_FILE, SHARDS_FILE, shard_files
from nin.runtime.files import contents, open_atomically, remove, write_atomically
from nin.runtime.progress import ProgressCallback


def write_shards(
    source: str | Path,
    out: str | Path,
    *,
    images_per_shard: int = 10_000,
    test_fraction: float | None = None,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
    on_progress: ProgressCallback | None = None,
    on_findings: Callable[[Sequence[Finding]], None] | None = None,
) -> tuple[Path, ...]:
    """Write an image folder as WebDataset shards: OUT/train-000000.tar, …, OUT/test-000000.tar, ….

    A validation part becomes OUT/val-000000.tar, …. The images are copied as they are, in an order shuffled by the
    seed; those that cannot be read are left out. Each shard is whole or not there; the same call goes on where an
    earlier one was stopped. The same folder gives the same bytes.

    Args:
        source: the folder, as `nin.data.load` takes it.
        out: the folder of the shards.
        images_per_shard: at most.
        test_fraction: fraction of each class for the test shards, 0.2 by default, where the folder has no test images.
        seed: of the order and of the split.
        workers: threads that read the images first.
        overwrite: remove the shards that are in ``out`` once the images are read, whatever they were made from.
        on_progress: called with (what is being done, number done, number of all).
        on_findings: called with what `nin.data.check` finds, before the first shard is written.

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
    options = LoadOptions(None, test_fraction, seed, workers=workers, on_progress=on_progress)
    scan, out = FolderScan(Path(source), options), Path(out)
    scan.decode()
    is_test = scan.test_mask()
    if on_findings is not None:
        on_findings(collect_findings(scan, is_test))
    parts = scan.partition(is_test)
    by_split = {"train": parts.train, "test": parts.test}
    if len(parts.validation):
        by_split["val"] = parts.validation
    metadata = {
        "format_version": 1,
        "classes": list(scan.listing.classes),
        "images": {split: len(indices) for split, indices in by_split.items()},
        "made_from": _fingerprint(scan, is_test, images_per_shard, seed),
    }
    if overwrite:
        remove(contents(out, shard_files(out), "shards"))
    is_finished = _is_finished(out, metadata)
    if not is_finished:
        _start_or_resume(out, metadata)
    shards = []
    for split, indices in by_split.items():
        order = indices[epoch_order(len(indices), seed=seed, epoch=0).numpy()]
        pieces = [order[start : start + images_per_shard] for start in range(0, len(order), images_per_shard)]
        for number, piece in enumerate(pieces):
            path = out / f"{split}-{number:06d}.tar"
            if not path.exists():
                _write_shard(path, scan, piece, first=number * images_per_shard)
            shards.append(path)
            if on_progress is not None:
                on_progress(f"writing {split} shards", number + 1, len(pieces))
    if not is_finished:
        os.replace(out / PARTIAL_SHARDS_FILE, out / SHARDS_FILE)
    return tuple(shards)


def _is_finished(out: Path, metadata: dict[str, object]) -> bool:
    """Return whether an earlier call with the same metadata wrote all shards; one that is gone is written again."""
    path = out / SHARDS_FILE
    return path.is_file() and path.read_text(encoding="utf-8") == json.dumps(metadata, indent=1)


def _fingerprint(scan: FolderScan, is_test: NDArray[np.bool_], images_per_shard: int, seed: int) -> str:
    """Return a hash of all that decides the bytes of the shards."""
    files = scan.records["key"].tobytes() + is_test.tobytes() + scan.listing.labels.tobytes()
    if scan.listing.is_validation.any():
        files += scan.listing.is_validation.tobytes()
    return digest(f"{images_per_shard} {seed}".encode() + files, size=16).hex()


def _start_or_resume(out: Path, metadata: dict[str, object]) -> None:
    """Make the folder, or check that an interrupted call with the same metadata began it."""
    text, partial = json.dumps(metadata, indent=1), out / PARTIAL_SHARDS_FILE
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not partial.is_file() or partial.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{out} holds something else than an interrupted call with these images and options: give another "
                "--out, or --overwrite, which removes shards"
            )
        for leftover in out.glob(".*.tar.*"):
            leftover.unlink()
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(partial, text)


def _write_shard(path: Path, scan: FolderScan, indices: NDArray[np.int64], *, first: int) -> None:
    """Write images and labels as one tar file; times and owners are left out, so that it is always the same."""
    # USTAR: one header of 512 bytes for each member; Python's default, PAX, may add extended ones
    with open_atomically(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, index in enumerate(indices.tolist(), start=first):
            file_format = FORMAT_NAMES[int(scan.records["format"][index])]
            extension = file_extension(scan.listing.names[index], file_format)
            label = str(int(scan.listing.labels[index])).encode()
            try:
                content = Path(scan.source(index)).read_bytes()
            except OSError as error:
                raise UserError(f"{scan.source(index)}: cannot be opened ({error.strerror})") from error
            for name, data in ((f"{number:09d}{extension}", content), (f"{number:09d}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
