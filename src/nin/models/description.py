"""The architecture of a network as plain data for JSON, and the network of it."""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from nin.errors import UserError
from nin.models.external_classifier import ExternalClassifier
from nin.models.factory import MODELS, create, is_external_name
from nin.models.googlenet import GoogLeNet, googlenet
from nin.models.narrowing_plan import Plan
from nin.models.nin import NiN, NiNConfig
from nin.models.surgery import apply_plan
from nin.names import LIBRARIES


def model_description(model: nn.Module) -> dict[str, Any]:
    """Return the architecture as plain data for JSON, which `model_from_description` takes.

    Raises:
        TypeError: the model is none of `nin.models`.
    """
    if isinstance(model, NiN):
        return {"kind": "nin", "config": model.config.to_dict()}
    if isinstance(model, GoogLeNet):
        return {"kind": "googlenet", "num_classes": model.num_classes, "in_channels": model.in_channels}
    if isinstance(model, ExternalClassifier):
        sizes = {"num_classes": model.num_classes, "in_channels": model.in_channels}
        return {"kind": "external", "name": model.name, **sizes}
    raise TypeError(f"model must be one of nin.models, got {type(model).__name__}")


def narrowed_description(base: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the description of a narrowed network: that of the network it was made from, and the plan."""
    return {"kind": "narrowed", "base": dict(base), "plan": plan.to_dict()}


@contextlib.contextmanager
def trust(*names: str) -> Iterator[None]:
    """Let run folders import the modules of their ``package.module:factory`` within the block.

    A run folder may be another person's, and such a name is code that it asks to be run.

    Args:
        names: of networks; all if not given.
    """
    token = _trusted.set(names or None)
    try:
        yield
    finally:
        _trusted.reset(token)


def is_trusted(name: str) -> bool:
    """Return whether a network that a run folder names may be made: by a library, or by a module that is trusted."""
    trusted = _trusted.get()
    return name in MODELS or name.partition(":")[0] in LIBRARIES or trusted is None or name in trusted


# names whose modules may be imported; None stands for all
_trusted: ContextVar[tuple[str, ...] | None] = ContextVar("trusted", default=("",))


def model_name(description: Mapping[str, Any]) -> str:
    """Return the name of an architecture, for people."""
    if description["kind"] == "narrowed":
        return f"{model_name(description['base'])}, narrowed"
    return str(description.get("name", description.get("config", {}).get("name", description["kind"])))


def model_from_description(description: Mapping[str, Any]) -> nn.Module:
    """Return a network with random weights of an architecture.

    Raises:
        ValueError, TypeError, KeyError: the description is not one that `model_description` wrote.
        UserError: it names a network of another package that is not here, or somebody's factory that is not trusted,
            see `trust`.
    """
    match description["kind"]:
        case "nin":
            return NiN(NiNConfig.from_dict(description["config"]))
        case "googlenet":
            return googlenet(description["num_classes"], in_channels=description["in_channels"])
        case "external":
            name = description["name"]
            if name in MODELS or not is_external_name(name):
                raise ValueError(f"name must be that of a network of another package, got {name!r}")
            if not is_trusted(name):
                raise UserError(
                    f"its network is made by {name}, code that is not nin's: if you trust it, give --trust, in Python "
                    "nin.load(…, trust=True) or with nin.models.trust()"
                )
            with torch.device("cpu"):  # on the meta device they lose the buffers that are no weights
                return create(name, description["num_classes"], in_channels=description["in_channels"])
        case "narrowed":
            base = model_from_description(description["base"])
            with next(base.parameters()).device:  # where it is loaded from a file, only nin's own are on meta
                return apply_plan(base, description["plan"])
        case kind:
            raise ValueError(f"the model's kind must be 'nin', 'googlenet', 'external' or 'narrowed', got {kind!r}")
