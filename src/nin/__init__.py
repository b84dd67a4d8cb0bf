"""nin: Network in Network, real. 1×1 convolutions to look at, train with, shrink networks with and run fast.

The public names are loaded when they are first used, so that ``import nin`` and ``nin --help`` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nin import data, models
    from nin.config import TrainConfig
    from nin.exporters import export
    from nin.fusion import fuse
    from nin.inference.classifier import Classifier, load
    from nin.layers import Bottleneck, Conv1x1, GlobalAveragePooling, Inception, InvertedBottleneck, MLPConv
    from nin.narrowing import NarrowOptions, apply_plan, narrow
    from nin.ops import backends, conv1x1, freeze, inverted_bottleneck, mlpconv
    from nin.profiling.cost import cost
    from nin.sklearn import NiNClassifier
    from nin.speed_search.search import speed
    from nin.training import train

# the module that each public name comes from
_MODULES = {
    "nin.config": ("TrainConfig",),
    "nin.exporters": ("export",),
    "nin.fusion": ("fuse",),
    "nin.inference.classifier": ("Classifier", "load"),
    "nin.layers": ("Bottleneck", "Conv1x1", "GlobalAveragePooling", "Inception", "InvertedBottleneck", "MLPConv"),
    "nin.narrowing": ("NarrowOptions", "apply_plan", "narrow"),
    "nin.ops": ("backends", "conv1x1", "freeze", "inverted_bottleneck", "mlpconv"),
    "nin.profiling.cost": ("cost",),
    "nin.sklearn": ("NiNClassifier",),
    "nin.speed_search.search": ("speed",),
    "nin.training": ("train",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Bottleneck",
    "Classifier",
    "Conv1x1",
    "GlobalAveragePooling",
    "Inception",
    "InvertedBottleneck",
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
    "freeze",
    "fuse",
    "inverted_bottleneck",
    "load",
    "mlpconv",
    "models",
    "narrow",
    "speed",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "models"):
        return importlib.import_module(f"nin.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'nin' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
