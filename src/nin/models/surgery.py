"""From a plan to an architecture: plain modules take the places of the originals."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nin.models.layer_shape import LayerShape, expand, factors, make_layer, set_module, shape_of
from nin.models.plan import LayerPlan, Plan


def apply_plan(model: nn.Module, plan: Plan | dict[str, Any] | str) -> nn.Module:
    """Build the narrowed architecture, so that a narrowed model's ``state_dict`` loads into it.

    Args:
        model: the original architecture; its weights do not matter, and it is left as it is.
        plan: a `Plan`, or what its ``to_dict`` or ``to_json`` gave.

    Returns:
        A new model of plain PyTorch layers. Layers that the plan changes have fresh weights, the others those of
        ``model``.

    Raises:
        ValueError: the plan is none, or does not fit the model.

    Example:
        >>> model, batch = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3)), torch.randn(4, 8, 9, 9)
        >>> result = nin.narrow(model, [batch], macs=0.6)
        >>> again = nin.apply_plan(model, result.plan)
        >>> again.load_state_dict(result.model.state_dict())
        <All keys matched successfully>
    """
    if isinstance(plan, str):
        plan = Plan.from_json(plan)
    elif isinstance(plan, dict):
        plan = Plan.from_dict(plan)
    new = expand(model)
    for layer in plan.layers:
        module = get_layer(new, layer.name)
        if is_changed(layer, module):
            if type(module) not in (nn.Conv2d, nn.Linear):
                kind = type(module).__name__
                raise ValueError(f"plan does not fit the model: {layer.name} is a {kind}, whose forward may differ")
            set_module(new, layer.name, build_layer(layer, module))
    for thinning in plan.thinned:
        kept = torch.arange(thinning.channels)
        for name in thinning.between:
            # depthwise layers are among plan.layers and have their size already
            if isinstance(get_module(new, name), nn.BatchNorm2d):
                set_module(new, name, select_channels(get_module(new, name), kept))
    return to_layout(new, plan.layout)


def to_layout(model: nn.Module, layout: str) -> nn.Module:
    """Return the model with its weights laid out in memory as the plan says."""
    if layout == "channels_last":
        return model.to(memory_format=torch.channels_last)
    return model


def is_changed(layer: LayerPlan, module: nn.Module) -> bool:
    """Return whether the plan makes something else of a layer."""
    shape = shape_of(layer.name, module)
    return layer.form != "keep" or (layer.inputs, layer.outputs) != (shape.in_channels, shape.out_channels)


def build_layer(layer: LayerPlan, module: nn.Module) -> nn.Module:
    """Return the new layer, or the chain of layers, that a plan asks for, with fresh weights."""
    shape = shape_of(layer.name, module)
    pieces = chain_of(shape, layer)
    weight = module.weight
    assert isinstance(weight, Tensor)
    made = [make_layer(piece, weight) for piece in pieces]
    return made[0] if len(made) == 1 else nn.Sequential(*made)


def chain_of(shape: LayerShape, layer: LayerPlan) -> tuple[LayerShape, ...]:
    """Return the layers that a plan puts in the place of one."""
    return factors(shape, layer.form, layer.rank_in, layer.rank_out, inputs=layer.inputs, outputs=layer.outputs)


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the layer of that name; it may be of a subclass, which is left as it is.

    Raises:
        ValueError: there is none.
    """
    module = get_module(model, name)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise ValueError(f"plan does not fit the model: {name} must be a Conv2d or Linear, got {type(module).__name__}")
    return module


def get_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of that name.

    Raises:
        ValueError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"plan does not fit the model: it has no layer {name}") from error


@torch.no_grad()
def select_channels(module: nn.Module, kept: Tensor) -> nn.Module:
    """Return a copy of a BatchNorm or depthwise layer for these channels only."""
    new = copy.deepcopy(module)
    if isinstance(new, nn.Conv2d):
        new.in_channels = new.out_channels = new.groups = len(kept)
    else:
        assert isinstance(new, nn.BatchNorm2d)
        new.num_features = len(kept)
    _select(new, kept)
    return new


@torch.no_grad()
def select_outputs(module: nn.Module, kept: Tensor) -> nn.Module:
    """Return a copy of a layer, or of a chain of layers, that gives these channels only."""
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*module[:-1], select_outputs(module[-1], kept))
    new = copy.deepcopy(module)
    if isinstance(new, nn.Conv2d):
        new.out_channels = len(kept)
    else:
        assert isinstance(new, nn.Linear)
        new.out_features = len(kept)
    _select(new, kept)
    return new


def _select(module: nn.Module, kept: Tensor) -> None:
    """Cut every parameter and buffer of a module to these channels, which are their first dimension."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            cut = parameter.detach()[kept.to(parameter.device)].clone()
            module._parameters[name] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dim() == 1:
            module._buffers[name] = buffer[kept.to(buffer.device)].clone()
