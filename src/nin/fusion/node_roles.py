"""What the nodes of a traced graph compute: activations, layers that can be in a chain, means and products."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nin.fusion.chain import is_hooked
from nin.layers import ACTIVATION_NAMES

# by the function, or by the method's name
_FUNCTION_NAMES: dict[Any, str] = {
    **{F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.gelu: "gelu", F.silu: "silu"},
    **{F.relu6: "relu6", F.hardswish: "hardswish"},
    **{"relu": "relu", "relu_": "relu"},
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"),
    F.hardsigmoid: "hardsigmoid",
}
_MODULE_NAMES: dict[type, str] = {
    **{**ACTIVATION_NAMES, nn.ReLU6: "relu6", nn.Hardswish: "hardswish"},
    **{nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"},
}


def unsupported_reason(layer: nn.Module, calls: int, *, first: bool) -> str | None:
    """Return why a layer cannot be in a chain, or None if it can."""
    if calls > 1:
        return "it is called more than once"
    if is_hooked(layer):
        return "a hook looks at it"
    if type(layer) is nn.Linear:
        return None
    if type(layer) is not nn.Conv2d:
        return f"it is a {type(layer).__name__}, whose forward may differ"
    if layer.groups != 1:
        return "it has groups"
    return _unsupported_geometry(layer, pointwise=not first)


def _unsupported_geometry(layer: nn.Conv2d, *, pointwise: bool) -> str | None:
    """Return why a convolution with this geometry cannot be in a chain, or None if it can."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"its padding is {layer.padding_mode if layer.padding_mode != 'zeros' else layer.padding!r}"
    if pointwise and (layer.kernel_size, layer.stride, layer.padding) != ((1, 1), (1, 1), (0, 0)):
        return "it looks at more than one pixel"
    return None


def input_of(node: fx.Node) -> fx.Node:
    """Return the input of a layer's call, which may have been given by its name."""
    (x,) = node.all_input_nodes
    return x


def has_role(layer: nn.Module, calls: int, role: str) -> bool:
    """Return whether a layer is one of an inverted bottleneck's: 1×1 on every pixel, or a filter for each channel."""
    if role == "pointwise":
        return type(layer) is nn.Conv2d and unsupported_reason(layer, calls, first=False) is None
    return (
        type(layer) is nn.Conv2d
        and calls == 1
        and not is_hooked(layer)
        and 1 < layer.groups == layer.in_channels == layer.out_channels
        and _unsupported_geometry(layer, pointwise=False) is None
    )


def is_convolution(layer: nn.Module) -> bool:
    """Return whether a layer is a plain convolution with zeros around the image, of any groups."""
    return type(layer) is nn.Conv2d and _unsupported_geometry(layer, pointwise=False) is None


def is_pointwise(layer: nn.Module) -> bool:
    """Return whether a layer looks at one pixel at a time."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def is_mean(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a node takes the mean over the image, (N, C, 1, 1)."""
    if module is not None:
        return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1), [1, 1])
    names, values = ("input", "dim", "keepdim"), dict(node.kwargs)
    if node.target is F.adaptive_avg_pool2d:
        return {**dict(zip(("input", "output_size"), node.args, strict=False)), **values}.get("output_size") in (
            1,
            (1, 1),
        )
    values |= dict(zip(names, node.args, strict=False))
    dim = values.get("dim")
    over_image = isinstance(dim, tuple | list) and sorted(d % 4 for d in dim if isinstance(d, int)) == [2, 3]
    return node.target in ("mean", torch.mean) and over_image and values.get("keepdim") is True and len(values) == 3


def is_product(node: fx.Node, a: fx.Node, b: fx.Node) -> bool:
    """Return whether a node multiplies two others."""
    return (
        node.op in ("call_function", "call_method")
        and node.target in (operator.mul, torch.mul, "mul")
        and (node.args in ((a, b), (b, a)) and not node.kwargs)
    )


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the activation that a node computes, or None if it is not one of the operator's."""
    if node.op == "call_module":
        return _module_activation(modules.get(str(node.target)))
    if node.op not in ("call_function", "call_method") or len(node.args) > 2:
        return None
    return None if node.kwargs.get("approximate", "none") != "none" else _FUNCTION_NAMES.get(node.target)


def _module_activation(module: nn.Module | None) -> str | None:
    """Return the name of an activation module; None for anything else, such as GELU's approximation with tanh."""
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    if isinstance(module, nn.ReLU6) and (module.min_val, module.max_val) != (0, 6):  # somebody changed them
        return None
    return _MODULE_NAMES.get(type(module))


def activation_inside(norm: nn.BatchNorm2d) -> str | None:
    """Return the activation that a BatchNorm applies, "none", or None if it computes anything else.

    timm's BatchNormAct2d applies its modules ``drop`` and ``act``.
    """
    if type(norm) is nn.BatchNorm2d:
        return "none"
    act, drop = getattr(norm, "act", None), getattr(norm, "drop", None)
    if type(norm).__name__ != "BatchNormAct2d" or type(drop) is not nn.Identity:
        return None
    return "none" if type(act) is nn.Identity else _module_activation(act)


def is_stochastic_depth(node: fx.Node) -> bool:
    """Return whether a node is torchvision's stochastic depth in evaluation, which returns its input."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != "torchvision.ops.stochastic_depth":
        return False
    values: dict[str, Any] = {**dict(zip(("input", "p", "mode", "training"), node.args, strict=False)), **node.kwargs}
    return values.get("training") is False or bool(values.get("p") == 0)


def does_nothing(module: nn.Module) -> bool:
    """Return whether a module returns its input: an identity, or dropout in evaluation."""
    if isinstance(module, nn.Dropout | nn.Dropout2d):
        return not module.training or module.p == 0
    return type(module) is nn.Identity
