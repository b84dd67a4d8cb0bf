"""FolderScan: the images of a folder, with a cache of what their files held."""

import os
from pathlib import Path

import numpy as np

from nin.data.cache import cache_path, digest, file_state, read_cache, write_cache
from nin.data.dataset import LoadOptions
from nin.data.decoder import DecodeError, failure_reason
from nin.data.folder_listing import list_folder
from nin.data.image_scan import FORMAT_NAMES, RECORD, ImageScan, read_record
from nin.data.value_range import Pixels

_MIN_CACHED_FILES = 100  # reading fewer files again takes less than a second
_CACHE_VERSION = 3  # increased when RECORD or the meaning of a field changes


class FolderScan(ImageScan):
    """The image files of a folder.

    What is known of a file is kept in the user's cache folder and holds as long as its path, size and time of
    modification stay. Only readable files are cached: a file that was refused is read again.

    Args:
        root: the folder.
        options: how to read it.

    Raises:
        UserError: it has no layout of ours, or none of its images can be read.
    """

    def __init__(self, root: Path, options: LoadOptions) -> None:
        # positions in FORMAT_NAMES are others with another Pillow
        self._cache = cache_path(os.fsencode(root.resolve()) + "|".join(FORMAT_NAMES).encode(), _CACHE_VERSION)
        self._cached = np.frombuffer(read_cache(self._cache) or b"", dtype=RECORD)
        self._keys = np.ascontiguousarray(self._cached["key"])  # else each search would copy them
        super().__init__(list_folder(root), options)

    def source(self, index: int) -> str:
        """Return the path of the file at an index."""
        return os.path.join(self.listing.root, self.listing.names[index])

    def _read_header(self, index: int) -> None:
        path, name, keys = self.source(index), self.listing.names[index], self._keys
        try:
            state = file_state(name, os.stat(path))
            # among a million files the chance that two have the same key is 3e-8
            key = np.uint64(int.from_bytes(digest(state, size=8), "little"))
            place = int(np.searchsorted(keys, key))
            is_cached = place < len(keys) and keys[place] == key
            self.records[index] = self._cached[place] if is_cached else read_record(path, name, key)
        except OSError as error:
            raise DecodeError(path, failure_reason(error)) from error

    def decode(self, pixels: Pixels | None = None, photos: dict[int, Pixels] | None = None) -> None:
        """Decode the images, see `ImageScan.decode`; a scan that is interrupted goes on from there the next time."""
        try:
            super().decode(pixels, photos)
        finally:
            known = self.records[self.readable()]
            if len(known) >= _MIN_CACHED_FILES:
                write_cache(self._cache, known[np.argsort(known["key"])].tobytes())
