"""Read WebDataset shards: tar files whose members are KEY.jpg (or .png, …) beside KEY.cls, the label.

Not the webdataset package's pipeline, which streams shards through a shuffle buffer: there the order depends on the
number of workers, and going on in the middle of an epoch means to read it again from its beginning. Here an index of
the tar members gives random access. The package is needed for URLs only.
"""

import contextlib
import dataclasses
import glob
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nin.data.cache import cache_folder, cache_path, digest, file_state, read_cache, write_cache
from nin.data.dataset import Data, DecodedSet, LoadOptions, PathList, default_size
from nin.data.decoder import IMAGE_EXTENSIONS, DecodeError, Pixels, decode_pixels, read_header
from nin.data.sampler import stratified_holdout
from nin.errors import UserError
from nin.runtime.files import open_atomically
from nin.version import install_command

# Beside the shards that nin wrote: the names of the classes, which tar files do not hold.
METADATA_FILE = "nin-shards.json"

# Offset and size of an image in its tar file, in bytes, and its label, -1 where there is none.
_MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
_INDEX_VERSION = 2  # increased when _MEMBER or what _index writes changes
_MAX_LABEL_BYTES = 32  # of a .cls: a number

# Size and channels of all images are taken from the headers of so many.
_SAMPLED_HEADERS = 1000

# So many classes may have no names: a label is a number of nine digits at most, and each class takes memory.
_MAX_UNNAMED_CLASSES = 100_000


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ShardSet(DecodedSet):
    """Labelled images in tar files, read at their offsets each time they are fetched.

    An index says where each image lies, so access is random: the order of a training over shards is the same function
    of seed and epoch as over files, it resumes in the middle of an epoch, and no image is dropped or repeated however
    many processes read. The index takes 40 bytes an image and those of the name.

    Attributes:
        shards: the tar files.
        shard_indices: int32 (N,), the position in shards of the one that holds each image.
        members: offset, size and label of each image, (N,).
        labels: int64 (N,), -1 where there is none.
        names: SHARD/MEMBER of each image.
    """

    shards: tuple[Path, ...]
    shard_indices: NDArray[np.int32]
    members: NDArray[np.void]
    channels: int = 3
    size: int = 32

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
        try:
            return decode_pixels(self.read(index), size=self.size, channels=self.channels)
        except DecodeError as error:
            raise DecodeError(self.names[index], error.reason) from error

    def select(self, indices: NDArray[np.int64]) -> "ShardSet":
        """Return the images at the indices, in their order."""
        return dataclasses.replace(
            self,
            shard_indices=self.shard_indices[indices],
            members=self.members[indices],
            labels=self.labels[torch.from_numpy(indices)],
            names=self.names.select(indices),
        )


