"""Find the classes and the image files of a folder, without reading any."""

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nin.data.dataset import PathList
from nin.data.decoder import IMAGE_EXTENSIONS
from nin.errors import UserError

_EXPECTED = "expected DIR/<class>/<image>, or DIR/train/<class>/<image> beside DIR/test or DIR/val"
_SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


@dataclass(frozen=True, eq=False)
class FolderListing:
    """The image files of a folder.

    Attributes:
        root: the folder.
        classes: their names, in natural order; labels are positions in it.
        names: paths relative to root, with "/" on every system.
        labels: int64 (N,).
        is_test: bool (N,), or None where the folder has no test images.
        notes: what was left out, in sentences for the user.
    """

    root: Path
    classes: tuple[str, ...]
    names: PathList
    labels: NDArray[np.int64]
    is_test: NDArray[np.bool_] | None
    notes: tuple[str, ...]


def list_folder(root: Path) -> FolderListing:
    """List the images of a folder by class.

    The layout is `DIR/<class>/**` or, where DIR has a folder called train, `DIR/train/<class>/**` with
    `DIR/test` or `DIR/val` (also spelled valid or validation) beside it. Classes are matched by name. Where
    both are there, test is the test set and val is not used. Train alone is split as a DIR would be.
    Hidden files and folders, and files with other extensions than those of images, are skipped.

    Raises:
        UserError: there is no such folder, or it does not have this layout with two classes of images.
    """
    splits, notes = _find_splits(root)
    train = splits["train"]
    classes = _find_classes(train)
    files = {False: _find_class_files(train, root)}
    if not any(files[False].values()):
        raise UserError(f"{train}: {_EXPECTED}, got no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
    if "test" in splits:
        files[True] = _find_class_files(splits["test"], root)
        unknown = sorted(set(files[True]) - set(classes), key=natural_key)
        if unknown:
            few = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
            raise UserError(
                f"{splits['test']}: class {unknown[0]!r} is not in {train}, so it cannot be recognised; "
                f"rename or remove it (classes to learn: {few})"
            )
        if not any(files[True].values()):
            raise UserError(f"{splits['test']}: expected test images in class folders, got no images")
    rows = [
        (name, label, is_test)
        for is_test, by_class in files.items()
        for label, class_name in enumerate(classes)
        for name in by_class.get(class_name, ())
    ]
    return FolderListing(
        root=root,
        classes=classes,
        names=PathList(name for name, _, _ in rows),
        labels=np.array([label for _, label, _ in rows], dtype=np.int64),
        is_test=np.array([is_test for _, _, is_test in rows]) if "test" in splits else None,
        notes=tuple(notes),
    )


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Return the key that sorts "2" before "10": runs of digits compare as numbers, before any letter."""
    parts = re.split(r"([0-9]+)", name)  # every second one is a run of digits
    key = [(1, part.casefold()) if place % 2 == 0 else (0, int(part)) for place, part in enumerate(parts) if part]
    return key, name  # names that differ only in case or leading zeros still have one order


def _find_splits(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the folders that hold the classes, as {"train": ..., "test": ...}, and notes."""
    if not root.exists():
        raise UserError(f"{root}: there is no such file or folder; {_EXPECTED}")
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder, got a file; {_EXPECTED}")
    found: dict[str, Path] = {}
    others = []
    for folder in _subfolders(root):
        if folder.name.lower() in _SPLIT_FOLDERS:
            found.setdefault(_SPLIT_FOLDERS[folder.name.lower()], folder)
        else:
            others.append(folder)
    if "train" not in found or (len(found) == 1 and others):
        return {"train": root}, []
    notes = [f"{other} is not used: it is beside train" for other in others]
    val = found.pop("val", None)
    if val is not None and "test" in found:
        notes.append(f"{val} is not used: {found['test']} gives the final figure")
    elif val is not None:
        found["test"] = val
    return found, notes


def _find_classes(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders in natural order; there must be two."""
    subfolders = _subfolders(folder)
    names = sorted({_class_name(f) for f in subfolders}, key=natural_key)
    if len(names) >= 2:
        return tuple(names)
    if not names:
        images = sum(_is_image(entry) for entry in _visible_entries(folder))
        got = f"{images} images directly in the folder" if images else "an empty folder"
        if not images and _visible_entries(folder):
            got = "files that are no images"
        raise UserError(f"{folder}: {_EXPECTED}, got {got}")
    inner = _subfolders(subfolders[0])
    hint = f"; did you mean {subfolders[0]}?" if len(inner) >= 2 else ""
    raise UserError(f"{folder}: expected two classes or more, got only {names[0]!r}{hint}")


def _find_class_files(folder: Path, root: Path) -> dict[str, list[str]]:
    """Return the sorted image paths, relative to root, by class name."""
    merged: dict[str, list[str]] = {}
    for subfolder in _subfolders(folder):
        merged.setdefault(_class_name(subfolder), []).extend(find_images(subfolder))
    return {name: sorted(Path(path).relative_to(root).as_posix() for path in paths) for name, paths in merged.items()}


def find_images(folder: Path) -> Iterator[str]:
    """Yield the image files of a folder and of the folders in it; enter each real folder once.

    Links are followed, which os.walk can do too, but a link to a parent would lead it round for ever, or into the
    other classes: the parents count as entered.
    """
    entered = {_device_and_inode(parent) for parent in folder.resolve().parents}
    entered |= {_device_and_inode(parent) for parent in folder.absolute().parents}
    waiting = [os.fspath(folder)]
    while waiting:
        directory = waiting.pop()
        identity = _device_and_inode(directory)
        if identity in entered:
            continue
        entered.add(identity)
        for entry in _visible_entries(directory):
            if _is_folder(entry):
                waiting.append(entry.path)
            elif _is_image(entry):
                yield entry.path


def _visible_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            # __MACOSX: what macOS adds to its zip files
            visible = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from error
    return sorted(visible, key=lambda entry: entry.name)  # the order of scandir depends on the file system


def _subfolders(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _visible_entries(folder) if _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # os.path.isdir answers False for a link to itself, where DirEntry.is_dir raises.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Go by the extension. A broken link counts: it is reported when it cannot be read. A pipe does not."""
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_EXTENSIONS:
        return False
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def _device_and_inode(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _class_name(folder: Path) -> str:
    """Return the folder's name in the composed Unicode form: "é" is one class whichever system wrote it."""
    return unicodedata.normalize("NFC", folder.name)
