"""Built-in data sets: digits from scikit-learn; MNIST, Fashion-MNIST, CIFAR and SVHN from torchvision's files."""

import contextlib
import dataclasses
import gzip
import importlib
import sys
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from nin import names
from nin.data.arrays import images_from_array, load_arrays
from nin.data.cache import cache_folder
from nin.data.dataset import Data, ImageSet
from nin.data.mirroring import reason_in_names
from nin.data.value_range import Pixels, scale_to_uint8
from nin.errors import UserError

_DIGIT_NAMES = tuple("0123456789")
_FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class _Source(NamedTuple):
    """Where a data set comes from: torchvision's class, and the files below data_dir, as that class puts them."""

    class_name: str
    files: str


_TORCHVISION = {
    "mnist": _Source("MNIST", "MNIST/raw/train-images-idx3-ubyte.gz and three more"),
    "fashion-mnist": _Source("FashionMNIST", "FashionMNIST/raw/train-images-idx3-ubyte.gz and three more"),
    "cifar10": _Source("CIFAR10", "cifar-10-batches-py/data_batch_1 and more"),
    "cifar100": _Source("CIFAR100", "cifar-100-python/train, test and meta"),
    "svhn": _Source("SVHN", "train_32x32.mat and test_32x32.mat"),
}
DATASET_NAMES = names.DATA_SETS


def load_builtin(name: str, *, data_dir: Path | None, test_fraction: float | None, seed: int) -> Data:
    """Load one of DATASET_NAMES; see `nin.data.load`."""
    if name == "digits":
        return _load_digits(test_fraction or 0.25, seed)
    train, test, classes = _load_torchvision(name, data_dir)
    return Data.from_sets(name, train, test, classes)


def _load_digits(test_fraction: float, seed: int) -> Data:
    """Load the 1,797 digits of 8 x 8 pixels, 0..16, that scikit-learn brings along."""
    bunch = importlib.import_module("sklearn.datasets").load_digits()  # slow, and only this needs it
    images = scale_to_uint8(bunch.images, top=16, error="digits: expected values in 0..16, got {low:g}..{high:g}")
    digits = load_arrays((images, bunch.target), test_fraction=test_fraction, seed=seed)
    return dataclasses.replace(digits, name="digits", flip_reason=reason_in_names(digits.classes) or "")


def _load_torchvision(name: str, data_dir: Path | None) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Read the files in data_dir; without data_dir those of the cache folder, downloaded where they are missing.

    A data_dir that the user names is only read, never written to.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"data_dir: expected a folder, got {data_dir}, which is none")
    folder = data_dir if data_dir is not None else cache_folder()
    try:
        return _read_sets(name, folder)
    except FileNotFoundError as missing:
        if data_dir is not None:
            files = folder / _TORCHVISION[name].files
            raise UserError(
                f"{name}: expected {files}, got {missing}; leave out data_dir to download the files"
            ) from missing
    try:
        _download(name, folder)
        return _read_sets(name, folder)
    except (OSError, RuntimeError) as error:  # torchvision's where all mirrors fail or a checksum is wrong
        words = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: the files are not in {folder} and cannot be downloaded ({words}); "
            f"put them at DIR/{_TORCHVISION[name].files}, and give DIR as data_dir"
        ) from error


def _download(name: str, folder: Path) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to results
        for split in _splits(name):
            _torchvision_class(name)(folder, download=True, **split)


def _read_sets(name: str, folder: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Read the training and the test set. Raises FileNotFoundError where the files are not there."""
    if name in ("mnist", "fashion-mnist"):
        raw = folder / _TORCHVISION[name].class_name / "raw"
        classes = _DIGIT_NAMES if name == "mnist" else _FASHION_NAMES
        return _read_idx_set(raw, "train"), _read_idx_set(raw, "t10k"), classes
    dataset_class = _torchvision_class(name)
    try:
        train, test = (dataset_class(folder, download=False, **split) for split in _splits(name))
    except RuntimeError as error:
        raise FileNotFoundError("no such files, or damaged ones") from error
    if name == "svhn":
        return _image_set(train.data, train.labels), _image_set(test.data, test.labels), _DIGIT_NAMES
    return _image_set(train.data, train.targets), _image_set(test.data, test.targets), tuple(train.classes)


def _torchvision_class(name: str) -> Any:
    datasets = importlib.import_module("torchvision.datasets")  # slow, and only these sets need it
    return getattr(datasets, _TORCHVISION[name].class_name)


def _splits(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of torchvision's class for the training and the test set."""
    if name == "svhn":
        return {"split": "train"}, {"split": "test"}
    return {"train": True}, {"train": False}


def _image_set(images: Pixels, labels: ArrayLike) -> ImageSet:
    return ImageSet(images_from_array(images), torch.from_numpy(np.array(labels, dtype=np.int64)))


def _read_idx_set(raw: Path, part: str) -> ImageSet:
    """Read the training or the test set of an MNIST, packed or not.

    torchvision reads only files that it has unpacked beside the packed ones, and the folder may be
    read-only.
    """
    images = _read_idx(raw / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(raw / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    if len(images) != len(labels):
        raise UserError(f"{raw}: expected as many labels as images, got {len(labels)} and {len(images)}")
    return _image_set(images, labels)


def _read_idx(path: Path, *, dimensions: int) -> Pixels:
    """Read an idx file of bytes: 0, 0, type 8, dimensions, the sizes as big-endian int32, the values.

    Args:
        path: the file ending in .gz; where it is missing, the unpacked file beside it is read.
        dimensions: that the file must have.

    Returns:
        uint8, of the shape that the file states.

    Raises:
        FileNotFoundError: neither file is there.
        UserError: the file is damaged or holds something else.
    """
    unpacked = path.with_suffix("")
    try:
        content = gzip.decompress(path.read_bytes()) if path.exists() else unpacked.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {path}") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); fetch the file again") from error
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != header + prod(shape):
        raise UserError(f"{path}: expected an idx file of bytes with {dimensions} dimensions, got something else")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
