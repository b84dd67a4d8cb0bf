"""Whole networks, what narrowing makes of them, and networks that a string names."""

from nin.models.nin import (
    IMAGE_SIZES,
    MODELS,
    BlockConfig,
    GoogLeNet,
    Network,
    NiN,
    NiNConfig,
    create,
    fastest_layout,
    googlenet,
    nin_cifar,
    nin_digits,
    nin_imagenet,
)

__all__ = [
    "IMAGE_SIZES",
    "MODELS",
    "BlockConfig",
    "GoogLeNet",
    "Network",
    "NiN",
    "NiNConfig",
    "create",
    "fastest_layout",
    "googlenet",
    "nin_cifar",
    "nin_digits",
    "nin_imagenet",
]
