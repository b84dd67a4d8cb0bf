"""The training batches of an epoch: order, each process's part, augmentation, mixing; and images held on the GPU."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nin import data
from nin.config import ResolvedConfig
from nin.data.image_augmentation import AugmentedSet, ImageAugmentation
from nin.data.mixing import draw_mix, mix_batch, partner_positions
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
    # single images are augmented in threads on the CPU
    stays = config.augment == "strong" or config.crops(images.size)
    train = images.train if stays else data.to_device(images.train, device)
    validation = None if validation is None else data.to_device(validation, device)
    return dataclasses.replace(images, train=train, test=data.to_device(images.test, device), validation=validation)


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
        Augmented images, float32 (B, C, H, W), and labels, int64 (B,); or where images are mixed the probability of
        each class, float32 (B, classes). An image whose partner cannot be read any more is not mixed.
    """
    is_distributed, mixes = distributed.world_size() > 1, bool(config.mixup or config.cutmix)
    crops = config.crops(images.size)
    train = augmented_set(images, config, epoch=epoch)
    # what an image becomes does not depend on the batch it is in, so many batches are augmented at once
    at_once = max(1, AUGMENTATION_BATCH_SIZE // config.batch_size) if ahead and not is_distributed and not mixes else 1
    step = first_step
    for order, batch_size in _orders(images, config, epoch=epoch, first_step=first_step):
        part = BatchPart.of(batch_size, mixes=mixes)
        size, whole_batches = len(part.loaded), order.view(-1, batch_size)
        needed = whole_batches[:, part.loaded].reshape(-1)
        decoded = data.batches(train, needed, size * at_once, on_lost=on_lost, empty=is_distributed or mixes)
        for number, (pixels, labels, indices) in enumerate(decoded):
            pixels, indices, labels = pixels.to(device), indices.to(device), labels.to(device)
            if not crops:  # as whole batches, on the GPU where they are there
                flip, shift = config.flip, config.shift
                pixels = data.augment(pixels, indices, seed=config.seed, epoch=epoch, flip=flip, shift=shift)
            x = data.to_float(pixels, images.mean, images.std, dtype=torch.float32)
            if not mixes:
                yield from zip(x.split(size), labels.split(size), strict=True)
                continue
            mix = draw_mix(mixup=config.mixup, cutmix=config.cutmix, seed=config.seed, epoch=epoch, step=step)
            step += 1
            if len(x) or is_distributed:
                own, other = part.rows(whole_batches[number], indices)
                yield mix_batch(x, labels, own.to(device), other.to(device), mix, classes=len(images.classes))


def augmented_set(images: data.Data, config: ResolvedConfig, *, epoch: int) -> data.ImageSet | data.DecodedSet:
    """Return the training images of an epoch, augmented as far as that is done to single images.

    Raises:
        UserError: they have neither one channel nor three.
    """
    crops = config.crops(images.size)
    if not crops and config.augment != "strong":
        return images.train
    if images.channels not in (1, 3):
        raise UserError(
            f"augment is for grey or RGB images, got {images.channels} channels of {images.size} pixels: "
            'give augment="none"'
        )
    augmentation = ImageAugmentation(
        level=config.augment,
        crops=crops,
        flip=config.flip,
        size=config.train_size or images.size,
        interpolation=images.resize.interpolation,
        fill=tuple(round(255 * mean) for mean in images.mean),
        seed=config.seed,
        epoch=epoch,
    )
    return AugmentedSet.of(images.train, augmentation)


@dataclasses.dataclass(frozen=True)
class BatchPart:
    """What one process takes of each batch: every n-th image, and their partners where images are mixed.

    Attributes:
        own: positions in the batch of all processes, int64 (B,).
        loaded: those and their partners', in ascending order, int64 (K,).
        partners: of `own`, int64 (B,).
    """

    own: Tensor
    loaded: Tensor
    partners: Tensor

    @classmethod
    def of(cls, count: int, *, mixes: bool) -> "BatchPart":
        """Return this process's part of batches of so many images."""
        own = torch.arange(distributed.rank(), count, distributed.world_size())
        partners = partner_positions(own, count) if mixes else own
        return cls(own, torch.cat([own, partners]).unique(), partners)

    def rows(self, batch: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the own images, and of their partners, among the loaded ones that could be read.

        Args:
            batch: what the order holds for the whole batch, int64 (count,).
            kept: what it holds for the loaded images that could be read.
        """
        if len(kept) == len(self.loaded):
            return torch.searchsorted(self.loaded, self.own), torch.searchsorted(self.loaded, self.partners)
        row = {number: at for at, number in enumerate(kept.tolist())}
        pairs = zip(batch[self.own].tolist(), batch[self.partners].tolist(), strict=True)
        rows = [(row[own], row.get(other, row[own])) for own, other in pairs if own in row]
        own, other = torch.tensor(rows, dtype=torch.int64).view(-1, 2).unbind(1)
        return own, other


def _orders(images: data.Data, config: ResolvedConfig, *, epoch: int, first_step: int) -> Iterator[tuple[Tensor, int]]:
    """Yield an epoch's order, piece by piece, and the batch size: whole batches, of all processes."""
    count = len(images.train)
    batch_size = min(config.batch_size, count)
    end = count_steps_per_epoch(count, batch_size) * batch_size
    piece = max(1, ORDER_PIECE // batch_size) * batch_size
    for start in range(first_step * batch_size, end, piece):
        stop = min(start + piece, end)
        options = {"seed": config.seed, "epoch": epoch, "start": start, "stop": stop}
        if config.balance == "sampling":
            order = data.balanced_order(images.train.labels, **options)
        else:
            order = data.epoch_order(count, **options)
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
