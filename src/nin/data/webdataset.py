"""Images in WebDataset shards: tar files whose members are KEY.jpg (or .png, …) beside KEY.cls, the label."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nin.data.builtin import cache_folder
from nin.data.cache import cache_path, read_cache, write_cache
from nin.data.dataset import DecodedSet, PathList
from nin.data.decoder import IMAGE_EXTENSIONS, decode_pixels
from nin.distribution import install_command
from nin.errors import UserError

# Beside the shards that nin wrote: what cannot be seen in them.
METADATA_FILE = "nin-shards.json"

_PART = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
_INDEX_VERSION = 2  # raised when _PART or what _index keeps changes
_LABEL_BYTES = 32  # of a .cls: a number


@dataclass(frozen=True, eq=False)
class ShardSet(DecodedSet):
    """Labelled images in tar files, read at their places each time they are asked for.

    An index says where each image lies, so any image can be read at any time: the order of a training over shards is
    the same function of seed and epoch as over files, it goes on in the middle of an epoch, and no image is dropped or
    repeated however many read. It takes 40 bytes an image and those of the name.

    Attributes:
        shards: the tar files.
        shard: int32 (N,), the position in shards of the one that holds each image.
        places: offset and size of each image.
        labels: int64 (N,), -1 where there is none.
        names: SHARD/MEMBER of each image.
        channels: 1 or 3, of the decoded images.
        size: height and width of the decoded images in pixels.
    """

    shards: tuple[Path, ...]
    shard: NDArray[np.int32]
    places: NDArray[np.void]
    labels: Tensor
    names: PathList
    channels: int = 3
    size: int = 32

    def read(self, index: int) -> bytes:
        """Return the bytes of the image file at an index.

        Raises:
            UserError: the shard cannot be read any more.
        """
        path, place = self.shards[self.shard[index]], self.places[index]
        try:
            with path.open("rb") as file:
                return os.pread(file.fileno(), int(place["size"]), int(place["offset"]))
        except OSError as error:
            raise UserError(f"{self.names[index]}: cannot be opened ({error.strerror})") from error

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Return one decoded image, (channels, size, size).

        Raises:
            UserError: it cannot be read.
        """
        try:
            return decode_pixels(self.read(index), size=self.size, channels=self.channels)
        except UserError as error:
            raise UserError(f"{self.names[index]}: {str(error).removeprefix('image bytes: ')}") from error

    def select(self, indices: NDArray[np.int64]) -> ShardSet:
        """Return the images at the indices, in their order."""
        labels, names = self.labels[torch.from_numpy(indices)], self.names.select(indices)
        return ShardSet(self.shards, self.shard[indices], self.places[indices], labels, names, self.channels, self.size)


def is_shards(source: str | Path) -> bool:
    """Return whether a source names shards: a tar file, a pattern or URL of tar files, or a folder of them."""
    text = str(source)
    return text.endswith(".tar") or (os.path.isdir(text) and bool(glob.glob(os.path.join(glob.escape(text), "*.tar"))))


def open_shards(source: str | Path) -> ShardSet:
    """Index shards.

    Args:
        source: a folder of tar files, one of them, a pattern ("DIR/train-{000000..000009}.tar", "DIR/*.tar"), or a URL
            that the webdataset package reads; what a URL names is copied to the cache folder first.

    Returns:
        Their images, in the order of the shards and of the members in them.

    Raises:
        UserError: there are none, or one is no tar file.
    """
    paths = [_local(url) for url in _expand(source)]
    shard, places, names = [], [], []
    for number, path in enumerate(paths):
        found_places, found = _index(path)
        shard.append(np.full(len(found), number, dtype=np.int32))
        places.append(found_places)
        names += [f"{path.name}/{name}" for name in found]
    if not names:
        raise UserError(f"{source}: the shards hold no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
    where = np.concatenate(places)
    labels = torch.from_numpy(where["label"].astype(np.int64))
    return ShardSet(tuple(paths), np.concatenate(shard), where, labels, PathList(names))


def shard_classes(source: str | Path) -> dict[str, list[str]]:
    """Return what is written beside shards of ours: the names of the classes. Empty for those of others."""
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    path = folder / METADATA_FILE
    if not path.is_file():
        return {}
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))["classes"]
        if not all(isinstance(name, str) for name in classes):
            raise TypeError("classes must be names")
        return {"classes": list(classes)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no {METADATA_FILE} of nin: {error}") from error


def _expand(source: str | Path) -> list[str]:
    """Return the shards that a folder, a path, a pattern or a URL names."""
    text = str(source)
    if os.path.isdir(text):
        return sorted(glob.glob(os.path.join(glob.escape(text), "*.tar")))
    found = list(_braces(text))
    if not is_url(text):
        found = [path for pattern in found for path in (sorted(glob.glob(pattern)) or [pattern])]
        for path in found:
            if not os.path.isfile(path):
                raise UserError(f"{path}: there is no such shard")
    return found


def _braces(text: str) -> Iterator[str]:
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
        yield from _braces(text[: match.start()] + choice + text[match.end() :])


def is_url(text: str) -> bool:
    """Return whether a text begins as a URL does."""
    return re.match(r"[a-z][a-z0-9+]*:", text) is not None


def _local(url: str) -> Path:
    """Return the path of a shard; one behind a URL is copied to the cache folder, whole or not at all."""
    if not is_url(url):
        return Path(url)
    name = hashlib.blake2b(url.encode(), digest_size=12).hexdigest()
    path = cache_folder() / "shards" / f"{name}-{os.path.basename(url)}"
    if path.exists():
        return path
    try:
        from webdataset.gopen import gopen
    except ImportError as error:
        raise UserError(f"{url}: reading shards from URLs needs: {install_command('shards')}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with gopen(url) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        os.replace(partial, path)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{url}: cannot be fetched ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _index(path: Path) -> tuple[NDArray[np.void], list[str]]:
    """Return places and names of the images in a shard, from the cache folder or from the tar file's headers."""
    found = path.stat()
    text = f"{path.resolve()}\0{found.st_size}\0{found.st_mtime_ns}"
    memory = cache_path(text, _INDEX_VERSION)
    kept = read_cache(memory)
    if kept is None:
        places, names = _scan(path)
        lines = "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")
        write_cache(memory, len(places).to_bytes(8, "little") + places.tobytes() + lines)
        return places, names
    places = np.frombuffer(kept, dtype=_PART, count=int.from_bytes(kept[:8], "little"), offset=8)
    return places, kept[8 + places.nbytes :].decode(errors="surrogateescape").split("\n")[:-1]


def _scan(path: Path) -> tuple[NDArray[np.void], list[str]]:
    """Read the headers of a tar file, and the labels; nothing is unpacked."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                key, extension = os.path.splitext(member.name)
                if not member.isreg() or "\n" in member.name:
                    continue
                if extension.lower() in IMAGE_EXTENSIONS:
                    images.setdefault(key, (member.name, member.offset_data, member.size))
                elif extension == ".cls" and member.size <= _LABEL_BYTES:
                    text = os.pread(file.fileno(), member.size, member.offset_data)
                    labels[key] = int(text) if re.fullmatch(rb"\s*\d{1,9}\s*", text) else -1
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: no tar file, or damaged ({error})") from error
    rows = [(offset, size, labels.get(key, -1)) for key, (_, offset, size) in images.items()]
    return np.array(rows, dtype=_PART), [name for name, _, _ in images.values()]
