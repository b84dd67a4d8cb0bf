"""The networks of nin by name: their functions, the sizes of their images, and `create`."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from nin.errors import UserError
from nin.models.googlenet import GoogLeNet, googlenet
from nin.models.nin import NiN, nin_cifar, nin_digits, nin_imagenet

# networks with class maps, whose means are the scores
Network: TypeAlias = NiN | GoogLeNet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "nin_digits": nin_digits,
    "nin_cifar": nin_cifar,
    "nin_imagenet": nin_imagenet,
    "googlenet": googlenet,
}

# height and width that each network is meant for, in pixels
IMAGE_SIZES = {"nin_digits": 8, "nin_cifar": 32, "nin_imagenet": 224, "googlenet": 224}


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Return a new network of `MODELS`.

    Args:
        name: of the network.
        num_classes: number of classes.
        options: for the network's function, such as ``in_channels`` and ``dropout``.

    Raises:
        UserError: there is no such network; the message lists those that there are.
    """
    if name not in MODELS:
        raise UserError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](num_classes, **options)
