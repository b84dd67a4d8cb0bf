"""Mistakes that are found before the images are read, which may take minutes."""

from pathlib import Path
from typing import Any

import torch

from nin import data, models
from nin.config import TrainConfig
from nin.data.folder_entries import FolderWalk
from nin.data.folder_layout import find_layout
from nin.errors import UserError
from nin.models.head_surgery import cut_head
from nin.models.package_networks import create_network
from nin.training.event_log import import_writer
from nin.training.starting_point import StartingPoint


def check_before_images(start: StartingPoint, source: Any, *, resumes: bool, tensorboard: bool) -> None:
    """Check what of a training needs no image.

    Args:
        start: where it begins.
        source: of the images.
        resumes: whether a saved state takes the place of all weights.
        tensorboard: whether TensorBoard's files are asked for.

    Raises:
        UserError: the network cannot be made, the weights are not its own or cannot be had, there is nothing that
            patience could go by, or a package is missing.
    """
    if tensorboard:
        import_writer()
    config = start.config
    if config.patience is not None and config.validation is None and _has_no_validation_part(source):
        raise_for_patience()
    if config.model is not None and config.model not in models.MODELS:
        with torch.random.fork_rng(devices=[]):
            _check_network(start, config, resumes=resumes)


def raise_for_patience() -> None:
    """Raise the error of patience without images to choose by."""
    raise UserError("patience goes by images that are set apart: give validation, such as 0.15, too")


def _has_no_validation_part(source: Any) -> bool:
    """Return whether it is known without a look at the images that none of them are to validate on."""
    if not isinstance(source, str | Path) or str(source) in data.DATASET_NAMES:
        return isinstance(source, str | Path)
    folder = Path(source)
    if not folder.is_dir() or data.is_shards(folder):
        return False
    layout = find_layout(folder, FolderWalk(folder))
    return not layout.by_class and len({part for part, _ in layout.tests}) < 2  # a val folder beside test


def _check_network(start: StartingPoint, config: TrainConfig, *, resumes: bool) -> None:
    """Make a network of another package as it is made for the images, but for their classes, and load its weights."""
    assert config.model is not None
    network, _ = create_network(config.model, 2, pretrained=config.pretrained and not resumes)
    if config.weights is None or resumes:
        return
    weights = start.read_weights()
    class_layer = cut_head(network.eval()).class_layer
    if class_layer is not None and not weights.is_of_classifier:
        weights.load_into(network, class_layer)
