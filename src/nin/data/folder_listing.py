"""Find the classes and the image files of a folder, without reading those whose names say that they are images."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nin.data.dataset import PathList
from nin.data.findings import MASK, NO_LABEL, Finding
from nin.data.folder_entries import FolderWalk
from nin.data.folder_layout import Layout, class_name, descend_to_classes, find_layout
from nin.data.image_formats import FORMAT_EXAMPLES
from nin.data.split_names import find_splits, folded_name, is_mask_name, is_unlabelled, masked_name
from nin.display.numbers import format_number_of
from nin.errors import UserError
from nin.names import EXPECTED_FOLDER

Files = dict[str, list[str]]  # paths relative to the root, by class name


@dataclass(frozen=True, eq=False)
class FolderListing:
    """The image files of a folder.

    Attributes:
        root: the folder.
        classes: their names, in natural order; labels are positions in it.
        names: paths relative to root, with "/" on every system.
        labels: int64 (N,).
        is_test: bool (N,), or None where the folder has no test images.
        is_validation: bool (N,), the images of a val folder beside those of a test folder.
        notes: what was left out, in sentences for the user.
        findings: the files and folders that were left out.
    """

    root: Path
    classes: tuple[str, ...]
    names: PathList
    labels: NDArray[np.int64]
    is_test: NDArray[np.bool_] | None
    is_validation: NDArray[np.bool_]
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]


def list_folder(root: Path) -> FolderListing:
    """List the images of a folder by class.

    The layout is `DIR/<class>/**` or, where DIR has a folder called train, `DIR/train/<class>/**` with
    `DIR/test` or `DIR/val` beside it; `nin.data.split_names` has the other names. Classes are matched by name. Where
    both are there, val is the validation part. Train alone is split as a DIR would be, and so it is where the test
    images have no labels. What is in a folder and is not used is among the findings or the notes.

    Raises:
        UserError: there is no such folder, or it does not have this layout with two classes of images.
    """
    walk = FolderWalk(root)
    layout = find_layout(root, walk)
    notes = [*layout.notes]
    train = _class_files(layout.train, walk)
    _check_classes(layout.train, train, walk)
    test: Files | None
    if layout.by_class:
        train, test, validation = _split_by_class(train, layout.train, walk)
    else:
        test, validation = _other_parts(layout, train, walk, notes)
    empty = [name for name, files in train.items() if not files]
    if len(empty) <= len(train) - 2:  # else the error names them
        notes += [f"{layout.train / name} is no class: it holds no image" for name in empty]
        train = {name: files for name, files in train.items() if files}
    classes = tuple(train)
    notes += _similar_names(classes)
    for folder in {root, layout.train}:
        for path in walk.direct_images(folder):
            walk.leave_out(path, NO_LABEL, "it lies beside the folders of the classes")
    rows = [
        (name, label, number)
        for number, part in enumerate((train, test or {}, validation))
        for label, class_ in enumerate(classes)
        for name in part.get(class_, ())
    ]
    parts = np.array([part for _, _, part in rows])
    return FolderListing(
        root=root,
        classes=classes,
        names=PathList(name for name, _, _ in rows),
        labels=np.array([label for _, label, _ in rows], dtype=np.int64),
        is_test=None if test is None else parts == 1,
        is_validation=parts == 2,
        notes=tuple(notes),
        findings=tuple(walk.findings.values()),
    )


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Return the key that sorts "2" before "10": runs of digits compare as numbers, before any letter."""
    parts = re.split(r"([0-9]+)", name)  # every second one is a run of digits
    key = [(1, part.casefold()) if place % 2 == 0 else (0, int(part)) for place, part in enumerate(parts) if part]
    return key, name  # names that differ only in case or leading zeros still have one order


