"""Matching chains in a traced graph: which nodes one operator can replace."""

import contextlib
import dataclasses
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nin.fusion.chain import is_hooked
from nin.layers import ACTIVATION_NAMES, Conv1x1, InvertedBottleneck, MLPConv
from nin.ops.reference import ACTIVATIONS, BOTTLENECK_ACTIVATIONS

# by the function, or by the method's name
_FUNCTION_NAMES: dict[Any, str] = {
    **{F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.gelu: "gelu", F.silu: "silu"},
    **{F.relu6: "relu6", F.hardswish: "hardswish"},
    **{"relu": "relu", "relu_": "relu"},
}
_MODULE_NAMES: dict[type, str] = {**ACTIVATION_NAMES, nn.ReLU6: "relu6", nn.Hardswish: "hardswish"}

# of an inverted bottleneck's layers, of which the first may be missing
BOTTLENECK_ROLES = "pointwise", "depthwise", "pointwise"


def is_operator(module: nn.Module) -> bool:
    """Return whether a module is a layer of nin's that runs as one operator already."""
    is_block = isinstance(module, InvertedBottleneck) and module.norms is None
    return is_block or isinstance(module, MLPConv | Conv1x1)


class Tracer(fx.Tracer):
    """PyTorch's tracer, for which nin's own layers and every subclass of BatchNorm are leaves too."""

    def __init__(self) -> None:
        super().__init__()
        self._proxies: list[tuple[weakref.ref[fx.Proxy], fx.Node]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module becomes one node of the graph."""
        return is_operator(m) or isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module's forward."""
        with _functions_refuse_proxies():
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for a value while the forward runs."""
        proxy = super().proxy(node)
        self._proxies.append((weakref.ref(proxy), node))
        return proxy

    def kept_nodes(self) -> set[fx.Node]:
        """Return the values that the forward kept, in an attribute or a global list, after it was traced."""
        gc.collect()
        return {node for proxy, node in self._proxies if proxy() is not None}


@contextlib.contextmanager
def _functions_refuse_proxies() -> Iterator[None]:
    """Let a custom autograd function raise TypeError when it gets a proxy.

    It would run its forward on it, as if that were the model's, while what it does to gradients stays unseen. Such is
    the reentrant checkpoint.
    """
    function: Any = torch.autograd.Function
    original = vars(function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            raise TypeError(f"{cls.__name__} is a custom autograd function")
        return original.__get__(None, cls)(*args, **kwargs)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = original


@dataclasses.dataclass
class ChainMatch:
    """A chain in a graph.

    Attributes:
        nodes: of the graph, from the first layer to the last activation.
        steps: what they do, see `Chain`.
        layer_names: names of the layers in the traced module.
        bottleneck: whether it is an inverted bottleneck.
    """

    nodes: list[fx.Node]
    steps: list[str]
    layer_names: list[str]
    bottleneck: bool = False


def match_chains(
    model: nn.Module, graph: fx.Graph, kept: set[fx.Node] | None = None
) -> tuple[list[ChainMatch], dict[str, str]]:
    """Return the chains of a graph, without nodes in common, and the 1×1 layers in none of them.

    Args:
        model: the traced module, in the mode, training or evaluation, in which chains are to run.
        graph: of its forward.
        kept: nodes whose values the forward keeps, see `Tracer.kept_nodes`.

    Returns:
        The chains, and the reason why each other 1×1 layer is in none, by the layer's name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    taken: set[fx.Node] = set()
    matches, reasons = [], {}
    # first the blocks, as a chain would begin with the last layer of one and end with the first of the next; of these
    # first those of three layers, as one of two would take their first
    for roles in (BOTTLENECK_ROLES, BOTTLENECK_ROLES[1:]):
        for node in graph.nodes:
            name = str(node.target)
            if node in taken or not _is_layer(node, modules) or not _has_role(modules[name], calls[name], roles[0]):
                continue
            match = _match_from(node, modules, calls, kept or set(), taken, roles)
            if len(match.layer_names) == len(roles):
                matches.append(match)
                taken.update(match.nodes)
    for node in graph.nodes:
        if node in taken or not _is_layer(node, modules):
            continue
        name = str(node.target)
        reason = unsupported_reason(modules[name], calls[name], first=True)
        if reason is None:
            match = _match_from(node, modules, calls, kept or set(), taken)
            if len(match.nodes) > 1:
                matches.append(match)
                taken.update(match.nodes)
                continue
            reason = "nothing follows it that the operator does"
        if is_pointwise(modules[name]):
            reasons[name] = reason
    return matches, reasons


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


def _has_role(layer: nn.Module, calls: int, role: str) -> bool:
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


def _is_layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), nn.Conv2d | nn.Linear)


