"""Networks by name: nin's own, and ``timm:NAME``, ``torchvision:NAME`` or ``package.module:factory``."""

import dataclasses
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from nin.errors import UserError, is_out_of_memory
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

NAME_FORMS = "timm:NAME, torchvision:NAME, package.module:factory"

# The input of a network that does not say: colour images of the size at which most networks are published.
DEFAULT_CHANNELS, DEFAULT_SIZE = 3, 224


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


@dataclasses.dataclass(frozen=True)
class ExternalModel:
    """A network of another package, and the input that it is meant for.

    Attributes:
        model: with random weights, unless its own factory gives others.
        channels: of an image.
        height: of an image, in pixels.
        width: of an image, in pixels.
    """

    model: nn.Module
    channels: int = DEFAULT_CHANNELS
    height: int = DEFAULT_SIZE
    width: int = DEFAULT_SIZE


def is_external_name(text: str) -> bool:
    """Return whether a string has a form that `create_external_model` takes; there need not be such a network."""
    package, _, name = text.partition(":")
    return bool(name) and all(part.isidentifier() for part in package.split("."))


def create_external_model(text: str, *, classes: int | None = None, channels: int | None = None) -> ExternalModel:
    """Return a new network of that name, without downloading weights.

    Args:
        text: ``timm:NAME``, ``torchvision:NAME``, or ``package.module:factory``: a function or class that is called
            without arguments. The working directory is searched for the package too.
        classes: number of classes; the network's default if not given.
        channels: of the images; the network's default if not given.

    Raises:
        UserError: there is no such network, its package is not installed, or it does not take classes or channels.

    Example:
        >>> from nin.models.factory import create_external_model
        >>> create_external_model("torchvision:squeezenet1_1", classes=10).model.classifier[1].out_channels
        10
    """
    if not is_external_name(text):
        raise UserError(f"{text!r} is no name of a network; expected {NAME_FORMS}")
    package, _, name = text.partition(":")
    if package == "timm":
        return _from_timm(name, classes, channels)
    if package == "torchvision":
        return _from_torchvision(name, classes, channels)
    if classes is not None:
        raise UserError(f"classes must not be given with {text}: the factory is called without arguments")
    return ExternalModel(_from_factory(text), channels or DEFAULT_CHANNELS)


def _from_timm(name: str, classes: int | None, channels: int | None) -> ExternalModel:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"timm:{name} needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise UserError(f"timm {timm.__version__} has no network {name!r}; timm.list_models() lists them")
    given = {"num_classes": classes, "in_chans": channels}
    model = timm.create_model(name, pretrained=False, **{k: v for k, v in given.items() if v is not None})
    default_input = (DEFAULT_CHANNELS, DEFAULT_SIZE, DEFAULT_SIZE)
    default_channels, height, width = model.default_cfg.get("input_size", default_input)
    return ExternalModel(model, channels or default_channels, height, width)


def _from_torchvision(name: str, classes: int | None, channels: int | None) -> ExternalModel:
    models: Any = importlib.import_module("torchvision.models")  # slow to import, and only these names need it
    if name not in models.list_models():
        raise UserError(f"torchvision has no network {name!r}; torchvision.models.list_models() lists them")
    if channels not in (None, DEFAULT_CHANNELS):
        raise UserError(f"channels must be 3 with torchvision:{name}, got {channels}: its networks take colour images")
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if "weights_backbone" in parameters:
        options["weights_backbone"] = None  # segmentation and detection networks download them by default
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # these two warn that their default will change
    model = models.get_model(name, weights=None, **options)
    size = _torchvision_size(models.get_model_weights(name))
    return ExternalModel(model, DEFAULT_CHANNELS, size, size)


def _torchvision_size(weights: Any) -> int:
    """Return the height and width of the images that the published weights were trained with."""
    transforms = getattr(getattr(weights, "DEFAULT", None), "transforms", None)
    size = getattr(transforms, "keywords", {}).get("crop_size", DEFAULT_SIZE)
    return int(size[0] if isinstance(size, tuple | list) else size)


def _from_factory(text: str) -> nn.Module:
    """Import ``package.module:factory`` and return what the factory returns."""
    module_name, _, name = text.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # python -m puts it there, a console script does not
    try:
        factory: Any = importlib.import_module(module_name)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{text} was not found: {error}") from error
    except Exception as error:  # somebody's own module may raise anything while it is imported
        if is_out_of_memory(error):
            raise
        raise UserError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(factory):
        raise UserError(f"{text} must be a function or class that makes the network, got {type(factory).__name__}")
    _check_takes_no_arguments(text, factory)
    try:
        model = factory()
    except Exception as error:  # somebody's own code may raise anything
        if is_out_of_memory(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{text} failed in {place.filename}, line {place.lineno}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{text} must give a torch.nn.Module, got {type(model).__name__}")
    return model


def _check_takes_no_arguments(text: str, factory: Callable[..., Any]) -> None:
    try:
        inspect.signature(factory).bind()
    except ValueError:
        return  # written in C, without a signature
    except TypeError as error:
        raise UserError(f"{text} must be callable without arguments: {error}") from error


# What the first layer of a network says of its input, where it is not for images.
_OTHER_INPUTS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "numbers of tokens, not images"),
    ((nn.Conv1d, nn.ConvTranspose1d), "series or sound (N, C, L), not images"),
    ((nn.Conv3d, nn.ConvTranspose3d), "videos or volumes (N, C, D, H, W), not images"),
    ((nn.RNNBase, nn.Transformer, nn.TransformerEncoder, nn.MultiheadAttention), "sequences of vectors, not images"),
)


def describe_other_input(model: nn.Module) -> str | None:
    """Return what a network takes that is not one batch of images (N, C, H, W), or None where that is not known.

    Example:
        >>> from nin.models.factory import describe_other_input
        >>> describe_other_input(torch.nn.Sequential(torch.nn.Embedding(9, 4)))
        'numbers of tokens, not images'
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (ValueError, TypeError):
        parameters = {}.values()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind in (*by_position, p.KEYWORD_ONLY)]
    if len(required) > 1:
        return f"{len(required)} inputs ({', '.join(required)}), not one of images"
    layers = (module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    first = next(layers, None)
    if isinstance(first, nn.Linear):
        return f"vectors of {first.in_features:,} values, by its first layer, not images"
    return next((text for kinds, text in _OTHER_INPUTS if isinstance(first, kinds)), None)
