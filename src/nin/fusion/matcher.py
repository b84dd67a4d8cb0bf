"""Matching chains in a traced graph: which nodes one operator can replace."""

import dataclasses
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nin.fusion.chain import Chain, Link
from nin.layers import ACTIVATION_NAMES, MLPConv

# by the function, or by the method's name
_FUNCTION_NAMES: dict[Any, str] = {
    **{F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.gelu: "gelu", F.silu: "silu"},
    **{"relu": "relu", "relu_": "relu"},
}


class Tracer(fx.Tracer):
    """PyTorch's tracer, for which nin's own layers, chains and every subclass of BatchNorm are leaves too."""

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.path = path  # name of the traced module in the whole model

    def path_of_module(self, mod: nn.Module) -> str:
        """Return a module's name; that of a chain is its own, as it is no registered child, see `rewrite`."""
        return mod.path.removeprefix(f"{self.path}.") if isinstance(mod, Chain) else super().path_of_module(mod)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module becomes one node of the graph."""
        return isinstance(m, MLPConv | Chain | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


@dataclasses.dataclass
class ChainMatch:
    """A chain in a graph.

    Attributes:
        nodes: of the graph, from the first layer to the last activation.
        links: the layers of the nodes.
        layer_names: names of the layers in the traced module.
    """

    nodes: list[fx.Node]
    links: list[Link]
    layer_names: list[str]


def match_chains(model: nn.Module, graph: fx.Graph) -> tuple[list[ChainMatch], dict[str, str]]:
    """Return the chains of a graph, without nodes in common, and the 1×1 layers in none of them.

    Args:
        model: the traced module, in the mode, training or evaluation, in which chains are to run.
        graph: of its forward.

    Returns:
        The chains, and the reason why each other 1×1 layer is in none, by the layer's name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    taken: set[fx.Node] = set()
    matches, reasons = [], {}
    for node in graph.nodes:
        if node in taken or not _is_layer(node, modules):
            continue
        name = str(node.target)
        reason = unsupported_reason(modules[name], calls[name], first=True)
        if reason is None:
            match = _match_from(node, modules, calls)
            if len(match.nodes) > 1:
                matches.append(match)
                taken.update(match.nodes)
                continue
            reason = "nothing follows it that the operator does"
        if _is_pointwise(modules[name]):
            reasons[name] = reason
    return matches, reasons


def unsupported_reason(layer: nn.Module, calls: int, *, first: bool) -> str | None:
    """Return why a layer cannot be in a chain, or None if it can."""
    if calls > 1:
        return "it is called more than once"
    if is_hooked(layer) or layer._backward_hooks:
        return "a hook looks at it"
    if type(layer) is nn.Linear:
        return None
    if type(layer) is not nn.Conv2d:
        return f"it is a {type(layer).__name__}, whose forward may differ"
    if layer.groups != 1:
        return "it has groups"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"its padding is {layer.padding_mode if layer.padding_mode != 'zeros' else layer.padding!r}"
    if not first and (layer.kernel_size, layer.stride, layer.padding) != ((1, 1), (1, 1), (0, 0)):
        return "it looks at more than one pixel"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Return whether a hook sees a module's input or output, which it has only while it runs by itself."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), nn.Conv2d | nn.Linear)


def _is_pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def _match_from(start: fx.Node, modules: dict[str, nn.Module], calls: Counter[str]) -> ChainMatch:
    """Return the longest chain that begins with a layer."""
    first = modules[str(start.target)]
    assert isinstance(first, nn.Conv2d | nn.Linear)
    match, nodes = ChainMatch([start], [Link(first)], [str(start.target)]), [start]
    while len(nodes[-1].users) == 1:
        node = next(iter(nodes[-1].users))
        if node.args[:1] != (nodes[-1],) or nodes[-1] in node.kwargs.values():
            break
        link, activation = match.links[-1], _activation(node, modules)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and is_hooked(module):
            break
        if activation is not None and link.activation == "none":
            link.activation = activation
        elif isinstance(module, nn.BatchNorm2d) and link.norm is None and link.activation == "none":
            after = _activation_inside(module)
            if after is None or not _can_fold(module, link) or calls[str(node.target)] > 1:
                break
            link.norm, link.activation = module, after
        elif module is not None and _does_nothing(module):
            nodes.append(node)
            continue  # part of the chain only if something follows it
        elif (
            module is not None
            and type(module) is type(first)
            and unsupported_reason(module, calls[str(node.target)], first=False) is None
        ):
            assert isinstance(module, nn.Conv2d | nn.Linear)
            match.links.append(Link(module))
            match.layer_names.append(str(node.target))
        else:
            break
        nodes.append(node)
        match.nodes = list(nodes)
    if isinstance(first, nn.Linear) and len(match.links) < 2:
        # a single matrix product is as fast in PyTorch
        return ChainMatch([start], [Link(first)], match.layer_names)
    return match


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the activation that a node computes, or None if it is not one of the operator's."""
    if node.op == "call_module":
        return _module_activation(modules.get(str(node.target)))
    if node.op not in ("call_function", "call_method") or len(node.args) > 2:
        return None
    return None if node.kwargs.get("approximate", "none") != "none" else _FUNCTION_NAMES.get(node.target)


def _module_activation(module: nn.Module | None) -> str | None:
    """Return the name of an activation module; None for anything else, such as GELU's approximation with tanh."""
    exact = not isinstance(module, nn.GELU) or module.approximate == "none"
    return ACTIVATION_NAMES.get(type(module)) if exact else None


def _activation_inside(norm: nn.BatchNorm2d) -> str | None:
    """Return the activation that a BatchNorm applies, "none", or None if it computes anything else.

    timm's BatchNormAct2d applies its modules ``drop`` and ``act``.
    """
    if type(norm) is nn.BatchNorm2d:
        return "none"
    act, drop = getattr(norm, "act", None), getattr(norm, "drop", None)
    if type(norm).__name__ != "BatchNormAct2d" or type(drop) is not nn.Identity:
        return None
    return "none" if type(act) is nn.Identity else _module_activation(act)


def _can_fold(norm: nn.BatchNorm2d, link: Link) -> bool:
    """Return whether a BatchNorm has fixed statistics, and follows a convolution into which it can be folded."""
    return isinstance(link.layer, nn.Conv2d) and not norm.training and norm.running_mean is not None


def _does_nothing(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout | nn.Dropout2d):
        return not module.training or module.p == 0
    return type(module) is nn.Identity
