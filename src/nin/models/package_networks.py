"""Networks that timm, torchvision and somebody's own module make, with or without the weights they publish."""

import contextlib
import importlib
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nin.errors import UserError, is_out_of_memory
from nin.models.input_config import InputConfig
from nin.names import unknown_library_name
from nin.version import install_command

# The input of a network that does not say: colour images of the size at which most networks are published.
DEFAULT_CHANNELS, DEFAULT_SIZE = 3, 224

# that the Hub may take to answer, where its weights are to be downloaded
HUB_SECONDS = 10.0


def check_library_name(package: str, name: str) -> None:
    """Refuse a name that timm or torchvision does not know."""
    if package == "timm":
        timm = import_timm(name)
        known = timm.is_model(name)
        # the tag after the point names the weights
        names = timm.list_models()
        if "." in name and timm.is_model(name.split(".")[0]):
            known = name.split(".", 1)[1] in (tag.split(".", 1)[1] for tag in _timm_tags(name))
            names = _timm_tags(name)
    else:
        models: Any = importlib.import_module("torchvision.models")  # slow to import, and only these names need it
        names = models.list_models()
        known = name in names
    if not known:
        raise UserError(unknown_library_name(package, name, names))


def _timm_tags(name: str) -> list[str]:
    """Return timm's names of the weights of a network, "NETWORK.TAG"."""
    timm = import_timm(name)
    return list(timm.list_pretrained(f"{name.split('.')[0]}.*"))


def import_timm(name: str) -> Any:
    """Return the package timm; the name is that of the network that needs it."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"timm:{name} needs timm: {install_command('timm')}") from error


def create_network(
    name: str, num_classes: int, *, in_channels: int = DEFAULT_CHANNELS, pretrained: bool = False
) -> tuple[nn.Module, InputConfig]:
    """Return the network itself, as its package makes it, for these images, and what its weights were trained with.

    Its classes are as many as asked for where its package takes a number; the arguments are those of
    `create_classifier`.
    """
    package, _, own = name.partition(":")
    if pretrained:
        network = create_pretrained(name, num_classes, in_channels)
    elif package == "timm":
        network = from_timm(own, num_classes, in_channels)
    elif package == "torchvision":
        network = adapt_channels(from_torchvision(own, num_classes), in_channels)
    else:
        network = adapt_channels(from_factory(name, num_classes=num_classes, in_channels=in_channels), in_channels)
    return network, input_config(name).with_channels(in_channels)


def input_config(name: str) -> InputConfig:
    """Return what the published weights of a network were trained with, without building it.

    For ``package.module:factory``, whose weights are not known, it is what most published networks have.
    """
    package, _, own = name.partition(":")
    if package == "timm":
        return InputConfig.from_timm(import_timm(own).get_pretrained_cfg(own) or {})
    if package == "torchvision":
        models: Any = importlib.import_module("torchvision.models")
        return InputConfig.from_torchvision(models.get_model_weights(own))
    return InputConfig()


def check_pretrained(name: str) -> None:
    """Check that the package of a network publishes weights of it.

    Raises:
        UserError: it does not.
    """
    package, _, own = name.partition(":")
    if package not in ("timm", "torchvision"):
        raise UserError(f"--pretrained is for timm:NAME and torchvision:NAME, got {name}: give --weights FILE")
    check_library_name(package, own)
    if package == "timm":
        published = import_timm(own).is_model_pretrained(own)
    else:
        published = len(importlib.import_module("torchvision.models").get_model_weights(own)) > 0
    if not published:
        raise UserError(f"{package} publishes no weights of {own}: give --weights FILE, or leave --pretrained away")


def create_pretrained(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """Return a network with the weights that its package publishes.

    Raises:
        UserError: there are none, or they can neither be downloaded nor are in the package's cache.
    """
    check_pretrained(name)
    package, _, own = name.partition(":")
    try:
        if package == "timm":
            _check_hub_answers(own)
            options = {"num_classes": num_classes, "in_chans": in_channels}
            network: nn.Module = import_timm(own).create_model(own, pretrained=True, **options)
            return network
        models: Any = importlib.import_module("torchvision.models")
        with contextlib.redirect_stdout(sys.stderr):  # where PyTorch says what it downloads
            network = models.get_model(own, weights="DEFAULT")
        return adapt_channels(network, in_channels)
    except _network_errors() as error:  # and a full disk
        raise UserError(_no_weights(name, error)) from error


def _check_hub_answers(name: str) -> None:
    """Ask the Hub once for a file of the weights that are not in its cache: timm would ask for most of a minute.

    Raises:
        ConnectionError: it cannot be reached.
    """
    cfg = import_timm(name).get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return
    hub, errors = map(importlib.import_module, ("huggingface_hub", "huggingface_hub.errors"))
    files = (cfg.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    if any(isinstance(hub.try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files if file):
        return
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(cfg.hf_hub_id, "config.json"), timeout=HUB_SECONDS)
    except errors.HfHubHTTPError as error:
        if error.response is None or error.response.status_code >= 500:
            raise ConnectionError(str(error)) from error
        # it answers: what it refuses, the download says
    except _network_errors() as error:
        raise ConnectionError(str(error)) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """Return what a download without a network raises: OSError by urllib and requests, others by the Hub's package."""
    used = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return OSError, *(package.TransportError for package in used)


