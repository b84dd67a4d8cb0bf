"""nin: Network in Network, real. 1×1 convolutions to look at, train with, shrink networks with and run fast.

The public names are loaded when they are first used, so that ``import nin`` and ``nin --help`` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nin import data, models
    from nin.config import TrainConfig
    from nin.exporters import export
    from nin.fusion import fuse
    from nin.inference.classifier import Classifier, load
    from nin.layers import Bottleneck, Conv1x1, GlobalAveragePooling, Inception, MLPConv
    from nin.narrowing import NarrowOptions, apply_plan, narrow
    from nin.ops import backends, conv1x1, mlpconv
    from nin.profiling.cost import cost
    from nin.sklearn import NiNClassifier
    from nin.training import train

_HOME = {
    "Bottleneck": "nin.layers",
    "Classifier": "nin.inference.classifier",
    "Conv1x1": "nin.layers",
    "GlobalAveragePooling": "nin.layers",
    "Inception": "nin.layers",
    "MLPConv": "nin.layers",
    "NarrowOptions": "nin.narrowing",
    "NiNClassifier": "nin.sklearn",
    "TrainConfig": "nin.config",
    "apply_plan": "nin.narrowing",
    "backends": "nin.ops",
    "conv1x1": "nin.ops",
    "cost": "nin.profiling.cost",
    "data": "nin",
    "export": "nin.exporters",
    "fuse": "nin.fusion",
    "load": "nin.inference.classifier",
    "mlpconv": "nin.ops",
    "models": "nin",
    "narrow": "nin.narrowing",
    "train": "nin.training",
}

__all__ = [
    "Bottleneck",
    "Classifier",
    "Conv1x1",
    "GlobalAveragePooling",
    "Inception",
    "MLPConv",
    "NarrowOptions",
    "NiNClassifier",
    "TrainConfig",
    "apply_plan",
    "backends",
    "conv1x1",
    "cost",
    "data",
    "export",
    "fuse",
    "load",
    "mlpconv",
    "models",
    "narrow",
    "train",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'nin' has no attribute {name!r}")
    if home == "nin":
        return importlib.import_module(f"nin.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
