"""Arrays that are already in memory become Data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nin.data.dataset import Data, ImageSet, channel_mean_std, default_shift
from nin.data.folder_listing import natural_key
from nin.data.sampling import stratified_holdout
from nin.errors import UserError


def load_arrays(source: tuple[Any, Any], *, test_fraction: float, seed: int) -> Data:
    """Makes (images, labels) or ((images, labels), (images, labels)) into Data; see `nin.data.load`."""
    if len(source) != 2:
        raise UserError(f"source: expected (images, labels) or (train, test), got a tuple of {len(source)}")
    is_pair = all(isinstance(part, tuple) and len(part) == 2 for part in source)
    parts = source if is_pair else (source,)
    images = [_images(part[0]) for part in parts]
    labels = [_array(part[1]) for part in parts]
    for pictures, names in zip(images, labels, strict=True):
        if names.shape != (len(pictures),):
            raise UserError(f"labels: expected shape ({len(pictures)},) as there are images, got {names.shape}")
    if images[0].shape[1:] != images[-1].shape[1:]:
        raise UserError(
            f"test images: expected shape {tuple(images[0].shape[1:])} as in training, "
            f"got {tuple(images[-1].shape[1:])}"
        )
    classes = sorted(np.unique(labels[0]).tolist(), key=lambda value: natural_key(str(value)))
    if len(classes) < 2:
        raise UserError(f"labels: expected two classes or more, got {len(classes)}")
    numbered = [_number(names, classes) for names in labels]
    if not is_pair:
        is_test = _held_out(numbered[0], test_fraction, seed)
        images = [images[0][~is_test], images[0][is_test]]
        numbered = [numbered[0][~is_test], numbered[0][is_test]]
    train, test = (ImageSet(*part) for part in zip(images, numbered, strict=True))
    mean, std = channel_mean_std(train)
    _, channels, size, _ = train.images.shape
    return Data(
        name="arrays",
        train=train,
        test=test,
        classes=tuple(str(value) for value in classes),
        channels=channels,
        size=size,
        mean=mean,
        std=std,
        flip=False,  # nothing tells what they show; dataclasses.replace(data, flip=True) says that it may be
        shift=default_shift(size),
    )


def _array(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _images(values: Any) -> Tensor:
    """Returns images as uint8 (N, C, H, W). The two equal sides tell where the channels are."""
    array = _array(values)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[2] != array.shape[3]:
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[2] != array.shape[3] or array.size == 0:
        raise UserError(
            f"images: expected square images of shape (N, H, W), (N, H, W, C) or (N, C, H, W), got {np.shape(values)}"
        )
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise UserError(f"images: expected floats in 0..1, got {array.min():g}..{array.max():g}")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"images: expected uint8, or floats in 0..1, got {array.dtype}")
    return torch.from_numpy(np.array(array, order="C"))


def _number(labels: NDArray[Any], classes: list[Any]) -> Tensor:
    """Returns the position of each label in the classes, int64."""
    positions = {value: position for position, value in enumerate(classes)}
    try:
        return torch.tensor([positions[value] for value in labels.tolist()], dtype=torch.int64)
    except KeyError as error:
        raise UserError(f"test labels: expected classes of the training labels, got {error}") from error


def _held_out(labels: Tensor, test_fraction: float, seed: int) -> Tensor:
    names = [str(index) for index in range(len(labels))]
    is_test = stratified_holdout(names, labels.tolist(), fraction=test_fraction, seed=seed)
    if not is_test.any():
        raise UserError("labels: expected two images or more in a class, got one in each")
    return torch.from_numpy(is_test)
