"""Training: the loop over epochs, one step of the optimiser, the saved state, the result."""

from nin.training.cross_validation import cross_validate
from nin.training.loop import TrainProgress, train
from nin.training.result import TrainResult
from nin.training.state import CheckpointOptions, has_begun, is_finished, with_recorded_flip

__all__ = [
    "CheckpointOptions",
    "TrainProgress",
    "TrainResult",
    "cross_validate",
    "has_begun",
    "is_finished",
    "train",
    "with_recorded_flip",
]
