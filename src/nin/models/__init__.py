"""The networks, what narrowing makes of them, and networks of other packages by name."""

from nin.models.description import is_trusted as is_trusted
from nin.models.description import model_name, trust
from nin.models.external_classifier import ExternalClassifier
from nin.models.factory import (
    IMAGE_SIZES,
    MODELS,
    Network,
    check_name,
    class_layer_name,
    create,
    is_external_name,
    no_maps_reason,
)
from nin.models.googlenet import GoogLeNet, googlenet
from nin.models.input_config import InputConfig
from nin.models.memory_format import fastest_layout
from nin.models.nin import BlockConfig, NiN, NiNConfig, nin_cifar, nin_digits, nin_imagenet
from nin.models.package_networks import check_pretrained, input_config

__all__ = [
    "IMAGE_SIZES",
    "MODELS",
    "BlockConfig",
    "ExternalClassifier",
    "GoogLeNet",
    "InputConfig",
    "Network",
    "NiN",
    "NiNConfig",
    "check_name",
    "check_pretrained",
    "class_layer_name",
    "create",
    "fastest_layout",
    "googlenet",
    "input_config",
    "is_external_name",
    "model_name",
    "nin_cifar",
    "nin_digits",
    "nin_imagenet",
    "no_maps_reason",
    "trust",
]
