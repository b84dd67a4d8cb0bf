"""Arrays and tensors as images: layouts (N, C, H, W) and (N, H, W, C), floats to bytes, and data sets in memory."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nin.data.dataset import Data, ImageSet
from nin.data.folder_listing import natural_key
from nin.data.mirroring import FlipChoice
from nin.data.resizing import BAR_GREY, ResizeOptions, resize_to_square
from nin.data.sampler import stratified_holdout
from nin.data.value_range import Pixels, scale_to_uint8
from nin.errors import UserError

# Channels that a single image may have: grey, grey with alpha, RGB, RGBA.
CHANNEL_COUNTS = (1, 2, 3, 4)


def load_arrays(source: tuple[Any, Any], *, test_fraction: float | None, seed: int) -> Data:
    """Return (images, labels) or ((images, labels), (images, labels)) as Data; see `nin.data.load`."""
    if len(source) != 2:
        raise UserError(f"source: expected (images, labels) or (train, test), got a tuple of {len(source)}")
    is_split = all(isinstance(part, tuple) and len(part) == 2 for part in source)
    parts = source if is_split else (source,)
    images = [images_from_array(part[0]) for part in parts]
    labels = [_to_numpy(part[1]) for part in parts]
    for x, y in zip(images, labels, strict=True):
        if y.shape != (len(x),):
            raise UserError(f"labels: expected shape ({len(x)},) as there are images, got {y.shape}")
    if images[0].shape[1:] != images[-1].shape[1:]:
        raise UserError(
            f"test images: expected shape {tuple(images[0].shape[1:])} as in training, "
            f"got {tuple(images[-1].shape[1:])}"
        )
    classes = sorted(np.unique(labels[0]).tolist(), key=lambda value: natural_key(str(value)))
    if len(classes) < 2:
        raise UserError(f"labels: expected two classes or more, got {len(classes)}")
    sets = [ImageSet(x, _class_indices(y, classes)) for x, y in zip(images, labels, strict=True)]
    train, test = sets if is_split else _train_test_split(sets[0], test_fraction=test_fraction, seed=seed)
    # dataclasses.replace(data, flip=True) says that they may be mirrored
    flip = FlipChoice(False, "nothing tells what the images of arrays show")
    return Data.from_sets("arrays", train, test, tuple(str(value) for value in classes), flip=flip)


def images_from_array(values: Any) -> Tensor:
    """Return a batch of square images as uint8 (N, C, H, W), a copy.

    Args:
        values: an array or tensor that `to_nchw` and `to_uint8` take.

    Raises:
        UserError: it has another shape, dtype or range.
    """
    return torch.from_numpy(np.array(to_uint8(to_nchw(_to_numpy(values))), order="C"))


def to_nchw(
    values: NDArray[Any],
    *,
    error: str = "images: expected square images of shape (N, H, W), (N, H, W, C) or (N, C, H, W), got {shape}",
) -> NDArray[Any]:
    """Return a batch of square images as a view (N, C, H, W); the two equal sides tell where the channels are.

    Args:
        values: (N, H, W), (N, H, W, C) or (N, C, H, W), H = W.
        error: the message, with {shape} in it.

    Raises:
        UserError: it has another shape, or no element.
    """
    images = values[:, None] if values.ndim == 3 else values
    if images.ndim == 4 and images.shape[2] != images.shape[3]:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[2] != images.shape[3] or images.size == 0:
        raise UserError(error.format(shape=values.shape))
    return images


def to_squares(images: NDArray[Any], options: ResizeOptions) -> NDArray[Any]:
    """Return images of any shape as squares of their shorter side, of the same type.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W) with one to four channels, of any numbers.
        options: how. The bars of a letterbox are `nin.data.resizing.BAR_GREY` in bytes, else the mean of the channel.

    Returns:
        (N, H, W) or (N, C, H, W); what is no batch of images, or of squares, as it is.
    """
    is_last = images.ndim == 4 and images.shape[3] <= 4
    planes = images.transpose(0, 3, 1, 2) if is_last else images
    if planes.size == 0 or planes.shape[-2] == planes.shape[-1] or (planes.ndim == 4 and planes.shape[1] > 4):
        return images
    size, is_bytes = min(planes.shape[-2:]), images.dtype == np.uint8

    def square(plane: NDArray[Any]) -> NDArray[Any]:
        bar = BAR_GREY if is_bytes else float(plane.mean())
        image = Image.fromarray(np.ascontiguousarray(plane if is_bytes else plane.astype(np.float32)))
        return np.asarray(resize_to_square(image, size, options, bar=bar))

    flat = np.stack([square(plane) for plane in planes.reshape(-1, *planes.shape[-2:])])
    return flat.reshape(*planes.shape[:-2], size, size)


def to_uint8(
    values: NDArray[Any],
    *,
    range_error: str = "images: expected floats in 0..1, got {low:g}..{high:g}",
    dtype_error: str = "images: expected uint8, or floats in 0..1, got {dtype}",
) -> Pixels:
    """Return uint8 as it is, and floats from 0 to 1 scaled to 0..255.

    Args:
        values: any shape, not empty.
        range_error: the message for other floats, with {low} and {high} in it.
        dtype_error: the message for other types, with {dtype} in it.

    Raises:
        UserError: it holds other values.
    """
    if values.dtype.kind == "f":
        return scale_to_uint8(values, top=1, error=range_error)
    if values.dtype != np.uint8:
        raise UserError(dtype_error.format(dtype=values.dtype))
    return values


def unstack(array: Tensor, channels: int) -> list[Tensor]:
    """Return the single images in an array; `nin.Classifier.predict` has the rule.

    Args:
        array: one image or several.
        channels: that the network takes.

    Raises:
        ValueError: it may be one image or several.
    """
    if array.dim() <= 2:
        return [array]
    if array.dim() == 3 and (array.shape[2] in CHANNEL_COUNTS or array.shape[0] in (1, channels)):
        return [array]
    if array.dim() == 3 and array.shape[0] in CHANNEL_COUNTS:
        count, height, width = array.shape
        raise ValueError(
            f"an array {tuple(array.shape)} may be one image of {count} channels or {count} grey images: give it as "
            f"(1, {count}, {height}, {width}) or as ({count}, 1, {height}, {width})"
        )
    return list(array)


def to_pillow(array: Tensor) -> Image.Image:
    """Return a Pillow image of an array (H, W), (H, W, C) or (C, H, W) of uint8, or of floats from 0 to 1.

    Raises:
        ValueError: it has another shape, dtype or range.
    """
    if array.dim() == 3 and array.shape[2] not in CHANNEL_COUNTS:
        array = array.permute(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if array.dim() not in (2, 3) or array.numel() == 0 or (array.dim() == 3 and array.shape[2] not in CHANNEL_COUNTS):
        raise ValueError(f"an image must have shape (H, W), (H, W, C) or (C, H, W), got {tuple(array.shape)}")
    pixels = to_uint8(
        _to_numpy(array),
        range_error="an image of floats must have values from 0 to 1, got {low:g} to {high:g}",
        dtype_error=f"an image must be of uint8, or of floats from 0 to 1, got {array.dtype}",
    )
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _to_numpy(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        # NumPy has no bfloat16
        return (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()
    return np.asarray(values)


def _class_indices(labels: NDArray[Any], classes: list[Any]) -> Tensor:
    """Return the position of each label in the classes, int64."""
    positions = {value: position for position, value in enumerate(classes)}
    try:
        return torch.tensor([positions[value] for value in labels.tolist()], dtype=torch.int64)
    except KeyError as error:
        raise UserError(f"test labels: expected classes of the training labels, got {error}") from error


def _train_test_split(images: ImageSet, *, test_fraction: float | None, seed: int) -> list[ImageSet]:
    """Return the images for training and those held out for testing, chosen by their positions.

    Raises:
        UserError: no class has two images.
    """
    names = [str(index) for index in range(len(images))]
    mask = stratified_holdout(names, images.labels.tolist(), fraction=test_fraction, seed=seed)
    if not mask.any():
        raise UserError("labels: expected two images or more in a class, got one in each")
    is_test = torch.from_numpy(mask)
    return [ImageSet(images.images[part], images.labels[part]) for part in (~is_test, is_test)]
