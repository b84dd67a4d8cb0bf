"""Network surgery: layers are replaced by what a plan says, and channels are cut from modules."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nin.layers import Conv1x1, MLPConv
from nin.models.layer_spec import LayerSpec, factorised_layers
from nin.models.narrowing_plan import LayerPlan, Plan
from nin.models.nin import NiN
from nin.runtime.model_copy import copy_model


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
    elif not isinstance(plan, Plan):
        raise ValueError(f"plan must be a Plan, or what its to_dict or to_json gave, got {type(plan).__name__}")
    new = to_plain_layers(model)
    for layer in plan.layers:
        module = get_layer(new, layer.name)
        spec = LayerSpec.of_module(layer.name, module)
        if planned_layers(spec, layer) != (spec,):
            if is_same_padded_depthwise(module) and layer.form == "keep":
                replace_module(new, layer.name, select_outputs(module, torch.arange(layer.outputs)))
                continue
            if type(module) not in (nn.Conv2d, nn.Linear):
                kind = type(module).__name__
                raise ValueError(f"plan does not fit the model: {layer.name} is a {kind}, whose forward may differ")
            replace_module(new, layer.name, make_planned_module(layer, module))
    for pruning in plan.pruned:
        for name in pruning.between:
            module = get_module(new, name)
            # depthwise layers are among plan.layers and have their size already
            if isinstance(module, nn.BatchNorm2d):
                left = module.num_features - (pruning.before - pruning.channels)
                if left < 1:
                    raise ValueError(f"plan does not fit the model: {name} has {module.num_features} channels")
                replace_module(new, name, select_outputs(module, torch.arange(left)))
    return to_layout(new, plan.layout)


def to_plain_layers(model: nn.Module) -> nn.Module:
    """Return a copy in which nin's own layers are ``nn.Sequential`` of ``nn.Conv2d`` and activations."""
    model = copy_model(model)
    if isinstance(model, NiN):
        model.fold()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, MLPConv | Conv1x1):
            if not name:
                return module.to_sequential()
            replace_module(model, name, module.to_sequential())
    return model


def to_layout(model: nn.Module, layout: str) -> nn.Module:
    """Return the model with its weights in that memory layout, "contiguous" or "channels_last"."""
    if layout == "channels_last":
        return model.to(memory_format=torch.channels_last)
    return model


def make_planned_module(layer: LayerPlan, module: nn.Module) -> nn.Module:
    """Return the new layer that a plan asks for, or the ``nn.Sequential`` of its factors, with fresh weights."""
    chain = planned_layers(LayerSpec.of_module(layer.name, module), layer)
    modules = [spec.make_layer(module.get_parameter("weight")) for spec in chain]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def planned_layers(spec: LayerSpec, layer: LayerPlan) -> tuple[LayerSpec, ...]:
    """Return the chain of layers that a plan puts in the place of one."""
    return factorised_layers(
        spec, layer.form, layer.rank_in, layer.rank_out, inputs=layer.inputs, outputs=layer.outputs
    )


def is_same_padded_depthwise(module: nn.Module) -> bool:
    """Return whether a module is timm's depthwise convolution with TensorFlow's padding, which channels can leave.

    It pads by the size of its input and convolves: of another subclass the forward may be anything.
    """
    return (
        type(module).__name__ == "Conv2dSame"
        and type(module).__module__.startswith("timm.")
        and isinstance(module, nn.Conv2d)
        and 1 < module.groups == module.in_channels == module.out_channels
    )


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the convolution or fully connected layer of that name, of a subclass too.

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


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of that name, under every name by which the model holds it."""
    old = model.get_submodule(name)
    module.train(old.training)
    # remove_duplicate: a module that several parents share is found once for each of them
    for alias, found in list(model.named_modules(remove_duplicate=False)):
        if found is old:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def select_outputs(module: nn.Module, kept: Tensor) -> nn.Module:
    """Return a copy of a layer, of a chain of layers or of a BatchNorm with these output channels only.

    They are the first dimension of all its tensors. Of a depthwise layer the input channels of the same numbers go too.
    """
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*module[:-1], select_outputs(module[-1], kept))
    new = copy.deepcopy(module)
    counts = ["num_features" if isinstance(module, nn.BatchNorm2d) else "out_features"]
    if isinstance(module, nn.Conv2d):
        depthwise = LayerSpec.of_module("", module).is_depthwise
        counts = ["in_channels", "out_channels", "groups"] if depthwise else ["out_channels"]
    for name in counts:
        setattr(new, name, len(kept))
    for name, parameter in new._parameters.items():
        if parameter is not None:
            cut = parameter.detach()[kept.to(parameter.device)].clone()
            new._parameters[name] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
    for name, buffer in new._buffers.items():
        if buffer is not None and buffer.dim() == 1:  # not num_batches_tracked
            new._buffers[name] = buffer[kept.to(buffer.device)].clone()
    return new
