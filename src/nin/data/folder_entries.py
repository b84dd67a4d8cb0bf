"""The entries of an image folder: images, folders, and what is left out, with the reason."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from nin.data.decoder import DecodeError, read_header
from nin.data.findings import HIDDEN, NO_IMAGE, OUTPUT, Finding
from nin.data.image_formats import named_format
from nin.errors import UserError

# What macOS, Windows, and network disks leave in folders, and Python beside programs.
_SYSTEM_NAMES = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "lost+found",
    "system volume information",
    "thumbs.db",
}

# Any two of them make a folder a run folder; other programs have a config.json too.
_RUN_FILES = ("config.json", "model.safetensors", "metrics.csv", "state.safetensors")

# What `nin predict --maps` writes: numbered PNGs with this comment in them.
MAP_COMMENT = "a confidence map, drawn by nin predict --maps"
_MAP_NAME = re.compile(r"\d{4,}-.*\.png", re.IGNORECASE)


class FolderWalk:
    """Lists folders, and collects what is left out of them.

    Args:
        root: the folder that paths of findings are relative to.

    Attributes:
        findings: what was left out so far, each once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.findings: dict[str, Finding] = {}
        self._prefix = len(os.path.join(os.fspath(root), ""))
        self._subfolders: dict[Path, list[Path]] = {}

    def subfolders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder that may hold images, by name."""
        if folder not in self._subfolders:  # asked for several times, and a folder may hold a million files
            entries = self._entries(folder)
            self._subfolders[folder] = [folder / e.name for e in entries if _is_folder(e) and self._is_input(e)]
        return self._subfolders[folder]

    def direct_images(self, folder: Path) -> list[str]:
        """Return the paths of the images that lie in a folder itself, by name."""
        return [entry.path for entry in self._entries(folder) if not _is_folder(entry) and self._is_image(entry)]

    def images(self, folder: Path) -> Iterator[str]:
        """Yield the image files of a folder and of the folders in it; enter each real folder once.

        Links are followed, which os.walk can do too, but a link to a parent would lead it round for ever, or into the
        other classes: the parents count as entered.
        """
        entered = {device_and_inode(parent) for parent in folder.resolve().parents}
        entered |= {device_and_inode(parent) for parent in folder.absolute().parents}
        waiting = [os.fspath(folder)]
        while waiting:
            directory = waiting.pop()
            identity = device_and_inode(directory)
            if identity in entered:
                continue
            entered.add(identity)
            for entry in self._entries(directory):
                if _is_folder(entry):
                    if self._is_input(entry):
                        waiting.append(entry.path)
                elif self._is_image(entry):
                    yield entry.path

    def has_image(self, folder: Path) -> bool:
        """Return whether there is an image in a folder or in the folders in it."""
        with contextlib.suppress(OSError), os.scandir(folder) as entries:  # `images` says which folder cannot be read
            if any(self._is_promised(entry.name) for entry in entries):
                return True
        return next(self.images(folder), None) is not None

    def relative(self, path: str) -> str:
        """Return a path below the root relative to it, with "/" on every system."""
        # all come from entries of the root: pathlib would take half of the time of a listing
        return path[self._prefix :].replace(os.sep, "/")

    def leave_out(self, path: str, kind: str, detail: str) -> None:
        """Record that a file or folder is left out."""
        relative = self.relative(path) + ("/" if os.path.isdir(path) else "")
        self.findings.setdefault(relative, Finding(relative, kind, detail))

    def _entries(self, folder: str | Path) -> list[os.DirEntry[str]]:
        """Return the entries of a folder that are not hidden, by name."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)  # the order of scandir is the file system's
        except OSError as error:
            raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from error
        visible = []
        for entry in found:
            if entry.name.startswith("."):
                self.leave_out(entry.path, HIDDEN, "its name begins with a dot")
            elif entry.name.lower() in _SYSTEM_NAMES:
                self.leave_out(entry.path, HIDDEN, "not made by a person")
            else:
                visible.append(entry)
        return visible

    def _is_input(self, entry: os.DirEntry[str]) -> bool:
        """Return whether a folder was not made by nin, and does not lead back to where it lies; record it else."""
        if entry.is_symlink() and _is_parent(entry.path):
            self.leave_out(entry.path, NO_IMAGE, "a link to a folder that it lies in")
            return False
        if sum(os.path.isfile(os.path.join(entry.path, name)) for name in _RUN_FILES) < 2:
            return True
        self.leave_out(entry.path, OUTPUT, "a run folder")
        return False

    @staticmethod
    def _is_promised(name: str) -> bool:
        """Return whether a name alone makes a file an image."""
        return named_format(name) is not None and not name.startswith(".") and not _MAP_NAME.fullmatch(name)

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        """Return whether a file is an image; record it else.

        A file whose name promises an image counts, and so does a broken link: it is reported when it cannot be read. Of
        others the first bytes decide. A pipe would block.
        """
        is_broken_link = entry.is_symlink() and not os.path.exists(entry.path)
        if not is_broken_link and not entry.is_file():
            self.leave_out(entry.path, NO_IMAGE, "neither a file nor a folder")
            return False
        if named_format(entry.name) is not None:
            if _MAP_NAME.fullmatch(entry.name) and _is_map(entry.path):
                self.leave_out(entry.path, OUTPUT, MAP_COMMENT)
                return False
            return True
        try:
            read_header(entry.path)
        except DecodeError as error:
            self.leave_out(entry.path, NO_IMAGE, error.reason if os.path.islink(entry.path) else "another kind of file")
            return False
        return True


def find_images(folder: Path, *, findings: list[Finding] | None = None) -> Iterator[str]:
    """Yield the image files of a folder and of the folders in it.

    Args:
        folder: where to look.
        findings: takes what is left out.
    """
    walk = FolderWalk(folder)
    yield from walk.images(folder)
    if findings is not None:
        findings.extend(walk.findings.values())


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # os.path.isdir answers False for a link to itself, where DirEntry.is_dir raises.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_map(path: str) -> bool:
    """Return whether a PNG is one that `nin predict --maps` wrote."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get("Comment") == MAP_COMMENT
    except (OSError, SyntaxError, ValueError):  # whether it can be read is found later
        return False


def _is_parent(link: str) -> bool:
    """Return whether a link leads to a folder that it lies in."""
    place, target = Path(os.path.realpath(os.path.dirname(link))), Path(os.path.realpath(link))
    return target == place or target in place.parents


def device_and_inode(path: str | Path) -> tuple[int, int]:
    """Return what tells a folder from all others, by whatever path it was reached."""
    found = os.stat(path)
    return found.st_dev, found.st_ino
