"""Read WebDataset shards: tar files whose members are KEY.jpg (or .png, …) beside KEY.cls, KEY.json or KEY.txt.

Not the webdataset package's pipeline, which streams shards through a shuffle buffer: there the order depends on the
number of workers, and going on in the middle of an epoch means to read it again from its beginning. Here an index of
the tar members gives random access. The package is needed for URLs only.
"""

import bz2
import contextlib
import dataclasses
import glob
import gzip
import json
import lzma
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from nin.data.cache import cache_folder, digest, file_state
from nin.data.dataset import Data, DecodedSet, LoadOptions, PathList, default_size
from nin.data.decoder import DecodeError, decode_photo, decode_pixels, read_extent, read_header
from nin.data.findings import NO_IMAGE, NO_LABEL, Finding
from nin.data.folder_entries import FolderWalk
from nin.data.folder_listing import natural_key
from nin.data.held_set import hold
from nin.data.image_formats import FORMAT_EXAMPLES
from nin.data.sampler import stratified_holdout
from nin.data.split_names import find_splits
from nin.data.tar_index import index_tar
from nin.data.value_range import Pixels, ValueRange, choose_range
from nin.errors import UserError
from nin.names import SHARD_SUFFIXES, SHARDS_FILE
from nin.runtime.files import open_atomically
from nin.version import install_command

_COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}

# Size and channels of all images are taken from the headers of so many.
_SAMPLED_HEADERS = 1000

# So many classes may have no names: a label is a number of nine digits at most, and each class takes memory.
_MAX_UNNAMED_CLASSES = 100_000
_LARGEST_LABEL = 2**31 - 1

# With more different texts than this, and than half of the images, .txt members are captions.
_FEW_TEXTS = 20


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ShardSet(DecodedSet):
    """Labelled images in tar files, read at their offsets each time they are fetched.

    An index says where each image lies, so access is random: the order of a training over shards is the same function
    of seed and epoch as over files, it resumes in the middle of an epoch, and no image is dropped or repeated however
    many processes read. The index takes 40 bytes an image and those of the name.

    Attributes:
        shards: the tar files.
        titles: their names, which those of compressed ones or behind URLs are not any more.
        shard_indices: int32 (N,), the position in shards of the one that holds each image.
        members: offset, size and label of each image, (N,).
        labels: int64 (N,), -1 where there is none.
        names: SHARD/MEMBER of each image.
        label_names: the classes where labels are names and not numbers, in natural order.
        findings: what is left out of the archives.
        hint: why there are no labels, where a member should hold one.
    """

    shards: tuple[Path, ...]
    titles: tuple[str, ...]
    shard_indices: NDArray[np.int32]
    members: NDArray[np.void]
    channels: int = 3
    size: int = 32
    label_names: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    hint: str = ""

    def read(self, index: int) -> bytes:
        """Return the bytes of the image file at an index.

        Raises:
            DecodeError: the shard cannot be read any more.
        """
        path, member = self.shards[self.shard_indices[index]], self.members[index]
        try:
            with path.open("rb") as file:  # each time: there may be more shards than a process may hold open
                return os.pread(file.fileno(), int(member["size"]), int(member["offset"]))
        except OSError as error:
            raise DecodeError(self.names[index], f"cannot be opened ({error.strerror})") from error

    def decode(self, index: int) -> Pixels:
        """Decode one image: (channels, size, size)."""
        return self._decode(decode_pixels, index)

    def photo(self, index: int) -> Pixels:
        """Decode one whole image: (H, W, channels)."""
        return self._decode(decode_photo, index)

    def _decode(self, decode: Callable[..., Pixels], index: int) -> Pixels:
        name = self.names[index]
        try:
            return decode(self.read(index), name=name, **self.decoding)
        except DecodeError as error:
            raise DecodeError(name, error.reason) from error

    def select(self, indices: torch.Tensor) -> Self:
        """Return the images at the indices, int64 (K,), in their order."""
        rows = indices.numpy()
        return dataclasses.replace(
            super().select(indices), shard_indices=self.shard_indices[rows], members=self.members[rows]
        )


def is_shards(source: str | Path) -> bool:
    """Return whether a source names shards: a tar file, a pattern or URL of tar files, or a folder of them.

    A folder that has images in its folders is an image folder, and a tar file in it one that somebody left there.
    """
    if not os.path.isdir(source):
        return str(source).endswith(SHARD_SUFFIXES)
    if not _tar_files(source):
        return False
    walk = FolderWalk(Path(source))
    return not any(walk.has_image(folder) for folder in walk.subfolders(Path(source)))


