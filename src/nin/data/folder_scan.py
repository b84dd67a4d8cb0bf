"""Looks at every image file of a folder once and remembers what was found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nin.data.cache import cache_path, read_cache, write_cache
from nin.data.decoder import FORMATS, decode_pixels, failure_reason, read_header
from nin.data.folder_listing import FolderListing
from nin.data.loader import map_in_threads
from nin.errors import UserError
from nin.runtime.progress import ProgressCallback

Problems = dict[int, str]  # why the image at an index cannot be read
Pixels = NDArray[np.uint8]

# One row for each file: 36 bytes. `key` stands for path, size and time of change; `digest` for the content; `format`
# is a position in FORMAT_NAMES; `whole` says that all of it has been decoded.
RECORD = np.dtype(
    [
        ("key", "<u8"),
        ("digest", "<u8", (2,)),
        ("width", "<i4"),
        ("height", "<i4"),
        ("format", "u1"),
        ("grey", "?"),
        ("frames", "?"),
        ("whole", "?"),
    ]
)
FORMAT_NAMES = ("", *FORMATS, "MPO")

_CHUNK = 64  # images that a thread reads between two reports of progress
_FEWEST_REMEMBERED = 100  # reading fewer files again takes less than a second
_MEMORY_VERSION = 2  # raised when RECORD or what it means changes


@dataclass(frozen=True)
class LoadOptions:
    """How to read a folder; `nin.data.load` documents each field."""

    size: int | None
    test_fraction: float | None
    seed: int
    strict: bool
    workers: int
    memory_limit_bytes: int
    on_progress: ProgressCallback | None

    def __post_init__(self) -> None:
        """Check what a person may have chosen."""
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UserError(f"test_fraction: expected a number between 0 and 1, got {self.test_fraction}")
        if self.size is not None and self.size < 1:
            raise UserError(f"size: expected at least 1 pixel, got {self.size}")


class FolderScan:
    """What the files of a folder are, and which cannot be read.

    What is known of a file is kept in the user's cache folder and holds as long as its path, size and time of change
    stay. Only readable files are remembered: a file that was refused is looked at again.

    Args:
        listing: the files.
        options: how to read them.

    Attributes:
        records: one `RECORD` for each file of the listing; zeros where it cannot be read.
        problems: why files cannot be read, by index.
    """

    def __init__(self, listing: FolderListing, options: LoadOptions) -> None:
        self.listing, self.options = listing, options
        self.records = np.zeros(len(listing.names), dtype=RECORD)
        self.problems: Problems = {}
        self.memory = cache_path(os.fspath(listing.root.resolve()), _MEMORY_VERSION)

    def read_headers(self) -> None:
        """Fill `records` from what is remembered, else from each file's header and bytes."""
        known = np.frombuffer(read_cache(self.memory) or b"", dtype=RECORD)
        keys = np.ascontiguousarray(known["key"])  # else each search would copy them

        def read(index: int) -> None:
            path = self.path(index)
            try:
                key = _key(self.listing.names[index], os.stat(path))
                place = int(np.searchsorted(keys, key))
                if place < len(keys) and keys[place] == key:
                    self.records[index] = known[place]
                else:
                    self.records[index] = _examine(path, key)
            except OSError as error:
                raise UserError(f"{path}: {failure_reason(error)}") from error

        self._for_each(range(len(self.records)), read, "looking at files")

    def decode(self, size: int, channels: int, pixels: Pixels | None) -> None:
        """Decode images: only then is it known that they are whole.

        Args:
            size: height and width to bring them to, in pixels.
            channels: 1 or 3.
            pixels: takes all images, (N, channels, size, size); None decodes only what was never decoded.
        """

        def read(index: int) -> None:
            image = decode_pixels(self.path(index), size=size, channels=channels)
            if pixels is not None:
                pixels[index] = image
            self.records["whole"][index] = True

        readable = self.records["width"] > 0
        wanted = readable if pixels is not None else readable & ~self.records["whole"]
        try:
            self._for_each(np.flatnonzero(wanted).tolist(), read, "reading images")
        finally:  # stopped half-way, it goes on from there
            self._remember()

    def path(self, index: int) -> str:
        """Return the path of the file at an index."""
        return os.path.join(self.listing.root, self.listing.names[index])

    def good(self) -> NDArray[np.int64]:
        """Return the indices of the files that can be read."""
        return np.flatnonzero(self.records["width"] > 0)

    def _for_each(self, indices: Sequence[int], read: Callable[[int], None], stage: str) -> None:
        """Call read(index) in threads; note why it failed where it did, or raise that if strict."""

        def read_chunk(chunk: Sequence[int]) -> Problems:
            problems = {}
            for index in chunk:
                try:
                    read(index)
                except UserError as error:
                    problems[index] = str(error).removeprefix(f"{self.path(index)}: ")
            return problems

        chunks = (indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK))
        results = map_in_threads(read_chunk, chunks, workers=self.options.workers)
        for number, found in enumerate(results, start=1):
            self.problems |= found
            self.records[list(found)] = np.zeros((), dtype=RECORD)
            if self.options.strict and found:
                index = min(found)
                raise UserError(f"{self.path(index)}: {found[index]}; replace or remove the file")
            if self.options.on_progress is not None:
                self.options.on_progress(stage, min(number * _CHUNK, len(indices)), len(indices))

    def _remember(self) -> None:
        """Keep what is known for the next time."""
        known = self.records[self.records["width"] > 0]
        if len(known) < _FEWEST_REMEMBERED:
            return
        write_cache(self.memory, known[np.argsort(known["key"])].tobytes())


def _examine(path: str, key: np.uint64) -> NDArray[np.void]:
    """Return the record of a file."""
    with open(path, "rb") as file:
        header = read_header(file)
        file.seek(0)
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    kind = FORMAT_NAMES.index(header.format)
    row = (key, np.frombuffer(digest, "<u8"), header.width, header.height, kind, header.grey, header.frames, False)
    return np.array(row, dtype=RECORD)


def _key(name: str, found: os.stat_result) -> np.uint64:
    """Return 64 bits that stand for a file as it is now."""
    text = os.fsencode(name) + f"\0{found.st_size}\0{found.st_mtime_ns}".encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
