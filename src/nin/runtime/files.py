"""Writes that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes | str, *, read_back: bool = False) -> None:
    """Write a file so that after a crash there is the old one or the new one, whole.

    Args:
        path: of the file.
        content: of the file.
        read_back: compare what was written before it takes the old file's place.

    Raises:
        OSError: with the file's name, the disk is full or the folder cannot be written; the old file stays.
    """
    data = content.encode() if isinstance(content, str) else content
    with open_atomically(path) as file:
        file.write(data)
        file.flush()
        if read_back and Path(file.name).read_bytes() != data:
            raise OSError(errno.EIO, "what was written reads back differently", str(path))


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its place when the block ends well, and else is not there.

    Raises:
        OSError: as `write_atomically`.
    """
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            with open(name, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:  # somebody's own words from inside the block
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