def is_shards(source: str | Path) -> bool:
    """Return whether a source names shards: a tar file, a pattern or URL of tar files, or a folder of them."""
    return str(source).endswith(".tar") or bool(_tar_files(source))


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
    shards = tuple(_local_path(url) for url in _expand(source))
    indices = [_index(path) for path in shards]
    names = PathList(f"{path.name}/{name}" for path, (_, found) in zip(shards, indices, strict=True) for name in found)
    if not names:
        raise UserError(f"{source}: the shards hold no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
    members = np.concatenate([members for members, _ in indices])
    return ShardSet(
        shards=shards,
        shard_indices=np.repeat(np.arange(len(shards), dtype=np.int32), [len(members) for members, _ in indices]),
        members=members,
        labels=torch.from_numpy(members["label"].astype(np.int64)),
        names=names,
    )


def read_shards(source: str | Path, options: LoadOptions) -> Data:
    """Return shards as Data; see `nin.data.load`.

    A folder with shards called train-*.tar and test-*.tar (or val-*.tar) is split so; else each class is.
    """
    shards = open_shards(source)
    labels = shards.labels.numpy()
    if (labels < 0).any():
        missing = shards.names[int(np.flatnonzero(labels < 0)[0])]
        raise UserError(f"{source}: {missing} has no label; expected a member of the same name ending in .cls")
    classes = tuple(_class_names(source) or map(str, range(min(int(labels.max()) + 1, _MAX_UNNAMED_CLASSES))))
    if labels.max() >= len(classes) or len(classes) < 2:
        raise UserError(f"{source}: label {labels.max()} does not fit {len(classes)} classes")
    channels, size = _channels_and_size(shards, options.size)
    shards = dataclasses.replace(shards, channels=channels, size=size)
    is_test = _test_mask(shards, labels, options)
    train, test = (shards.select(np.flatnonzero(is_test == part)) for part in (False, True))
    if not len(train) or not len(test):
        raise UserError(f"{source}: no image is left for {'testing' if len(train) else 'training'}")
    return Data.from_sets(Path(source).name.removesuffix(".tar"), train, test, classes)


def _class_names(source: str | Path) -> list[str]:
    """Return the names of the classes that nin wrote beside its shards; none for those of others."""
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    path = folder / METADATA_FILE
    if not path.is_file():
        return []
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))["classes"]
        if not all(isinstance(name, str) for name in classes):
            raise TypeError("classes must be names")
        return list(classes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no {METADATA_FILE} of nin: {error}") from error


def _channels_and_size(shards: ShardSet, size: int | None) -> tuple[int, int]:
    """Return channels and size from the headers of images spread evenly over the shards."""
    headers = []
    for index in range(0, len(shards), max(1, len(shards) // _SAMPLED_HEADERS)):
        # training lists what cannot be read when it gets there; the headers of the others are enough here
        with contextlib.suppress(DecodeError):
            headers.append(read_header(shards.read(index)))
    if not headers:
        raise UserError(f"{shards.shards[0]}: none of the images looked at can be read")
    widths, heights = (np.array([getattr(h, side) for h in headers]) for side in ("width", "height"))
    return 1 if all(h.grey for h in headers) else 3, size or default_size(widths, heights)


def _test_mask(shards: ShardSet, labels: NDArray[np.int64], options: LoadOptions) -> NDArray[np.bool_]:
    """Return which images are for testing, bool (N,): those of shards called test or val, else a part of each class."""
    names = np.array([path.name for path in shards.shards])
    for split in ("test", "val"):
        chosen = np.char.startswith(names, split)
        if chosen.any() and not chosen.all():
            return chosen[shards.shard_indices]
    return stratified_holdout(shards.names, labels.tolist(), fraction=options.test_fraction, seed=options.seed)


def _tar_files(folder: str | Path) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(str(folder)), "*.tar")))


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


def _index(path: Path) -> tuple[NDArray[np.void], list[str]]:
    """Return members and names of the images in a shard, from the cache or from the tar file."""
    cached_index = cache_path(file_state(path.resolve(), path.stat()), _INDEX_VERSION)
    content = read_cache(cached_index)
    if content is None:
        members, names = _read_members(path)
        lines = "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")
        write_cache(cached_index, len(members).to_bytes(8, "little") + members.tobytes() + lines)
        return members, names
    members = np.frombuffer(content, dtype=_MEMBER, count=int.from_bytes(content[:8], "little"), offset=8)
    return members, content[8 + members.nbytes :].decode(errors="surrogateescape").split("\n")[:-1]


def _read_members(path: Path) -> tuple[NDArray[np.void], list[str]]:
    """Return members and names of the images in a tar file, from its headers and the .cls members."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        # "r:" is no compression: in a compressed tar file nothing can be read at an offset
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                key, extension = os.path.splitext(member.name)
                if not member.isreg() or "\n" in member.name:
                    continue
                if extension.lower() in IMAGE_EXTENSIONS:
                    images.setdefault(key, (member.name, member.offset_data, member.size))
                elif extension == ".cls" and member.size <= _MAX_LABEL_BYTES:
                    text = os.pread(file.fileno(), member.size, member.offset_data)
                    labels[key] = int(text) if re.fullmatch(rb"\s*\d{1,9}\s*", text) else -1
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: no tar file, or damaged ({error})") from error
    rows = [(offset, size, labels.get(key, -1)) for key, (_, offset, size) in images.items()]
    return np.array(rows, dtype=_MEMBER), [name for name, _, _ in images.values()]
