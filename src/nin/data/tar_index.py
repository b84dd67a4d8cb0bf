"""Index a tar file of samples: where each image lies, its label, and what is left out."""

import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nin.data.cache import cache_path, file_state, read_cache, write_cache
from nin.data.findings import EXTRA, HIDDEN, NO_IMAGE, Finding
from nin.data.image_formats import named_format
from nin.errors import UserError

# Offset and size of an image in its tar file, in bytes, and its label: a position in `TarIndex.labels`, -1 for none.
MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
_INDEX_VERSION = 3  # increased when MEMBER or what is written beside it changes

# The members that hold a label, the one to take first; and the bytes that one of them may have. A longer text is none.
_LABEL_EXTENSIONS = {"cls": 256, "class": 256, "label": 256, "json": 1 << 20, "txt": 256}
_JSON_KEYS = ("label", "cls", "class", "class_id", "class_index", "label_id", "target", "category_id")
_JSON_NAMES = ("class_name", "label_name", "category", "category_name")

_BLOCK = 512  # bytes; an archive ends with two blocks of zeros


class TarIndex(NamedTuple):
    """The images of a tar file.

    Attributes:
        members: `MEMBER` of each image.
        names: of their members.
        labels: the texts that the labels are positions in; those of digits only are numbers.
        is_text: whether a label comes from a .txt member, which may hold a sentence.
        hint: why the first member that should hold a label holds none, or "".
        findings: what is left out, with paths in the archive; `*.EXTENSION` stands for many.
    """

    members: NDArray[np.void]
    names: list[str]
    labels: list[str]
    is_text: bool
    hint: str
    findings: list[Finding]


class _Image(NamedTuple):
    """An image member: its name, key, stem, place, and how many of this name came before."""

    name: str
    key: str
    stem: str
    offset: int
    size: int
    repeat: int


def index_tar(path: Path) -> TarIndex:
    """Return the index of a tar file, from the cache or from the file itself.

    Raises:
        UserError: it is no tar file, damaged, or cut off.
    """
    cached = cache_path(file_state(path.resolve(), path.stat()), _INDEX_VERSION)
    content = read_cache(cached)
    if content is None:
        index = _read_index(path)
        rest = [*index[1:-1], [[f.path, f.kind, f.detail] for f in index.findings]]
        head = len(index.members).to_bytes(8, "little") + index.members.tobytes()
        write_cache(cached, head + json.dumps(rest).encode())
        return index
    members = np.frombuffer(content, dtype=MEMBER, count=int.from_bytes(content[:8], "little"), offset=8)
    names, labels, is_text, hint, findings = json.loads(content[8 + members.nbytes :])
    return TarIndex(members, names, labels, is_text, hint, [Finding(*row) for row in findings])


def split_key(name: str) -> tuple[str, str]:
    """Return the key of a member, up to the first dot of its file name, and the extension behind it in lower case.

    Example:
        >>> split_key("cats/0001.seg.PNG")
        ('cats/0001', 'seg.png')
    """
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _read_index(path: Path) -> TarIndex:
    """Return the index of a tar file, from its headers and the members that hold labels."""
    images: list[_Image] = []
    labels = _Labels()
    seen: Counter[str] = Counter()
    findings: list[Finding] = []
    others: Counter[tuple[str, str, str]] = Counter()
    for member in _members(path, findings):
        name = member.name
        key, extension = split_key(name)
        stem, last = os.path.splitext(name)
        if reason := _reason_to_skip(member):
            findings.append(Finding(name, *reason))
        elif named_format(name) is not None:
            images.append(_Image(name, key, stem, member.offset_data, member.size, seen[name]))
            seen[name] += 1
        elif not labels.read(path, member, stem, last[1:].lower()):
            others[f"*.{extension}" if extension else name, NO_IMAGE, "neither an image nor a label"] += 1
    by_stem = labels.merged()
    plain = {image.key for image in images if image.stem == image.key}
    samples: set[tuple[str, int]] = set()
    positions: dict[str, int] = {}
    rows, names = [], []
    for image in images:
        # webdataset's rule, a sample is what has one key, unless the whole name but its extension has a label
        is_own = image.stem == image.key or image.stem in by_stem or image.key not in plain | by_stem.keys()
        sample = (image.stem if is_own else image.key, image.repeat)
        if sample in samples or (not is_own and image.key in plain):
            others[f"*.{split_key(image.name)[1]}", EXTRA, "beside another image of the same key"] += 1
            continue
        samples.add(sample)
        texts = by_stem.get(sample[0], [])
        text = texts[image.repeat] if image.repeat < len(texts) else None
        label = -1 if text is None else positions.setdefault(text, len(positions))
        rows.append((image.offset, image.size, label))
        names.append(image.name)
    findings += [Finding(what, kind, f"{count:,} members, {reason}") for (what, kind, reason), count in others.items()]
    return TarIndex(np.array(rows, dtype=MEMBER), names, list(positions), labels.is_text, labels.hint, findings)