def open_shards(source: str | Path) -> ShardSet:
    """Index shards.

    Args:
        source: a folder of tar files, one of them, a pattern ("DIR/train-{000000..000009}.tar", "DIR/*.tar"), or a URL
            that the webdataset package reads; what a URL names is copied to the cache folder first, and so is the
            content of a compressed one.

    Returns:
        Their images, in the order of the shards and of the members in them.

    Raises:
        UserError: there are none, or one is no tar file, damaged or cut off.
    """
    urls = _expand(source)
    fetched = [_local_path(url) for url in urls]
    shards = tuple(_unpacked(path) for path in fetched)
    indices = [index_tar(path) for path in shards]
    titles = tuple(path.name for path in fetched)
    if len(set(titles)) < len(titles):  # those of train and test, each in its folder
        titles = tuple(f"{path.parent.name}/{path.name}" for path in fetched)
    found = list(zip(titles, indices, strict=True))
    names = PathList(f"{title}/{name}" for title, index in found for name in index.names)
    if not names:
        raise UserError(f"{source}: the shards hold no images ({FORMAT_EXAMPLES})")
    texts = sorted({text for index in indices for text in index.labels}, key=natural_key)
    if any(index.is_text for index in indices) and len(texts) > max(_FEW_TEXTS, len(names) / 2):
        raise UserError(
            f"{source}: the .txt members hold {len(texts):,} different texts for {len(names):,} images, which are no "
            "classes; expected .cls members"
        )
    is_numeric = all(text.isdecimal() for text in texts)
    values = {text: min(int(text), _LARGEST_LABEL) if is_numeric else position for position, text in enumerate(texts)}
    labels = [np.array([*(values[text] for text in index.labels), -1])[index.members["label"]] for index in indices]
    empty = [Finding(title, NO_IMAGE, "a shard without images") for title, index in found if not index.names]
    return ShardSet(
        shards=shards,
        titles=tuple(os.path.basename(url) if is_url(url) else title for url, title in zip(urls, titles, strict=True)),
        shard_indices=np.repeat(np.arange(len(shards), dtype=np.int32), [len(index.names) for index in indices]),
        members=np.concatenate([index.members for index in indices]),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        names=names,
        label_names=() if is_numeric else tuple(texts),
        findings=(
            *(Finding(f"{title}/{f.path}".rstrip("/"), f.kind, f.detail) for title, i in found for f in i.findings),
            *empty,
        ),
        hint=next((index.hint for index in indices if index.hint), ""),
    )


def read_shards(source: str | Path, options: LoadOptions) -> Data:
    """Return shards as Data; see `nin.data.load`.

    A folder with shards called train-*.tar and test-*.tar (or val-*.tar) is split so, and where both are there val is
    the validation part; else each class is.
    """
    shards, classes, findings = open_labelled(source)
    channels, size, value_range = _preprocessing(shards, options)
    how: dict[str, Any] = {"value_range": value_range, "resize": options.resize}
    shards = dataclasses.replace(shards, channels=channels, size=size, **how)
    is_test, is_validation = part_masks(shards, options)
    train, test, validation = (
        shards.select(torch.from_numpy(np.flatnonzero(part)))
        for part in (~(is_test | is_validation), is_test, is_validation)
    )
    if not len(train) or not len(test):
        raise UserError(f"{source}: no image is left for {'testing' if len(train) else 'training'}")
    name = Path(source).name.removesuffix(".tar")
    notes = class_notes(classes, train.labels)
    held = hold(train, test, validation, limit=options.memory_limit_bytes)
    how["validation"] = held[2] if len(validation) else None
    return Data.from_sets(name, held[0], held[1], classes, findings=findings, notes=notes, **how)


def open_labelled(source: str | Path) -> tuple[ShardSet, tuple[str, ...], tuple[Finding, ...]]:
    """Index shards for a training.

    Returns:
        The images that have a label, the names of the classes, and what is left out.

    Raises:
        UserError: no image has a label, or the labels are no classes.
    """
    shards = open_shards(source)
    labels = shards.labels.numpy()
    without = np.flatnonzero(labels < 0)
    if len(without) == len(labels):
        hint = f" ({shards.hint})" if shards.hint else ""
        raise UserError(
            f"{source}: {shards.names[0]} has no label{hint}; expected a member of the same name ending in .cls, .json "
            "or .txt"
        )
    names = _class_names(source)
    if names and shards.label_names:
        raise UserError(f"{source}: expected numbers as labels beside {SHARDS_FILE}, got {shards.label_names[0]!r}")
    largest = int(labels.max())
    numbers = tuple(map(str, range(min(largest + 1, _MAX_UNNAMED_CLASSES))))
    classes = tuple(names) or shards.label_names or numbers
    if largest >= len(classes):
        raise UserError(f"{source}: label {largest} does not fit {len(classes)} classes")
    if len(classes) < 2:
        raise UserError(f"{source}: expected two classes or more, got only {classes[0]!r}")
    unlabelled = (Finding(shards.names[i], NO_LABEL, "no .cls, .json or .txt member has one") for i in without.tolist())
    return shards.select(torch.from_numpy(np.flatnonzero(labels >= 0))), classes, (*unlabelled, *shards.findings)


def class_notes(classes: Sequence[str], labels: torch.Tensor) -> tuple[str, ...]:
    """Return a sentence where there are classes without an image to train on."""
    counts = torch.bincount(labels, minlength=len(classes))
    empty = int((counts == 0).sum())
    return (f"{empty:,} of {len(classes):,} classes have no image to train on",) if empty else ()


