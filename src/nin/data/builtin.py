"""Data sets with a name: digits from scikit-learn, the others in the files that torchvision knows."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import os
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nin.data.dataset import Data, ImageSet, channel_mean_std, default_shift
from nin.data.sampling import stratified_holdout
from nin.errors import UserError

DATASET_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn")

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
_TORCHVISION_CLASS = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
# Where the files of a set lie below data_dir, as torchvision lays them out.
_FILES = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte.gz and three more",
    "fashion-mnist": "FashionMNIST/raw/train-images-idx3-ubyte.gz and three more",
    "cifar10": "cifar-10-batches-py/data_batch_1 and more",
    "cifar100": "cifar-100-python/train, test and meta",
    "svhn": "train_32x32.mat and test_32x32.mat",
}


def load_named(name: str, *, data_dir: Path | None, test_fraction: float, seed: int) -> Data:
    """Loads one of DATASET_NAMES; see `nin.data.load`."""
    if name == "digits":
        train, test = _digits(test_fraction, seed)
        classes = _DIGIT_NAMES
    else:
        train, test, classes = _from_torchvision(name, data_dir)
    mean, std = channel_mean_std(train)
    size = train.images.shape[-1]
    return Data(
        name=name,
        train=train,
        test=test,
        classes=classes,
        channels=train.images.shape[1],
        size=size,
        mean=mean,
        std=std,
        flip=name in ("fashion-mnist", "cifar10", "cifar100"),  # a mirrored 2 is no 2
        shift=default_shift(size),
    )


def _digits(test_fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The 1,797 digits of 8 x 8 pixels, 0..16, that scikit-learn brings along."""
    bunch = importlib.import_module("sklearn.datasets").load_digits()  # slow, and only this needs it
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    names = [str(index) for index in range(len(labels))]
    is_test = torch.from_numpy(stratified_holdout(names, labels.tolist(), fraction=test_fraction, seed=seed))
    return ImageSet(images[~is_test], labels[~is_test]), ImageSet(images[is_test], labels[is_test])


def _from_torchvision(name: str, data_dir: Path | None) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Reads the files in data_dir; without data_dir those of our cache, downloaded where they are missing.

    A data_dir that the user names is only read, never written to.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"data_dir: expected a folder, got {data_dir}, which is none")
    folder = data_dir if data_dir is not None else cache_folder()
    try:
        return _read(name, folder)
    except FileNotFoundError as missing:
        if data_dir is not None:
            raise UserError(
                f"{name}: expected {folder / _FILES[name]}, got {missing}; leave out data_dir to download the files"
            ) from missing
    try:
        _download(name, folder)
        return _read(name, folder)
    except (OSError, RuntimeError) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: the files are not in {folder} and cannot be downloaded ({words}); "
            f"put them at DIR/{_FILES[name]}, and give DIR as data_dir"
        ) from error


def cache_folder() -> Path:
    """Returns where the files of the named sets lie unless a folder is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nin"


def _download(name: str, folder: Path) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to results
        for split in _splits(name):
            _torchvision_class(name)(folder, download=True, **split)


def _read(name: str, folder: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Reads both halves of a set. Raises FileNotFoundError where its files are not there."""
    if name in ("mnist", "fashion-mnist"):
        raw = folder / _TORCHVISION_CLASS[name] / "raw"
        classes = _DIGIT_NAMES if name == "mnist" else _FASHION_NAMES
        return _idx_set(raw, "train"), _idx_set(raw, "t10k"), classes
    kind = _torchvision_class(name)
    try:
        train, test = (kind(folder, download=False, **split) for split in _splits(name))
    except RuntimeError as error:
        raise FileNotFoundError("no such files, or damaged ones") from error
    if name == "svhn":
        return _svhn_set(train), _svhn_set(test), _DIGIT_NAMES
    return _cifar_set(train), _cifar_set(test), tuple(train.classes)


def _torchvision_class(name: str) -> Any:
    datasets = importlib.import_module("torchvision.datasets")  # slow, and only these sets need it
    return getattr(datasets, _TORCHVISION_CLASS[name])


def _splits(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of torchvision's class for the training and the test half."""
    if name == "svhn":
        return {"split": "train"}, {"split": "test"}
    return {"train": True}, {"train": False}


def _cifar_set(dataset: Any) -> ImageSet:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(dataset.targets, dtype=torch.int64))


def _svhn_set(dataset: Any) -> ImageSet:
    images = torch.from_numpy(np.ascontiguousarray(dataset.data))
    return ImageSet(images, torch.from_numpy(dataset.labels.astype(np.int64)))


def _idx_set(raw: Path, part: str) -> ImageSet:
    """Reads one half of an MNIST-like set, packed or not.

    torchvision reads only files that it has unpacked beside the packed ones, and the folder may be
    read-only.
    """
    images = read_idx(raw / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(raw / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    if len(images) != len(labels):
        raise UserError(f"{raw}: expected as many labels as images, got {len(labels)} and {len(images)}")
    return ImageSet(images[:, None], labels.to(torch.int64))


def read_idx(path: Path, *, dimensions: int) -> Tensor:
    """Reads an idx file of bytes: 0, 0, type 8, dimensions, the sizes as big-endian int32, the values.

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
    values = np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
    return torch.from_numpy(values.copy())
