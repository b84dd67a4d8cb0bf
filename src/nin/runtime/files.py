"""Write files atomically: after a crash there is the old file or the new one, never a part of it.

Own code, as the package for it, atomicwrites, is no longer maintained.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from nin.errors import UserError


def write_atomically(path: Path, content: bytes | str, *, read_back: bool = False) -> None:
    """Write a file atomically.

    Args:
        path: of the file.
        content: of the file.
        read_back: read the new file and compare it before it replaces the old one.

    Raises:
        OSError: the disk is full or the folder cannot be written; it has the file's name, and the old file stays.
    """
    data = content.encode() if isinstance(content, str) else content
    with open_atomically(path) as file:
        file.write(data)
        file.flush()
        if read_back and Path(file.name).read_bytes() != data:
            raise OSError(errno.EIO, "what was written reads back differently", str(path))


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends without an error, and else is removed.

    Raises:
        OSError: as `write_atomically`.
    """
    # in the same folder, as a rename is atomic within one file system only
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:  # raised by the caller's block, with words of its own
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock a folder for the block, so that two processes do not write into it. The lock ends with the process.

    It is advisory, and there is none on Windows and on file systems without one.

    Raises:
        UserError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process writes into {folder}: wait until it has ended, or give another --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EBADF):
                raise
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Sync a folder, without which a crash may undo a rename in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def contents(folder: Path, names: Collection[str], what: str) -> list[Path]:
    """Return the files and folders in a folder, none where there is none.

    Raises:
        UserError: it holds anything but these names.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give another --out, which is the folder to make")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in found:
        if path.name not in names and not path.name.startswith(tuple(f".{name}." for name in names)):
            raise UserError(f"overwrite removes {what} only, and {path} is none of its files: give another folder")
    return found


def remove(paths: Collection[Path]) -> None:
    """Remove files, links and whole folders."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
