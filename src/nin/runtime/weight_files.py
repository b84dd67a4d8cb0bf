"""Files of weights: safetensors, and state_dicts that torch.save wrote, which are read without running code."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nin.errors import UserError

# of a checkpoint without weights so many entries are named
MOST_ENTRIES = 6


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Returns:
        Its tensors and its metadata.

    Raises:
        UserError: it is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the ``state_dict`` in a file, unwrapped from the checkpoint of a training script.

    Raises:
        UserError: the file is missing, damaged, or holds something else than tensors.
    """
    state = read_tensors(path)[0] if is_safetensors(path) else _unwrapped(path, _load(path))
    if not state:
        raise UserError(f"{path} must hold a state_dict, names and tensors: it is empty")
    return {_plain_name(name): value for name, value in state.items()}


def is_safetensors(path: Path) -> bool:
    """Return whether a file is one of safetensors, by its name: its tensors are sorted and have no order of layers."""
    return path.suffix == ".safetensors"


def _load(path: Path) -> Any:
    """Return what torch.save wrote into a file."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        with warnings.catch_warnings():  # of files that are refused in the next line
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = kind[1] if kind else "TorchScript" if "TorchScript" in str(error) else ""
        if name:
            raise UserError(
                f"{path} holds more than names and tensors ({name}), and to read that could run code: save the "
                "weights alone, by torch.save(model.state_dict(), FILE)"
            ) from error
        raise UserError(f"{path} is damaged, or no file of weights that torch.save wrote") from error


def _unwrapped(path: Path, state: Any) -> dict[str, Tensor]:
    """Return the names and tensors in a checkpoint; averaged weights first, as timm takes them."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if _is_state_dict(state) or (isinstance(state, dict) and not state):
        return dict(state)
    if not isinstance(state, dict):
        raise UserError(f"{path} must hold a state_dict, names and tensors, got {_describe(state)}")
    inside = [key for key, value in state.items() if _is_state_dict(value)]
    if len(inside) == 1:  # under a name of its script's own, such as "net"
        return dict(state[inside[0]])
    entries = ", ".join(f"{key} ({_describe(value)})" for key, value in list(state.items())[:MOST_ENTRIES])
    more = f" and {len(state) - MOST_ENTRIES} more" if len(state) > MOST_ENTRIES else ""
    which = f"{len(inside)} of its entries are state_dicts: save the one to take" if inside else "it holds"
    raise UserError(f"{path} must hold a state_dict, names and tensors; {which}: {entries}{more}")


def _is_state_dict(value: Any) -> bool:
    """Return whether a value is names and tensors, and some of them."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _describe(value: Any) -> str:
    """Return what an entry of a checkpoint is."""
    return "empty dict" if isinstance(value, dict) and not value else type(value).__name__


def _plain_name(name: str) -> str:
    """Return the name of a tensor without what DistributedDataParallel and torch.compile put before it."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name
