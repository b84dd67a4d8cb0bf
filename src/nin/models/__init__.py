"""The networks, what narrowing makes of them, and networks of other packages by name."""

from nin.models.factory import IMAGE_SIZES, MODELS, Network, create
from nin.models.googlenet import GoogLeNet, googlenet
from nin.models.memory_format import fastest_layout
from nin.models.nin import BlockConfig, NiN, NiNConfig, nin_cifar, nin_digits, nin_imagenet

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