def is_pointwise(layer: nn.Module) -> bool:
    """Return whether a layer looks at one pixel at a time."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def _match_from(
    start: fx.Node,
    modules: dict[str, nn.Module],
    calls: Counter[str],
    kept: set[fx.Node],
    taken: set[fx.Node],
    roles: tuple[str, ...] = (),
) -> ChainMatch:
    """Return the longest chain that begins with a layer, or as many layers of an inverted bottleneck as there are.

    Args:
        start: the call of the first layer.
        modules: of the traced module, by their names.
        calls: how often each is called.
        kept: nodes whose values the forward keeps.
        taken: nodes that are in another chain.
        roles: of an inverted bottleneck's layers, see `_has_role`; () for a chain.
    """
    first = modules[str(start.target)]
    match, nodes, steps = ChainMatch([start], ["layer"], [str(start.target)], bool(roles)), [start], ["layer"]
    known = BOTTLENECK_ACTIVATIONS if roles else ACTIVATIONS
    # a hidden value has one user, which comes next: what the model does in between might change the chain's input
    while len(nodes[-1].users) == 1 and nodes[-1] not in kept:
        node = next(iter(nodes[-1].users))
        is_next = node.args[:1] == (nodes[-1],) and nodes[-1] not in node.kwargs.values() and _follows(node, nodes[-1])
        if not is_next or node in taken:
            break
        activation, done = _activation(node, modules), steps[-1] in ("layer", "norm")
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and is_hooked(module):
            break
        if activation in known and done:
            steps.append(activation)
        elif isinstance(module, nn.BatchNorm2d) and steps[-1] == "layer":
            after = _activation_inside(module)
            if after not in known or not _can_fold(module, first) or calls[str(node.target)] > 1:
                break
            steps += ["norm"] if after == "none" else ["norm", after]
        elif module is not None and _does_nothing(module):
            nodes.append(node)
            continue  # part of the chain only if something follows it
        elif module is not None and _continues(module, calls[str(node.target)], first, len(match.layer_names), roles):
            steps.append("layer")
            match.layer_names.append(str(node.target))
        else:
            break
        nodes.append(node)
        match.nodes, match.steps = list(nodes), list(steps)
    if isinstance(first, nn.Linear) and len(match.layer_names) < 2:
        # a single matrix product is as fast in PyTorch
        return ChainMatch([start], ["layer"], match.layer_names)
    return match


def _continues(layer: nn.Module, calls: int, first: nn.Module, place: int, roles: tuple[str, ...]) -> bool:
    """Return whether a layer can be at a place of a chain, or of an inverted bottleneck."""
    if roles:
        return place < len(roles) and _has_role(layer, calls, roles[place])
    return type(layer) is type(first) and unsupported_reason(layer, calls, first=False) is None


def _follows(node: fx.Node, before: fx.Node) -> bool:
    """Return whether a node comes next in the graph, but for parameters that are read."""
    node = node.prev
    while node.op == "get_attr":
        node = node.prev
    return node is before


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
    return _MODULE_NAMES.get(type(module)) if exact else None


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


def _can_fold(norm: nn.BatchNorm2d, layer: nn.Module) -> bool:
    """Return whether a BatchNorm has fixed statistics, and follows a convolution into which it can be folded."""
    return isinstance(layer, nn.Conv2d) and not norm.training and norm.running_mean is not None


def _does_nothing(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout | nn.Dropout2d):
        return not module.training or module.p == 0
    return type(module) is nn.Identity