def _no_weights(name: str, error: BaseException) -> str:
    inner: BaseException | None = error
    while inner is not None:  # the system's own words are in the middle of what packages make of them
        error = inner if isinstance(inner, OSError) else error
        inner = inner.__cause__ or inner.__context__
    text = str(error).strip().splitlines()
    reason = textwrap.shorten(f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": "), 120, placeholder=" …")
    return (
        f"the weights of {name} cannot be had: they are not in the package's cache and could not be downloaded "
        f"({reason}). With a network, run it once more; without one, give --weights FILE, a .safetensors or .pth "
        "that was downloaded elsewhere, or leave --pretrained away"
    )


def adapt_channels(network: nn.Module, channels: int) -> nn.Module:
    """Return a network whose first convolution takes images of that many channels, in place.

    Its weights are summed for one channel, so that a grey image gives what a colour image of three times itself would;
    for other numbers they are repeated, and scaled to keep the size of the sum, as timm does.

    Raises:
        UserError: its first layer is no convolution.
    """
    first = first_convolution(network)
    if first is None or first.in_channels == channels:
        if first is None and channels != DEFAULT_CHANNELS:
            raise UserError(f"images: the network takes colour images, got {channels} channels")
        return network
    first.weight = nn.Parameter(weight_for_channels(first.weight.detach(), channels))
    first.in_channels = channels
    return network


def first_convolution(network: nn.Module) -> nn.Conv2d | None:
    """Return the layer that takes the images, or None where it is no convolution of all their channels together."""
    first = next((module for module in network.modules() if module._parameters), network)
    return first if isinstance(first, nn.Conv2d) and first.groups == 1 else None


def weight_for_channels(weight: Tensor, channels: int) -> Tensor:
    """Return the weight (C_out, C_in, k, k) of a first convolution for images of another number of channels."""
    count = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // count), 1, 1)[:, :channels] * (count / channels)


def from_timm(name: str, classes: int | None, channels: int | None) -> nn.Module:
    """Return timm's network of that name with random weights; None leaves classes or channels as timm has them."""
    check_library_name("timm", name)
    given = {"num_classes": classes, "in_chans": channels}
    options = {key: value for key, value in given.items() if value is not None}
    return import_timm(name).create_model(name, pretrained=False, **options)


def from_torchvision(name: str, classes: int | None) -> nn.Module:
    """Return torchvision's network of that name with random weights; None leaves the classes as they are."""
    check_library_name("torchvision", name)
    models: Any = importlib.import_module("torchvision.models")
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if "weights_backbone" in parameters:
        options["weights_backbone"] = None  # segmentation and detection networks download them by default
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # these two warn that their default will change
    return models.get_model(name, weights=None, **options)


def from_factory(text: str, **wanted: int) -> nn.Module:
    """Import ``package.module:factory`` and return what the factory returns.

    Args:
        text: the name.
        wanted: arguments for it, where it has them.
    """
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
    arguments = _known_arguments(factory, wanted)
    try:
        model = factory(**arguments)
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


def _known_arguments(factory: Callable[..., Any], wanted: dict[str, int]) -> dict[str, int]:
    """Return the arguments that a factory names."""
    try:
        names = inspect.signature(factory).parameters
    except ValueError:
        return {}
    return {name: value for name, value in wanted.items() if name in names}
