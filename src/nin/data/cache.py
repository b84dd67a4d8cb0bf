"""The user's cache folder, and files in it that keep what was computed from other files, each with a checksum."""

import contextlib
import hashlib
import os
from pathlib import Path

from nin.runtime.files import write_atomically

# A file that was damaged on the disk must not become sizes, labels or offsets of images.
_CHECKSUM_BYTES = 16


def cache_folder() -> Path:
    """Return the cache folder of nin: ``$XDG_CACHE_HOME/nin``, else ``~/.cache/nin``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nin"


def digest(content: bytes, *, size: int) -> bytes:
    """Return the BLAKE2b digest of a content, `size` bytes."""
    return hashlib.blake2b(content, digest_size=size).digest()


def file_state(path: str | Path, stat: os.stat_result) -> bytes:
    """Return bytes that change when a file's path, size or time of modification does."""
    return os.fsencode(path) + f"\0{stat.st_size}\0{stat.st_mtime_ns}".encode()


def cache_path(key: bytes, version: int) -> Path:
    """Return the cache file for a key.

    Args:
        key: what the content was computed from, a path or a `file_state`.
        version: of the format of the content.
    """
    return cache_folder() / "examined" / f"{digest(key, size=12).hex()}.{version}"


def write_cache(path: Path, content: bytes) -> None:
    """Write a cache file; do nothing if the folder cannot be written: then the content is computed again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, digest(content, size=_CHECKSUM_BYTES) + content)


def read_cache(path: Path) -> bytes | None:
    """Return the content of a cache file, or None if it is missing or its checksum is wrong."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content = stored[_CHECKSUM_BYTES:]
    return content if stored[:_CHECKSUM_BYTES] == digest(content, size=_CHECKSUM_BYTES) else None
