"""Training: the loop over epochs, one step of the optimiser, the saved state, the result."""

from nin.training.cross_validation import cross_validate
from nin.training.early_checks import check_before_images
from nin.training.progress import TrainProgress
from nin.training.result import TrainResult
from nin.training.setup import train
from nin.training.starting_point import starting_point
from nin.training.state import (
    CheckpointOptions,
    with_recorded_augmentation,
    with_recorded_loading,
    with_recorded_settings,
)

__all__ = [
    "CheckpointOptions",
    "TrainProgress",
    "TrainResult",
    "check_before_images",
    "cross_validate",
    "starting_point",
    "train",
    "with_recorded_augmentation",
    "with_recorded_loading",
    "with_recorded_settings",
]
