"""The names of networks and data sets that people give, and their checks. Importing it does not import PyTorch."""

import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from nin.errors import UserError
from nin.version import install_command

NETWORKS = ("nin_digits", "nin_cifar", "nin_imagenet", "googlenet")

DATA_SETS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn")

# of the files that an export writes, by its format
EXPORT_SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}

# what an image folder looks like, for messages
EXPECTED_FOLDER = "expected DIR/<class>/<image>, or DIR/train/<class>/<image> beside DIR/test or DIR/val"

# of shards
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

# in a folder of shards: what they hold, and while they are being written what they are made from
SHARDS_FILE, PARTIAL_SHARDS_FILE = "nin-shards.json", "nin-shards.partial.json"

# the shards, and what is written of one beside its place
_SHARD = re.compile(r"(train|test|val)-\d{6}\.tar|\.(train|test|val)-\d{6}\.tar\..+")

LIBRARIES = ("torchvision", "timm")

NAME_FORMS = "timm:NAME, torchvision:NAME, package.module:factory"

# In what is no path but may name shards: a pattern, or a URL.
_OF_PATTERNS = re.compile(r"[*?{\[]|^[a-z][a-z0-9+]*:")


def is_pattern(text: str) -> bool:
    """Return whether a text that is no path may name shards: by a pattern, or as a URL."""
    return _OF_PATTERNS.search(text) is not None


def is_external_name(text: str) -> bool:
    """Return whether a string has the form of another package's network; there need not be such a network."""
    package, _, name = text.partition(":")
    return bool(name) and all(part.isidentifier() for part in package.split("."))


def check_network(name: str, *, also: str = "") -> None:
    """Check that there may be a network of that name.

    Whether timm and torchvision have it is read in their source. What is said there need not be all: a name that is
    found is looked up by `nin.models.check_name`.

    Args:
        name: of the network.
        also: what else may be given, for the message, such as "a run folder, ".

    Raises:
        UserError: there is none; the message says what was probably meant.
    """
    if name in NETWORKS:
        return
    package, _, own = name.partition(":")
    if package in LIBRARIES and own:
        if package == "timm" and importlib.util.find_spec(package) is None:
            raise UserError(f"{name} needs timm: {install_command('timm')}")
        functions, words = library_names(package)
        if functions and own.split(".")[0] not in words and not _is_registered(package, own.split(".")[0]):
            raise UserError(unknown_library_name(package, own, sorted(functions)))
    elif not is_external_name(name):
        near = _near_names(name)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"model must be one of {', '.join(NETWORKS)}, {also}or {NAME_FORMS}; got {name!r}{hint}")


def _is_registered(package: str, name: str) -> bool:
    """Return whether a network was added to an imported library's by somebody's own code, which its source lacks."""
    library = sys.modules.get(f"{package}.models")
    return library is not None and name in library.list_models()


def check_external(name: str) -> None:
    """Check that there may be a network of another package of that name, as `check_network`.

    Raises:
        UserError: there is none.
    """
    if not is_external_name(name):
        raise UserError(f"network must be a run folder, or {NAME_FORMS}; got {name!r}")
    check_network(name)


def unknown_library_name(library: str, name: str, names: Sequence[str]) -> str:
    """Return the message for a name that timm or torchvision does not have."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {library}:{near[0]}?" if near else f"; {library}'s list_models() lists them"
    return f"{library} has no network {name!r}{hint}"


@functools.cache
def library_names(library: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the functions that make networks in the source of timm or torchvision, and all words in quotes with them.

    Both are empty where its source is not on this machine.
    """
    spec = importlib.util.find_spec(library)
    functions, words = set[str](), set[str]()
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder, "models").rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            functions.update(re.findall(r"^@register_model.*\n(?:@.*\n)*def (\w+)\(", text, re.MULTILINE))
            words.update(re.findall(r"""["'](\w+)["'.]""", text))
    return frozenset(functions), frozenset(words | functions)


def _near_names(name: str) -> list[str]:
    """Return what a name may have meant: the same one of torchvision or timm, or one of nin's that is nearly it."""
    for library in LIBRARIES:
        if name in library_names(library)[0]:
            return [f"{library}:{name}"]
    return difflib.get_close_matches(name.replace("-", "_"), NETWORKS, n=1)


def shard_files(folder: Path) -> set[str]:
    """Return the names that files of nin's shards have in a folder."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {SHARDS_FILE, PARTIAL_SHARDS_FILE} | {name for name in found if _SHARD.fullmatch(name)}


def check_source(source: str | Path) -> None:
    """Check that there may be images of that name or in that place; a pattern or a URL of shards may be right.

    Raises:
        UserError: there are none, or it is a file that is no shard; the message says what was probably meant.
    """
    text = str(source)
    if text not in DATA_SETS and Path(source).is_file() and not text.endswith(SHARD_SUFFIXES):
        raise UserError(f"{source}: expected a folder, got a file; {EXPECTED_FOLDER}")
    if text in DATA_SETS or Path(source).exists() or is_pattern(text):
        return
    raise missing_source(source)


def missing_source(source: str | Path) -> UserError:
    """Return the error for images that are not there; it says what was probably meant."""
    near = difflib.get_close_matches(str(source).lower().replace("_", "-"), DATA_SETS, n=1)
    hint = f"did you mean {near[0]}?" if near else "a name or an image folder is expected"
    return UserError(f"{source}: there is no such folder, and the names are {', '.join(DATA_SETS)}; {hint}")
