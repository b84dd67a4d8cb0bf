"""What was found out about files and is kept for the next time, in the user's cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nin.data.builtin import cache_folder
from nin.runtime.files import write_atomically

_DIGEST_BYTES = 16


def cache_path(subject: str, version: int) -> Path:
    """Return where something is kept.

    Args:
        subject: what it is about, a path perhaps with more.
        version: raised when the form of the content changes.
    """
    name = hashlib.blake2b(subject.encode(errors="surrogateescape"), digest_size=12).hexdigest()
    return cache_folder() / "examined" / f"{name}.{version}"


def write_cache(memory: Path, content: bytes) -> None:
    """Keep the content, unless the cache folder cannot be written: then the time to find it out again is lost."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, _digest(content) + content)
    except OSError:
        return


def read_cache(memory: Path) -> bytes | None:
    """Return what was kept; None where there is nothing, or it is damaged."""
    try:
        kept = memory.read_bytes()
    except OSError:
        return None
    content = kept[_DIGEST_BYTES:]
    return content if kept[:_DIGEST_BYTES] == _digest(content) else None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
