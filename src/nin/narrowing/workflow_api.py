"""`nin narrow`: a run, or somebody's network, becomes a narrower one, tested and fine-tuned, with what that cost."""

from nin.narrowing.narrow_model import Preparation, load_network, shrink_network
from nin.narrowing.narrow_run import shrink
from nin.narrowing.workflow import Subject, accuracy, calibration_batches
from nin.narrowing.workflow_config import ShrinkingConfig

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
