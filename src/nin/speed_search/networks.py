"""Networks in folders: those of runs, and those of other packages with their name and plan; and how they are fused."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from nin import checkpoint, fusion, models
from nin.models.factory import create_external_model
from nin.models.narrowing_plan import Plan
from nin.models.surgery import apply_plan, to_plain_layers
from nin.runtime.files import write_atomically
from nin.runtime.model_copy import keep_computed_weights
from nin.runtime.weight_files import read_tensors

# in the folder of another package's network: its name, and the plan of `nin.narrow` where there is one
NETWORK_FILE, PLAN_FILE = "network.json", "plan.json"


def save_run(folder: Path, model: nn.Module, info: checkpoint.RunInfo, plan: Plan | None) -> None:
    """Write a run folder with the network of a run, or with its narrowed form."""
    folder.mkdir(parents=True, exist_ok=True)
    if plan is not None:
        info = dataclasses.replace(info, model=checkpoint.narrowed_description(info.model, plan))
    elif isinstance(model, models.NiN):  # folded, or not
        info = dataclasses.replace(info, model=checkpoint.model_description(model))
    checkpoint.save_model(folder, model, info)


def save_named(
    folder: Path, model: nn.Module, name: str, plan: Plan | None, *, made_for: Mapping[str, int] | None = None
) -> None:
    """Write the folder of another package's network, or of its narrowed form.

    Args:
        folder: to make.
        model: whose weights are written.
        name: of the network.
        plan: of the narrowed form.
        made_for: options with which `create_external_model` made it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in model.state_dict().items()}
    write_atomically(folder / checkpoint.MODEL_FILE, save(tensors, metadata={"format": "pt"}))
    if plan is not None:
        write_atomically(folder / PLAN_FILE, plan.to_json())
    write_atomically(folder / NETWORK_FILE, json.dumps({"name": name, **(made_for or {})}))


def load_network(folder: str | Path, *, plain: bool, trust: bool = False) -> nn.Module:
    """Return the network that `save_run` or `save_named` wrote, in evaluation mode, as it answers.

    Args:
        folder: of the network.
        plain: with PyTorch's own layers in the place of nin's.
        trust: import somebody's module that makes the network.
    """
    folder = Path(folder)
    if (folder / NETWORK_FILE).exists():
        described = json.loads((folder / NETWORK_FILE).read_text(encoding="utf-8"))
        model = create_external_model(described.pop("name"), **described).model
        if (folder / PLAN_FILE).exists():
            model = apply_plan(model, (folder / PLAN_FILE).read_text(encoding="utf-8"))
        model.load_state_dict(read_tensors(folder / checkpoint.MODEL_FILE)[0])
        model = model.eval()
    else:
        with models.trust() if trust else contextlib.nullcontext():
            model, _ = checkpoint.load_model(folder)
    if isinstance(model, models.NiN):
        model.fold()
    keep_computed_weights(model)
    return to_plain_layers(model) if plain else model


def fuse_for(model: nn.Module, example: Tensor) -> fusion.CompiledNetwork:
    """Return the network as nin's operator computes it fastest on an input of that shape."""
    model = model.to(memory_format=torch.channels_last)
    # the layers of nin's own networks are the operator already
    if isinstance(model, models.NiN):
        return fusion.CompiledNetwork(model, copies=False)
    return fusion.fuse(model, example).compile()
