"""Training a network: the loop over epochs, and one step of it."""

from nin.training.loop import CheckpointOptions, TrainProgress, TrainResult, has_begun, hold_images, is_finished, train

__all__ = ["CheckpointOptions", "TrainProgress", "TrainResult", "has_begun", "hold_images", "is_finished", "train"]
