"""Which settings of a recipe a training used: a report lists no others."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nin.config import PHOTO_SIZE, TrainConfig

# The fit of the class layer has no steps, and its images are not augmented, but for the mirrored ones.
_OF_CLASS_LAYER = {"recipe", "model", "pretrained", "weights", "freeze", "label_smoothing", "flip", "balance"}
_OF_CLASS_LAYER |= {"validation", "seed", "device", "precision", "threads"}


def used_settings(recipe: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Return the settings of a recipe that had a part in the training.

    Args:
        recipe: of the run folder's ``config.json``; what is no setting, such as what was narrowed, is kept.
        image_size: height and width of the images, in pixels.
    """
    unused = {name for name, value in recipe.items() if value is None}
    if recipe.get("weights") is not None:
        unused.add("pretrained")
    if recipe.get("freeze"):
        unused |= {field.name for field in dataclasses.fields(TrainConfig)} - _OF_CLASS_LAYER
    if recipe.get("optimizer") == "adamw":
        unused.add("momentum")
    if not str(recipe.get("model", "nin_")).startswith("nin_"):
        unused |= {"normalisation", "last_activation"}
    if recipe.get("augment") == "none":
        unused |= {"flip", "shift"}
    elif image_size >= PHOTO_SIZE:
        unused.add("shift")
    return {name: value for name, value in recipe.items() if name not in unused}