def _members(path: Path, findings: list[Finding]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file that are no folders.

    tarfile takes a cut in a header, a damaged one, and a missing end for the end; here they are refused.

    Raises:
        UserError: it is no tar file, damaged, or cut off.
    """
    count = 0
    try:
        # "r:" is no compression: in a compressed tar file nothing can be read at an offset
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                count += 1
                if not member.isdir():
                    yield member
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
            position = tar.offset
            end = os.pread(file.fileno(), 2 * _BLOCK, position)
            if end != bytes(2 * _BLOCK):
                what = "cut off" if not end.strip(b"\0") else "damaged"
                raise UserError(
                    f"{path}: {what} at byte {position:,} of {path.stat().st_size:,}, after {count:,} whole members: "
                    "fetch it or make it again"
                )
            file.seek(position)
            while block := file.read(1 << 20):
                if block.strip(b"\0"):
                    findings.append(Finding("", NO_IMAGE, "what lies behind the end of the archive is not read"))
                    break
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a tar file, or damaged ({error}), after {count:,} whole members") from error


def _reason_to_skip(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return kind and detail of the finding about a member that is left out whatever it is called, or None."""
    parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
    if any(part.startswith(".") or part == "__MACOSX" for part in parts) or re.match(r"__[^/]*__($|/)", member.name):
        return HIDDEN, "left by a system or a program"
    if not member.isreg():
        return NO_IMAGE, "a link or a device in the archive"
    if member.issparse():
        return NO_IMAGE, "stored as a sparse file"
    return None


class _Labels:
    """The labels of an archive, as its members say them.

    Attributes:
        hint: why the first member that should hold a label holds none.
        is_text: whether some come from .txt members.
    """

    def __init__(self) -> None:
        self.hint, self.is_text = "", False
        self._texts: dict[str, dict[str, list[str | None]]] = {kind: defaultdict(list) for kind in _LABEL_EXTENSIONS}

    def read(self, path: Path, member: tarfile.TarInfo, stem: str, kind: str) -> bool:
        """Read a member if its extension is one of labels; return whether it is."""
        if kind not in _LABEL_EXTENSIONS:
            return False
        text, reason = None, f"it has {member.size:,} bytes"
        if member.size <= _LABEL_EXTENSIONS[kind]:
            with path.open("rb") as file:
                content = os.pread(file.fileno(), member.size, member.offset_data)
            text, reason = _label_in_json(content) if kind == "json" else _label_in_text(content)
        if text is None and not self.hint:
            self.hint = f"{member.name} holds no label: {reason}"
        self._texts[kind][stem].append(text)
        return True

    def merged(self) -> dict[str, list[str | None]]:
        """Return the labels of each stem: those of the first kind of member that has any."""
        merged: dict[str, list[str | None]] = {}
        for kind, by_stem in self._texts.items():
            for stem, texts in by_stem.items():
                if stem not in merged and any(text is not None for text in texts):
                    merged[stem] = texts
                    self.is_text |= kind == "txt"
        return merged


def _label_in_text(content: bytes) -> tuple[str | None, str]:
    """Return the label in the bytes of a text, or None and the reason."""
    text = content.decode("utf-8", errors="replace").strip("\ufeff\0 \t\r\n")
    if not text or "\n" in text or "\ufffd" in text:
        return None, "it is empty" if not text else "it is no line of text"
    return _label_of_value(int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text)


def _label_in_json(content: bytes) -> tuple[str | None, str]:
    """Return the label in the bytes of a JSON value: a number, a name, or an object with one of the usual keys."""
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError):
        return None, "it is no JSON"
    if isinstance(value, dict):
        found = next((key for key in (*_JSON_KEYS, *_JSON_NAMES) if value.get(key) is not None), None)
        if found is None:
            keys = ", ".join(map(str, list(value)[:6]))
            return None, f"its keys are {keys}; expected one of {', '.join(_JSON_KEYS[:4])}"
        value = value[found]
    return _label_of_value(value)


def _label_of_value(value: Any) -> tuple[str | None, str]:
    """Return a label as text, numbers without leading zeros."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.strip():
        return value.strip(), ""
    if isinstance(value, int) and not isinstance(value, bool):
        return (str(value), "") if value >= 0 else (None, "a number below 0 means that there is none")
    return None, "it is neither a number nor a name"
