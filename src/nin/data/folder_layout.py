"""The layout of an image folder: which folder holds the classes for training, and which the test images."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nin.data.folder_entries import FolderWalk, device_and_inode
from nin.data.split_names import find_splits, is_mask_name
from nin.errors import UserError
from nin.names import EXPECTED_FOLDER


class Layout(NamedTuple):
    """Where the classes of an image folder lie.

    Attributes:
        train: the folder that holds a folder for each class.
        tests: those that may hold test images, the one to use first, and the part that each is by its name.
        by_class: each class folder holds the parts, as in DIR/<class>/train.
        notes: what is not used, in sentences for the user.
    """

    train: Path
    tests: tuple[tuple[str, Path], ...]
    by_class: bool
    notes: tuple[str, ...]


def find_layout(root: Path, walk: FolderWalk) -> Layout:
    """Find the folders of a set, one level below each other or more.

    Raises:
        UserError: there is no such folder.
    """
    if not root.exists():
        raise UserError(f"{root}: there is no such file or folder; {EXPECTED_FOLDER}")
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder, got a file; {EXPECTED_FOLDER}")
    notes: list[str] = []
    folder, found = root, _find_parts(root, walk)
    while found is None:
        holder = _part_holder(folder, walk, set())
        if holder is None:
            return Layout(root, (), _is_split_by_class(root, walk), (*_equal_names(root, walk),))
        notes += [
            f"{other} is not used{_count_text(other, walk)}: the parts of the set lie in {holder}"
            for other in walk.subfolders(folder)
            if other != holder and walk.has_image(other)
        ]
        folder, found = holder, _find_parts(holder, walk)
    if folder != root:
        notes.insert(0, f"{folder} is read: it holds the parts of the set")
    parts, others = found
    train = _descend(parts["train"][0], walk)
    rest = [*parts["train"][1:], *others]
    tests = [(part, path) for part in ("test", "val") for path in parts.get(part, ())]
    if not tests:
        # DIR/train beside a folder of another name with the same classes in it
        names = _class_names(train, walk)
        tests = [("test", other) for other in rest if names and _class_names(other, walk) & names == names]
        notes += [f"{path} is taken for the test images: it holds folders of the same names" for _, path in tests[:1]]
    used = {path for _, path in tests}
    notes += [
        f"{other} is not used{_count_text(other, walk)}: it is beside {parts['train'][0].name}"
        for other in rest
        if other not in used
    ]
    return Layout(train, tuple(tests), False, tuple(notes))


def class_name(folder: Path) -> str:
    """Return the folder's name in the composed Unicode form: "é" is one class whichever system wrote it."""
    return unicodedata.normalize("NFC", folder.name)


def descend_to_classes(folder: Path, classes: Sequence[str], walk: FolderWalk) -> Path:
    """Return the folder that holds the classes of a test set: the one inside, where it alone holds images."""
    inner = [subfolder for subfolder in walk.subfolders(folder) if walk.has_image(subfolder)]
    if len(inner) != 1 or class_name(inner[0]) in classes or walk.direct_images(folder):
        return folder
    known = _class_names(inner[0], walk) & set(classes)
    return inner[0] if known else folder


def _find_parts(root: Path, walk: FolderWalk) -> tuple[dict[str, list[Path]], list[Path]] | None:
    """Return the folders of each part and the other ones, or None where the folders in root are no parts."""
    folders = walk.subfolders(root)
    names = find_splits(folder.name for folder in folders)
    parts: dict[str, list[Path]] = {}
    for folder in folders:
        if part := names.get(folder.name):
            parts.setdefault(part, []).append(folder)
    others = [folder for folder in folders if folder.name not in names]
    if "train" not in parts:
        return None
    if len(parts) == 1 and others and not _is_train_only(_descend(parts["train"][0], walk), others, walk):
        return None
    return parts, others


def _is_train_only(train: Path, others: Sequence[Path], walk: FolderWalk) -> bool:
    """Return whether a folder called train is the set beside others, and not a class: pictures of trains."""
    names = _class_names(train, walk)
    if len(names) < 2 or walk.direct_images(train) or _is_split_by_class(others[0].parent, walk):
        return False
    inside = [_class_names(other, walk) for other in others]
    return not all(inside) or any(names & found for found in inside)


def _part_holder(folder: Path, walk: FolderWalk, seen: set[tuple[int, int]]) -> Path | None:
    """Return the folder in a folder that alone holds the parts of a set, itself or in a folder of its own, or None.

    A single folder with images may hold parts without classes. One beside others may be a class that holds them.

    Args:
        folder: where to look.
        walk: lists folders.
        seen: the device and inode of each folder that was looked at: links may lead round.
    """
    inner = [subfolder for subfolder in walk.subfolders(folder) if walk.has_image(subfolder)]
    holders = []
    for subfolder in inner:
        if (identity := device_and_inode(subfolder)) in seen:
            continue
        seen.add(identity)
        found = _find_parts(subfolder, walk)
        if found is None:
            is_holder = _part_holder(subfolder, walk, seen) is not None
        else:
            is_holder = len(inner) == 1 or len(_class_names(_descend(found[0]["train"][0], walk), walk)) > 1
        if is_holder:
            holders.append(subfolder)
    return holders[0] if len(holders) == 1 else None


def _descend(train: Path, walk: FolderWalk) -> Path:
    """Return the folder that holds the classes: DIR/train/train where that is all that DIR/train holds."""
    inner = walk.subfolders(train)
    while len(inner) == 1 and len(walk.subfolders(inner[0])) > 1 and not walk.direct_images(train):
        train = inner[0]
        inner = walk.subfolders(train)
    return train


def _class_names(folder: Path, walk: FolderWalk) -> set[str]:
    return {class_name(subfolder) for subfolder in walk.subfolders(folder) if walk.has_image(subfolder)}


def _is_split_by_class(root: Path, walk: FolderWalk) -> bool:
    """Return whether every class folder holds the parts of a set."""
    classes = [folder for folder in walk.subfolders(root) if walk.has_image(folder)]
    inside = [find_splits(inner.name for inner in walk.subfolders(folder)) for folder in classes]
    return len(classes) > 1 and all({"train"} < set(parts.values()) for parts in inside)


def _equal_names(root: Path, walk: FolderWalk) -> list[str]:
    """Return a sentence where the folders that would be the classes hold folders of the same names."""
    inside = {
        folder.name: frozenset(name for name in _class_names(folder, walk) if not is_mask_name(name))
        for folder in walk.subfolders(root)
    }
    same = [name for name, found in inside.items() if len(found) > 1 and list(inside.values()).count(found) > 1]
    if len(same) < 2 or len(same) < len(inside) or _is_split_by_class(root, walk):
        return []
    names = sorted(inside[same[0]])
    return [
        f"The classes {', '.join(same[:4])} hold folders of the same names ({', '.join(names[:4])}): if those are the "
        f"classes, and {' and '.join(same[:2])} are parts of the set, call the parts train and test"
    ]


def _count_text(folder: Path, walk: FolderWalk) -> str:
    count = sum(1 for _ in walk.images(folder))
    return f" ({count:,} image{'' if count == 1 else 's'})" if count else ""
