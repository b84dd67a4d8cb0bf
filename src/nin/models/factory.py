"""Networks by name: nin's own, and ``timm:NAME``, ``torchvision:NAME`` or ``package.module:factory``."""

import contextlib
import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import nn

from nin import names
from nin.errors import UserError, is_out_of_memory
from nin.models.external_classifier import ExternalClassifier
from nin.models.googlenet import GoogLeNet, googlenet
from nin.models.head_surgery import cut_head
from nin.models.nin import NiN, nin_cifar, nin_digits, nin_imagenet
from nin.models.package_networks import (
    DEFAULT_CHANNELS,
    DEFAULT_SIZE,
    check_library_name,
    create_network,
    from_factory,
    from_timm,
    from_torchvision,
    input_config,
)
from nin.names import is_external_name as is_external_name

# the networks of a run folder; all have class maps, but for an `ExternalClassifier` that says why it has none
Network: TypeAlias = NiN | GoogLeNet | ExternalClassifier

MODELS: dict[str, Callable[..., nn.Module]] = {
    "nin_digits": nin_digits,
    "nin_cifar": nin_cifar,
    "nin_imagenet": nin_imagenet,
    "googlenet": googlenet,
}

# height and width that each network is meant for, in pixels
IMAGE_SIZES = {"nin_digits": 8, "nin_cifar": 32, "nin_imagenet": 224, "googlenet": 224}


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Return a new network, with random weights unless others are asked for.

    Args:
        name: of `MODELS`, or ``timm:NAME``, ``torchvision:NAME``, ``package.module:factory``, which become an
            `ExternalClassifier`.
        num_classes: number of classes.
        options: for the network's function, such as ``in_channels`` and ``dropout``; for networks of other packages
            those of `create_classifier`.

    Raises:
        UserError: there is no such network; the message says what was probably meant.
    """
    check_name(name)
    if name in MODELS:
        return MODELS[name](num_classes, **options)
    return create_classifier(name, num_classes, **options)


def check_name(name: str, *, also: str = "") -> None:
    """Check that there is a network of that name, as far as that is known without importing somebody's module.

    Args:
        name: of the network.
        also: what else may be given, for the message, such as "a run folder, ".

    Raises:
        UserError: there is none; the message says what was probably meant.
    """
    names.check_network(name, also=also)
    package, _, own = name.partition(":")
    if package in names.LIBRARIES and own:
        check_library_name(package, own)


def create_classifier(
    name: str,
    num_classes: int,
    *,
    in_channels: int = DEFAULT_CHANNELS,
    dropout: float = 0.0,
    pretrained: bool = False,
    prepare: Callable[[nn.Module, str | None], None] | None = None,
) -> ExternalClassifier:
    """Return the network of another package with that many classes.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME`` or ``package.module:factory``.
        num_classes: number of classes.
        in_channels: of the images.
        dropout: probability, before the class layer.
        pretrained: with the weights that the package publishes, which it downloads or has in its cache.
        prepare: called with the package's network and the name of its class layer, before that becomes a 1×1
            convolution: to load weights into it.

    Raises:
        UserError: there is no such network, it does not take the images, or its weights cannot be had.
    """
    network, input_config = create_network(name, num_classes, in_channels=in_channels, pretrained=pretrained)
    if prepare is not None:
        prepare(network, cut_head(network.eval()).class_layer)
    return ExternalClassifier(name, network, num_classes, input_config, dropout=dropout)


def no_maps_reason(model: nn.Module) -> str:
    """Return why a network has no class maps whose means are the scores; "" where it has."""
    if isinstance(model, ExternalClassifier):
        return model.no_maps_reason
    return "" if isinstance(model, Network) else f"a {type(model).__name__} is none of nin's networks"


def class_layer_name(model: nn.Module) -> str:
    """Return the name of the layer that gives the scores or the class maps of one of nin's networks."""
    if isinstance(model, NiN):
        return f"blocks.{len(model.blocks) - 1}.0.convs.{len(model.config.blocks[-1].channels) - 1}"
    return "classifier" if isinstance(model, GoogLeNet) else "head"


@dataclasses.dataclass(frozen=True)
class ExternalModel:
    """A network of another package, and the input that it is meant for.

    Attributes:
        model: with random weights, unless its own factory gives others.
        channels: of an image.
        height: of an image, in pixels.
        width: of an image, in pixels.
        made_for: the numbers of classes and of channels that were asked for, as options of `create_external_model`.
    """

    model: nn.Module
    channels: int = DEFAULT_CHANNELS
    height: int = DEFAULT_SIZE
    width: int = DEFAULT_SIZE
    made_for: dict[str, int] = dataclasses.field(default_factory=dict)


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
        raise UserError(f"{text!r} is no name of a network; expected {names.NAME_FORMS}")
    package, _, name = text.partition(":")
    made_for = {key: n for key, n in (("classes", classes), ("channels", channels)) if n is not None}
    if package == "timm":
        model = from_timm(name, classes, channels)
        cfg: Any = model.default_cfg
        usual, height, width = cfg.get("input_size", (DEFAULT_CHANNELS, DEFAULT_SIZE, DEFAULT_SIZE))
        return ExternalModel(model, channels or usual, height, width, made_for)
    if package == "torchvision":
        model = from_torchvision(name, classes)
        if channels not in (None, DEFAULT_CHANNELS):
            raise UserError(f"channels must be 3 with {text}, got {channels}: its networks take colour images")
        size = input_config(text).size
        return ExternalModel(model, DEFAULT_CHANNELS, size, size, made_for)
    if classes is not None:
        raise UserError(f"classes must not be given with {text}: the factory is called without arguments")
    return ExternalModel(from_factory(text), channels or DEFAULT_CHANNELS, made_for=made_for)


# What the first layer of a network says of its input, where it is not for images.
_OTHER_INPUTS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "numbers of tokens, not images"),
    ((nn.Conv1d, nn.ConvTranspose1d), "series or sound (N, C, L), not images"),
    ((nn.Conv3d, nn.ConvTranspose3d), "videos or volumes (N, C, D, H, W), not images"),
    ((nn.RNNBase, nn.Transformer, nn.TransformerEncoder, nn.MultiheadAttention), "sequences of vectors, not images"),
)


@contextlib.contextmanager
def explain_refused_images(model: nn.Module, name: str, images: str, *, given: str) -> Iterator[None]:
    """Turn an error of somebody's network into what it takes and what it was given; a fault of nin's own stays one.

    Args:
        model: the network that is called in the block.
        name: what it is called in the message.
        images: what it is given, such as 3×224×224.
        given: what nin gives a network, for one that takes something else.

    Raises:
        UserError: the network does not take the images.
    """
    try:
        yield
    except Exception as error:  # somebody's own network may raise anything
        if is_out_of_memory(error):
            raise
        if other := describe_other_input(model):
            raise UserError(f"{name} takes {other}: {given}") from error
        if not _is_of_network(error):
            raise
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"{name} does not take images of {images}: {reason}; another --size may help") from error


def _is_of_network(error: Exception) -> bool:
    """Return whether an error was raised in a network's forward, and not in the code that calls or counts it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    called = any(frame.f_code.co_name == "_call_impl" for frame in frames)  # of nn.Module
    return called and not str(frames[-1].f_globals.get("__name__")).startswith("nin.profiling")


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
