"""The training batches of an epoch: order, this process's part of it, augmentation; and images held on the GPU."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nin import data
from nin.config import ResolvedConfig
from nin.errors import UserError
from nin.runtime import distributed

# Positions of an epoch's order that are computed at a time, 128 MB of int64.
ORDER_PIECE = 2**24

# Images that a GPU augments at a time; at the default batch size every kernel would be launched 64 times as often.
AUGMENTATION_BATCH_SIZE = 8192

# Larger data sets stay where they are, so that the network has the rest of the GPU's memory.
MAX_HELD_BYTES = 4 << 30


def hold_images(images: data.Data, config: ResolvedConfig, device: torch.device) -> data.Data:
    """Return the data set with all images decoded, as bytes on the device, if they fit and it pays; else as it is.

    On a GPU it pays always, as decoding takes longer than training; with the speed recipe on any device. The batches
    stay the same.
    """
    validation = images.validation
    count = len(images.train) + len(images.test) + (0 if validation is None else len(validation))
    total_bytes = count * images.channels * images.size**2
    if total_bytes > MAX_HELD_BYTES or (device.type != "cuda" and config.recipe != "speed"):
        return images
    train, test = (data.to_device(part, device) for part in (images.train, images.test))
    validation = None if validation is None else data.to_device(validation, device)
    return dataclasses.replace(images, train=train, test=test, validation=validation)


def count_steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the full batches in an epoch; images that fill no batch are left out, other ones in every epoch."""
    return max(1, images // batch_size)


def epoch_batches(
    images: data.Data,
    config: ResolvedConfig,
    device: torch.device,
    *,
    epoch: int,
    first_step: int,
    ahead: bool,
    on_lost: Callable[[str, str], None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's part of each batch of an epoch.

    Args:
        images: the data set.
        config: the training settings.
        device: that the batches are put on.
        epoch: which one, from 0; the order and the augmentation depend on it.
        first_step: batches before it are skipped.
        ahead: augment the images of several batches at once, where there is one process.
        on_lost: see `nin.data.batches`.

    Yields:
        Augmented images, float32 (B, C, H, W), and labels (B,).
    """
    is_distributed = distributed.world_size() > 1
    # what an image becomes does not depend on the batch it is in, so many batches are augmented at once
    at_once = AUGMENTATION_BATCH_SIZE // config.batch_size if ahead and not is_distributed else 1
    for order, batch_size in _local_orders(images, config, epoch=epoch, first_step=first_step):
        decoded = data.batches(images.train, order, batch_size * max(1, at_once), on_lost=on_lost, empty=is_distributed)
        for pixels, labels, indices in decoded:
            pixels, indices = pixels.to(device), indices.to(device)
            pixels = data.augment(pixels, indices, seed=config.seed, epoch=epoch, flip=config.flip, shift=config.shift)
            x = data.to_float(pixels, images.mean, images.std, dtype=torch.float32)
            yield from zip(x.split(batch_size), labels.to(device).split(batch_size), strict=True)


def _local_orders(
    images: data.Data, config: ResolvedConfig, *, epoch: int, first_step: int
) -> Iterator[tuple[Tensor, int]]:
    """Yield this process's part of an epoch's order, piece by piece, and its batch size."""
    count = len(images.train)
    end = count_steps_per_epoch(count, config.batch_size) * config.batch_size
    piece = max(1, ORDER_PIECE // config.batch_size) * config.batch_size
    for start in range(first_step * config.batch_size, end, piece):
        stop = min(start + piece, end)
        options = {"seed": config.seed, "epoch": epoch, "start": start, "stop": stop}
        if config.balance == "sampling":
            order = data.balanced_order(images.train.labels, **options)
        else:
            order = data.epoch_order(count, **options)
        order, batch_size = distributed.local_part(order, config.batch_size)
        yield order.to(images.train.labels.device), batch_size


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return what the loss of an image of each class counts, so that the classes count equally: float32 (classes,).

    The weights of all images have the mean 1; a class without images has weight 0.
    """
    counts = labels.bincount(minlength=classes)
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts), 0).float()


def check_batch_size(config: ResolvedConfig, images: int) -> None:
    """Check that each process of the job gets images of every batch.

    Raises:
        UserError: there are more processes than images in a batch.
    """
    smallest = min(config.batch_size, images)
    if distributed.world_size() > smallest:
        raise UserError(
            f"batch_size is that of all processes together: {distributed.world_size()} processes cannot share "
            f"{smallest} images; give a larger --batch-size or start fewer"
        )
