"""Writes that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path


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
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if read_back and Path(name).read_bytes() != data:
                raise OSError(errno.EIO, "what was written reads back differently")
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
