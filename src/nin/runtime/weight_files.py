"""Files of weights: safetensors, and state_dicts that torch.save wrote, which are read without running code."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nin.errors import UserError


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
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} must hold a state_dict that torch.save wrote, and nothing else: {reason}") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # averaged weights first, as timm takes them
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} must hold a state_dict, names and tensors, got {type(state).__name__}")
    return {_plain_name(name): value for name, value in state.items()}


def _plain_name(name: str) -> str:
    """Return the name of a tensor without what DistributedDataParallel and torch.compile put before it."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name
