"""A network named by a string: ``timm:NAME``, ``torchvision:NAME`` or ``package.module:factory``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from nin.errors import UserError

FORMS = "timm:NAME, torchvision:NAME, package.module:factory"

# What a network of unknown habits is given: three channels, and the size that most networks are published for.
USUAL_CHANNELS, USUAL_SIZE = 3, 224


@dataclasses.dataclass(frozen=True)
class NamedNetwork:
    """A network, and the images that it is meant for.

    Attributes:
        model: with random weights, unless its own factory gives others.
        channels: of an image.
        height: of an image, in pixels.
        width: the same.
    """

    model: nn.Module
    channels: int = USUAL_CHANNELS
    height: int = USUAL_SIZE
    width: int = USUAL_SIZE


def is_name(text: str) -> bool:
    """Return whether a string has the form of a name that `make_network` takes; it may name nothing."""
    home, colon, name = text.partition(":")
    return bool(colon and home and name) and all(part.isidentifier() for part in home.split("."))


def make_network(text: str, *, classes: int | None = None, channels: int | None = None) -> NamedNetwork:
    """Make the network of that name; nothing is downloaded.

    Args:
        text: ``timm:NAME``, ``torchvision:NAME`` or ``package.module:factory``, a function or class that is called
            without arguments; the folder that one is in is searched too.
        classes: number of classes; the network's usual one if not given.
        channels: of the images; the network's usual number if not given.

    Raises:
        UserError: there is no such network, its package is not installed, or it does not take classes or channels.

    Example:
        >>> from nin.models.factory import make_network
        >>> make_network("torchvision:squeezenet1_1", classes=10).model.classifier[1].out_channels
        10
    """
    if not is_name(text):
        raise UserError(f"{text!r} is no name of a network; expected {FORMS}")
    home, _, name = text.partition(":")
    if home == "timm":
        return _from_timm(name, classes, channels)
    if home == "torchvision":
        return _from_torchvision(name, classes, channels)
    if classes is not None:
        raise UserError(f"classes must not be given with {text}: the factory is called without arguments")
    return NamedNetwork(_from_factory(text), channels or USUAL_CHANNELS)


def _from_timm(name: str, classes: int | None, channels: int | None) -> NamedNetwork:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"timm:{name} needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise UserError(f"timm {timm.__version__} has no network {name!r}; timm.list_models() lists them")
    given = {"num_classes": classes, "in_chans": channels}
    model = timm.create_model(name, pretrained=False, **{k: v for k, v in given.items() if v is not None})
    usual, height, width = model.default_cfg.get("input_size", (USUAL_CHANNELS, USUAL_SIZE, USUAL_SIZE))
    return NamedNetwork(model, channels or usual, height, width)


def _from_torchvision(name: str, classes: int | None, channels: int | None) -> NamedNetwork:
    models: Any = importlib.import_module("torchvision.models")  # slow, and only these need it
    if name not in models.list_models():
        raise UserError(f"torchvision has no network {name!r}; torchvision.models.list_models() lists them")
    if channels not in (None, USUAL_CHANNELS):
        raise UserError(f"channels must be 3 with torchvision:{name}, got {channels}: its networks take colour images")
    known = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if "weights_backbone" in known:
        options["weights_backbone"] = None  # else the backbone's weights would be downloaded
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # the two that warn where they are not told
    model = models.get_model(name, weights=None, **options)
    size = _torchvision_size(models.get_model_weights(name))
    return NamedNetwork(model, USUAL_CHANNELS, size, size)


def _torchvision_size(weights: Any) -> int:
    """Return the size of the images that the published weights are for."""
    transforms = getattr(getattr(weights, "DEFAULT", None), "transforms", None)
    size = getattr(transforms, "keywords", {}).get("crop_size", USUAL_SIZE)
    return int(size[0] if isinstance(size, tuple | list) else size)


def _from_factory(text: str) -> nn.Module:
    """Call the factory."""
    module_name, _, name = text.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m does; a console script does not
    try:
        made: Any = importlib.import_module(module_name)
        for part in name.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{text} was not found: {error}") from error
    if not callable(made):
        raise UserError(f"{text} must be a function or class that makes the network, got {type(made).__name__}")
    _check_takes_nothing(text, made)
    network = made()
    if not isinstance(network, nn.Module):
        raise UserError(f"{text} must give a torch.nn.Module, got {type(network).__name__}")
    return network


def _check_takes_nothing(text: str, made: Callable[..., Any]) -> None:
    try:
        inspect.signature(made).bind()
    except ValueError:
        return  # written in C, and does not say what it takes
    except TypeError as error:
        raise UserError(f"{text} must be callable without arguments: {error}") from error