def _class_names(source: str | Path) -> list[str]:
    """Return the names of the classes that nin wrote beside its shards; none for those of others."""
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    path = folder / SHARDS_FILE
    if not path.is_file():
        return []
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))["classes"]
        if not all(isinstance(name, str) for name in classes):
            raise TypeError("classes must be names")
        return list(classes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no {SHARDS_FILE} of nin: {error}") from error


def _preprocessing(shards: ShardSet, options: LoadOptions) -> tuple[int, int, ValueRange | None]:
    """Return channels, size and value range from images spread evenly over the shards."""
    headers, extents = [], []
    for index in range(0, len(shards), max(1, len(shards) // _SAMPLED_HEADERS)):
        # training lists what cannot be read when it gets there; the headers of the others are enough here
        with contextlib.suppress(DecodeError):
            content, name = shards.read(index), shards.names[index]
            headers.append(read_header(content, name))
            if headers[-1].wide:
                extents.append(read_extent(content, name))
    if not headers:
        raise UserError(f"{shards.shards[0]}: none of the images looked at can be read")
    widths, heights = (np.array([getattr(h, side) for h in headers]) for side in ("width", "height"))
    channels = 1 if all(h.grey for h in headers) else 3
    size = options.size or default_size(widths, heights, images=len(shards))
    if options.value_range != "auto":
        return channels, size, options.value_range
    depths, lows, highs = (np.array([getattr(e, field) for e in extents]) for field in ("depth", "low", "high"))
    return channels, size, choose_range(depths, lows, highs) if extents else None


def part_masks(shards: ShardSet, options: LoadOptions) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which images are for testing, and which to choose by, bool (N,) each.

    Those of shards called test or val are for testing, else a part of each class. Where there are both, val is to
    choose by.
    """
    names = find_splits(shards.titles)
    parts = np.array([names.get(title, "train") for title in shards.titles])[shards.shard_indices]
    is_test, is_val = parts == "test", parts == "val"
    if is_test.any() and not is_test.all():
        return is_test, is_val & ~(is_test | is_val).all()
    if is_val.any() and not is_val.all():
        return is_val, np.zeros_like(is_val)
    labels = shards.labels.tolist()
    held_out = stratified_holdout(shards.names, labels, fraction=options.test_fraction, seed=options.seed)
    return held_out, np.zeros_like(is_val)


def _tar_files(folder: str | Path) -> list[str]:
    """Return the tar files in a folder, or in the folders of its parts: train and test."""
    paths = [path for path in Path(folder).iterdir() if not path.name.startswith(".")] if os.path.isdir(folder) else []
    found = sorted(str(path) for path in paths if path.name.endswith(SHARD_SUFFIXES))
    parts = find_splits(path.name for path in paths if path.is_dir()) if not found else {}
    return found or [path for part in sorted(parts) for path in _tar_files(Path(folder) / part)]


def _expand(source: str | Path) -> list[str]:
    """Return the shards that a folder, a path, a pattern or a URL names."""
    text = str(source)
    if os.path.isdir(text):
        return _tar_files(text)
    found = list(_expand_braces(text))
    if not is_url(text):
        found = [path for pattern in found for path in (sorted(glob.glob(pattern)) or [pattern])]
        for path in found:
            if not os.path.isfile(path):
                raise UserError(f"{path}: there is no such shard")
    return found


def _unpacked(path: Path) -> Path:
    """Return a shard, or the copy of a compressed one in the cache folder: only there an image has an offset.

    Raises:
        UserError: it is damaged, or the copy cannot be written.
    """
    with path.open("rb") as file:
        start = file.read(6)
    opener = next((module.open for signature, module in _COMPRESSIONS.items() if start.startswith(signature)), None)
    if opener is None:
        return path
    name = digest(file_state(path.resolve(), path.stat()), size=12).hex()
    copy = cache_folder() / "shards" / f"{name}-{path.name.partition('.')[0]}.tar"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with opener(path, "rb") as source, open_atomically(copy) as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path}: cannot be unpacked to {copy.parent} ({error})") from error
    return copy


def _expand_braces(text: str) -> Iterator[str]:
    """Yield the texts that {000..012} and {a,b} stand for, as the shell does."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        yield text
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        choices: Sequence[str] = [f"{n:0{width}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expand_braces(text[: match.start()] + choice + text[match.end() :])


def is_url(text: str) -> bool:
    """Return whether a text begins as a URL does."""
    return re.match(r"[a-z][a-z0-9+]*:", text) is not None


def _local_path(url: str) -> Path:
    """Return the path of a shard; download one behind a URL to the cache folder, whole or not at all."""
    if not is_url(url):
        return Path(url)
    name = digest(url.encode(), size=12).hex()
    path = cache_folder() / "shards" / f"{name}-{os.path.basename(url)}"
    if path.exists():
        return path
    try:
        from webdataset.gopen import gopen
    except ImportError as error:
        raise UserError(f"{url}: reading shards from URLs needs: {install_command('shards')}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with gopen(url) as source, open_atomically(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
            source.close()  # raises where the program behind a pipe failed: before the shard is in its place
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{url}: cannot be fetched ({error})") from error
    return path