def _class_files(folder: Path, walk: FolderWalk) -> Files:
    """Return the sorted image paths, relative to the root, of each class folder, in the order of the classes."""
    merged: Files = defaultdict(list)
    for subfolder in walk.subfolders(folder):
        merged[class_name(subfolder)] += map(walk.relative, _without_masks(subfolder, walk))
    return {name: sorted(merged[name]) for name in sorted(merged, key=natural_key)}


def _without_masks(class_folder: Path, walk: FolderWalk) -> list[str]:
    """Return the images of a class without the masks of others: called or filed as one beside an image of that name."""
    files = [(path, *os.path.split(os.path.splitext(path)[0])) for path in walk.images(class_folder)]
    places = {(folder, stem) for _, folder, stem in files}
    folders = {folder: os.path.basename(folder) for folder, _ in places}
    # the class itself may be called so: with_mask
    mask_folders = {folder for folder, name in folders.items() if name != class_folder.name and is_mask_name(name)}
    images = {stem for folder, stem in places if folder not in mask_folders} if mask_folders else set()
    kept = []
    for path, folder, stem in files:
        masked = masked_name(stem)
        if masked and (folder, masked) in places:
            walk.leave_out(path, MASK, f"of {masked} by its name")
        elif folder in mask_folders and (masked or stem) in images:
            walk.leave_out(path, MASK, f"of an image of that name, by its folder {folders[folder]}")
        else:
            kept.append(path)
    return kept


def _check_classes(folder: Path, files: Files, walk: FolderWalk) -> None:
    """Raise UserError unless there are two class folders, and an image in one."""
    if not files:
        images = len(walk.direct_images(folder))
        got = f"{format_number_of(images, 'image')} directly in the folder" if images else "an empty folder"
        if not images and any(folder.iterdir()):
            got = "files that are no images"
        tables = sorted(path.name for place in (folder, folder.parent) for path in place.glob("*.csv"))
        hint = (
            f"; labels in a table ({tables[0]}) are not read: move each image to a folder of its class"
            if tables
            else ""
        )
        raise UserError(f"{folder}: {EXPECTED_FOLDER}, got {got}{hint if images else ''}")
    filled = [subfolder for subfolder in walk.subfolders(folder) if files[class_name(subfolder)]]
    if len(files) == 1 or len(filled) == 1:
        only = (filled or walk.subfolders(folder))[0]
        inner = only
        while len(subfolders := walk.subfolders(inner)) == 1:
            inner = subfolders[0]
        hint = f"; did you mean {inner}?" if len(subfolders) >= 2 else ""
        if len(files) == 1 or hint:
            raise UserError(f"{folder}: expected two classes or more, got only {class_name(only)!r}{hint}")
    if not any(files.values()):
        raise UserError(f"{folder}: {EXPECTED_FOLDER}, got no images ({FORMAT_EXAMPLES})")


def _split_by_class(files: Files, folder: Path, walk: FolderWalk) -> tuple[Files, Files, Files]:
    """Return the files to train on, to test and to choose by of DIR/<class>/train beside DIR/<class>/test and val."""
    depth = len(folder.relative_to(walk.root).parts) + 1
    train: Files = {}
    test: Files = {}
    validation: Files = {}
    for name, paths in files.items():
        inside = {path: path.split("/")[depth] for path in paths if path.count("/") > depth}
        parts = find_splits(inside.values())
        wanted = "test" if "test" in parts.values() else "val"
        by_part: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            by_part[parts.get(inside.get(path, ""), "")].append(path)
        train[name], test[name], validation[name] = (by_part.pop(part, []) for part in ("train", wanted, "val"))
        for path in (path for rest in by_part.values() for path in rest):
            walk.leave_out(os.fspath(walk.root / path), NO_LABEL, f"it lies beside train and {wanted}")
    return train, test, validation


