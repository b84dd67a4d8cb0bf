"""`nin narrow`: a run, or somebody's network, becomes a narrower one, tested and fine-tuned, with what that cost."""

from nin.shrinking.networks import Preparation, load_network, shrink_network
from nin.shrinking.runs import shrink
from nin.shrinking.settings import ShrinkingConfig
from nin.shrinking.working import Subject, accuracy, calibration_batches

__all__ = [
    "Preparation",
    "ShrinkingConfig",
    "Subject",
    "accuracy",
    "calibration_batches",
    "load_network",
    "shrink",
    "shrink_network",
]
