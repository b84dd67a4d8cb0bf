"""FolderScan: read the header and the bytes of every image file of a folder once, and cache what was found."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nin.data.cache import cache_path, digest, file_state, read_cache, write_cache
from nin.data.dataset import LoadOptions, default_size
from nin.data.decoder import FORMATS, DecodeError, Pixels, decode_pixels, failure_reason, read_header
from nin.data.folder_listing import list_folder
from nin.data.loader import map_in_threads
from nin.data.sampler import stratified_holdout
from nin.errors import UserError

Problems = dict[int, str]  # why the image at an index cannot be read

# One row for each file: 36 bytes. `key` is a hash of path, size and time of modification; `digest` one of the content;
# `format` is a position in FORMAT_NAMES; `frames` says that there are several; `decoded` that the pixels were decoded.
RECORD = np.dtype(
    [
        ("key", "<u8"),
        ("digest", "<u8", (2,)),
        ("width", "<i4"),
        ("height", "<i4"),
        ("format", "u1"),
        ("grey", "?"),
        ("frames", "?"),
        ("decoded", "?"),
    ]
)
FORMAT_NAMES = ("", *FORMATS, "MPO")

_CHUNK = 64  # images that a thread reads between two reports of progress
_MIN_CACHED_FILES = 100  # reading fewer files again takes less than a second
_CACHE_VERSION = 2  # increased when RECORD or the meaning of a field changes


class FolderScan:
    """The image files of a folder: what their headers say, which can be read, and how to train on them.

    What is known of a file is kept in the user's cache folder and holds as long as its path, size and time of
    modification stay. Only readable files are cached: a file that was refused is read again.

    Args:
        root: the folder.
        options: how to read it.

    Attributes:
        listing: the files.
        records: one `RECORD` for each file of the listing; zeros where it cannot be read.
        problems: why files cannot be read, by index.
        channels: 1 if all readable images are grey, else 3.
        size: height and width to train at, in pixels.

    Raises:
        UserError: it has no layout of ours, or none of its images can be read.
    """

    def __init__(self, root: Path, options: LoadOptions) -> None:
        self.listing, self.options = list_folder(root), options
        self.records = np.zeros(len(self.listing.names), dtype=RECORD)
        self.problems: Problems = {}
        self._cache = cache_path(os.fsencode(root.resolve()), _CACHE_VERSION)
        self._read_headers()
        readable = self.records[self.readable()]
        if len(readable) == 0:
            name, reason = self.listing.names[0], self.problems[0]
            count = len(self.records)
            raise UserError(f"{root}: none of the {count} images can be read; the first is {name}: {reason}")
        self.channels = 1 if readable["grey"].all() else 3
        self.size = options.size or default_size(readable["width"], readable["height"])

    def _read_headers(self) -> None:
        """Fill `records` from the cache, else from each file's header and bytes."""
        cached = np.frombuffer(read_cache(self._cache) or b"", dtype=RECORD)
        keys = np.ascontiguousarray(cached["key"])  # else each search would copy them

        def read(index: int) -> None:
            path = self.path(index)
            try:
                key = _file_key(self.listing.names[index], os.stat(path))
                place = int(np.searchsorted(keys, key))
                if place < len(keys) and keys[place] == key:
                    self.records[index] = cached[place]
                else:
                    self.records[index] = _read_record(path, key)
            except OSError as error:
                raise DecodeError(path, failure_reason(error)) from error

        self._for_each(range(len(self.records)), read, "looking at files")

    def decode(self, pixels: Pixels | None = None) -> None:
        """Decode the images at `size`: a file that is truncated fails here, not when its header is read.

        Args:
            pixels: takes all images, (N, channels, size, size); None decodes only what was never decoded.
        """

        def read(index: int) -> None:
            image = decode_pixels(self.path(index), size=self.size, channels=self.channels)
            if pixels is not None:
                pixels[index] = image
            self.records["decoded"][index] = True

        wanted = self.readable()
        if pixels is None:
            wanted = wanted[~self.records["decoded"][wanted]]
        try:
            self._for_each(wanted.tolist(), read, "reading images")
        finally:  # a scan that is interrupted goes on from there the next time
            known = self.records[self.readable()]
            if len(known) >= _MIN_CACHED_FILES:
                write_cache(self._cache, known[np.argsort(known["key"])].tobytes())

    def path(self, index: int) -> str:
        """Return the path of the file at an index."""
        return os.path.join(self.listing.root, self.listing.names[index])

    def readable(self) -> NDArray[np.int64]:
        """Return the indices of the files that can be read."""
        return np.flatnonzero(self.records["width"] > 0)

    def test_mask(self) -> NDArray[np.bool_]:
        """Return which files are for testing, bool (N,): those of the test folder, else a part of each class.

        Raises:
            UserError: a class has no readable image to train on, or none is left for testing.
        """
        listing, readable, is_test = self.listing, self.readable(), np.zeros(len(self.records), dtype=np.bool_)
        labels = listing.labels[readable]
        if listing.is_test is not None:
            is_test[readable] = listing.is_test[readable]
        else:
            names, options = listing.names.select(readable), self.options
            is_test[readable] = stratified_holdout(
                names, labels.tolist(), fraction=options.test_fraction, seed=options.seed
            )
        train_counts = np.bincount(labels[~is_test[readable]], minlength=len(listing.classes))
        for label in np.flatnonzero(train_counts == 0)[:1]:
            unreadable = sum(int(listing.labels[index]) == label for index in self.problems)
            raise UserError(
                f"{listing.root}: class {listing.classes[label]!r} has no readable training image "
                f"({unreadable} unreadable); add images to its folder, or remove the folder"
            )
        if not is_test.any():
            raise UserError(f"{listing.root}: no image is left for testing; expected two images or more in a class")
        return is_test

    def partition(self, is_test: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the indices of the readable files for training, and of those for testing."""
        readable = self.readable()
        return readable[~is_test[readable]], readable[is_test[readable]]

    def _for_each(self, indices: Sequence[int], read: Callable[[int], None], stage: str) -> None:
        """Call read(index) in threads; record why it failed in `problems`, or raise that if strict."""

        def read_chunk(chunk: Sequence[int]) -> Problems:
            problems = {}
            for index in chunk:
                try:
                    read(index)
                except DecodeError as error:
                    problems[index] = error.reason
            return problems

        chunks = (indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK))
        results = map_in_threads(read_chunk, chunks, workers=self.options.workers)
        for number, found in enumerate(results, start=1):
            self.problems |= found
            self.records[list(found)] = np.zeros((), dtype=RECORD)
            # the results come in the order of the files, so the same file is named every time
            if self.options.strict and found:
                index = min(found)
                raise UserError(f"{self.path(index)}: {found[index]}; replace or remove the file")
            if self.options.on_progress is not None:
                self.options.on_progress(stage, min(number * _CHUNK, len(indices)), len(indices))


def _read_record(path: str, key: np.uint64) -> NDArray[np.void]:
    """Return the `RECORD` of a file."""
    with open(path, "rb") as file:
        header = read_header(file)
        file.seek(0)
        content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    file_format = FORMAT_NAMES.index(header.format)
    halves = np.frombuffer(content, "<u8")
    row = (key, halves, header.width, header.height, file_format, header.grey, header.frames, False)
    return np.array(row, dtype=RECORD)


def _file_key(name: str, stat: os.stat_result) -> np.uint64:
    """Return a 64-bit hash of a file's `file_state`."""
    # among a million files the chance that two have the same key is 3e-8
    return np.uint64(int.from_bytes(digest(file_state(name, stat), size=8), "little"))