def _other_parts(layout: Layout, train: Files, walk: FolderWalk, notes: list[str]) -> tuple[Files | None, Files]:
    """Return the test images by class, or None where there are none with labels, and those of a val folder beside them.

    What is not used is added to the notes.

    Raises:
        UserError: the test images have a class that cannot be learned, or there is none.
    """
    test: Files | None = None
    validation: Files = {}
    places: list[Path] = []
    for part, top in layout.tests:
        is_validation = test is not None and part == "val" and not validation
        if test is not None and not is_validation:
            count = sum(1 for _ in walk.images(top))
            chosen = f", {places[1]} is to choose by" if len(places) > 1 else ""
            final = f"{places[0]} gives the final figure{chosen}"
            notes.append(f"{top} is not used ({format_number_of(count, 'image')}): {final}")
            continue
        if not any(top.iterdir()):
            notes.append(f"{top} is empty")
            continue
        folder = descend_to_classes(top, list(train), walk)
        found = _labelled_files(folder, part, layout, train, walk, notes, is_validation=is_validation)
        if found is not None:
            places.append(folder)
            test, validation = (test, found) if is_validation else (found, validation)
    return test, validation


def _labelled_files(
    folder: Path,
    part: str,
    layout: Layout,
    train: Files,
    walk: FolderWalk,
    notes: list[str],
    *,
    is_validation: bool,
) -> Files | None:
    """Return the images of a part by class; None where they have no labels, and of a validation part no known ones.

    Raises:
        UserError: the test images have a class that cannot be learned, or there is none.
    """
    files = _match_classes(_class_files(folder, walk), train, folder, notes)
    known = {name: paths for name, paths in files.items() if name in train}
    unknown = [name for name, paths in files.items() if paths and name not in known]
    direct = walk.direct_images(folder)
    if not known and (unknown or direct):
        names = f" (its folders are called {', '.join(unknown[:3])})" if unknown else ""
        count = len(direct) + sum(len(files[name]) for name in unknown)
        notes.append(
            f"{folder} is not used: {format_number_of(count, 'image')} without a label, as none lies in a folder "
            f"called like a class{names}"
        )
        return None
    for path in direct:
        walk.leave_out(path, NO_LABEL, f"it lies beside the folders of the classes in {part}")
    for name in [name for name in unknown if is_validation or is_unlabelled(name)]:
        unlabelled = format_number_of(len(files[name]), "image")
        reason = "without a label" if is_unlabelled(name) else f"of a class that is not in {layout.train}"
        notes.append(f"{folder / name} is not used: {unlabelled} {reason}")
        unknown.remove(name)
    if unknown:
        few = ", ".join(list(train)[:8]) + (", ..." if len(train) > 8 else "")
        raise UserError(
            f"{folder}: class {unknown[0]!r} is not in {layout.train}, so it cannot be recognised; "
            f"rename or remove it (classes to learn: {few})"
        )
    if not any(known.values()):
        if is_validation:
            notes.append(f"{folder} is not used: its folders hold no images")
            return None
        raise UserError(f"{folder}: expected test images in class folders, got no images")
    return known


def _match_classes(files: Files, train: Files, folder: Path, notes: list[str]) -> Files:
    """Return the files by the names that the classes have in training, where only case or spaces differ."""
    by_folded: dict[str, list[str]] = defaultdict(list)
    for name in train:
        by_folded[folded_name(name)].append(name)
    matched: Files = defaultdict(list)
    for name, paths in files.items():
        similar = by_folded[folded_name(name)]
        if name not in train and len(similar) == 1:
            notes.append(f"{folder / name} is taken for the class {similar[0]!r}, which is written so in training")
            matched[similar[0]] += paths
        else:
            matched[name] += paths
    return dict(matched)


def _similar_names(classes: Iterable[str]) -> list[str]:
    """Return a sentence for classes whose names differ in case, spaces or marks between words only."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        groups[folded_name(name)].append(name)
    return [
        f"{' and '.join(map(repr, group))} are different classes: if they are one, put their images into one folder"
        for group in groups.values()
        if len(group) > 1
    ]
