"""The batch size that fits into a GPU's memory, by trying."""

import gc
from collections.abc import Callable

import torch
from torch import nn

from nin import data
from nin.config import ResolvedConfig, TrainConfig
from nin.errors import UserError
from nin.runtime import distributed
from nin.training.step import TrainStep

SMALLEST = 8

# Steps in an epoch that a larger batch must leave, so that a few hundred images still make some hundred updates.
FEWEST_STEPS = 20


def check_batch_size_test(config: TrainConfig, device: torch.device) -> None:
    """Check that "auto" can be found, before the images are read.

    Raises:
        UserError: the device is no GPU, or there are several processes.
    """
    if not config.finds("batch_size"):
        return
    if device.type != "cuda":
        raise UserError(f"batch_size auto fills the memory of a GPU, and the device is {device}: leave it away")
    if distributed.world_size() > 1:
        raise UserError("batch_size auto is for one process: find it with one, and give the number to all")


def find_batch_size(
    config: ResolvedConfig, images: data.Data, build_model: Callable[[], nn.Module], device: torch.device
) -> int:
    """Return the largest power of two of images that a step of training fits into the memory with.

    Args:
        config: the training settings; its batch size does not count.
        images: the data set.
        build_model: returns the network.
        device: the GPU.

    Returns:
        At most a twentieth of the images: see `FEWEST_STEPS`.

    Raises:
        UserError: not even `SMALLEST` images fit.
    """
    train_step = TrainStep(build_model, config)
    found, size = 0, SMALLEST
    while size <= max(SMALLEST, len(images.train) // FEWEST_STEPS) and _fits(train_step, images, size, device):
        found, size = size, 2 * size
    if not found:
        raise UserError(f"{config.model} does not fit into the memory of {device} with {SMALLEST} images in a batch")
    return found


def _fits(train_step: TrainStep, images: data.Data, size: int, device: torch.device) -> bool:
    """Return whether a step with so many images fits; two are taken, as the first one makes the optimiser's state."""
    side = train_step.config.train_size or images.size
    try:
        x = torch.zeros(size, images.channels, side, side, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(size, device=device) % len(images.classes)
        for step in range(2):
            train_step.step_at(x, labels, learning_rate=0.0, step=step)
    except torch.OutOfMemoryError:
        return False
    finally:
        train_step.optimizer.optimizer.zero_grad()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
