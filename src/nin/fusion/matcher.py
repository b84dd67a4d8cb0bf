"""Matching chains in a traced graph: which nodes one operator can replace."""

import contextlib
import dataclasses
import gc
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from nin.fusion.chain import is_hooked
from nin.fusion.match import ChainMatch
from nin.fusion.node_roles import (
    activation_inside,
    activation_of,
    does_nothing,
    has_role,
    is_convolution,
    is_mean,
    is_pointwise,
    is_product,
    unsupported_reason,
)
from nin.fusion.norm_block import match_norm_block
from nin.layers import Conv1x1, InvertedBottleneck, MLPConv
from nin.ops.reference import ACTIVATIONS, BOTTLENECK_ACTIVATIONS, GATES

# of an inverted bottleneck's layers, of which the first may be missing
BOTTLENECK_ROLES = "pointwise", "depthwise", "pointwise"


def is_operator(module: nn.Module) -> bool:
    """Return whether a module is a layer of nin's that runs as one operator already."""
    is_block = isinstance(module, InvertedBottleneck) and module.norms is None
    return is_block or isinstance(module, MLPConv | Conv1x1)


class _Proxy(fx.Proxy):
    """PyTorch's stand-in for a value, for which ``y += z`` would be ``y = y + z``, whatever else is called y."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """PyTorch's tracer, for which nin's own layers and every subclass of convolution and BatchNorm are leaves too."""

    def __init__(self) -> None:
        super().__init__()
        self._proxies: list[tuple[weakref.ref[fx.Proxy], fx.Node]] = []
        self.modes: set[tuple[bool, bool]] = set()  # in which values were made: with gradients, under autocast

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module becomes one node of the graph."""
        is_layer = isinstance(m, nn.Conv2d | nn.BatchNorm2d)  # timm's that pads by the image's size, for example
        return is_operator(m) or is_layer or super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module's forward."""
        with _functions_refuse_proxies():
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for a value while the forward runs."""
        proxy = _Proxy(node, self)
        self.modes.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        self._proxies.append((weakref.ref(proxy), node))
        return proxy

    def kept_nodes(self) -> set[fx.Node]:
        """Return the values that the forward kept, in an attribute or a global list, after it was traced."""
        if any(proxy() is not None for proxy, _ in self._proxies):
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
    for node in graph.nodes:
        name = str(node.target)
        if node in taken or not _is_layer(node, modules) or not has_role(modules[name], calls[name], "depthwise"):
            continue
        block = match_norm_block(node, modules, calls, kept or set(), taken)
        if block is not None:
            matches.append(block)
            taken.update(block.nodes)
    # first the blocks, as a chain would begin with the last layer of one and end with the first of the next; of these
    # first those of three layers, as one of two would take their first
    for roles in (BOTTLENECK_ROLES, BOTTLENECK_ROLES[1:]):
        for node in graph.nodes:
            name = str(node.target)
            if node in taken or not _is_layer(node, modules) or not has_role(modules[name], calls[name], roles[0]):
                continue
            match = _match_from(node, modules, calls, kept or set(), taken, roles)
            if match.places == len(roles):
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


def match_convolutions(model: nn.Module, graph: fx.Graph, taken: set[fx.Node]) -> list[ChainMatch]:
    """Return the convolutions in no chain, of any groups, each with the BatchNorm and the activation that follow it.

    Args:
        model: the traced module, in evaluation mode.
        graph: of its forward, which keeps no values.
        taken: nodes that are in a chain.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    matches = []
    for node in graph.nodes:
        if node not in taken and _is_layer(node, modules) and is_convolution(modules[str(node.target)]):
            match = _match_from(node, modules, calls, set(), taken, ("convolution",))
            matches.append(dataclasses.replace(match, bottleneck=False))
    return matches


def _is_layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), nn.Conv2d | nn.Linear)


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
        roles: of an inverted bottleneck's layers, see `has_role`; () for a chain.
    """
    first = modules[str(start.target)]
    match, nodes, steps = ChainMatch([start], ["layer"], [str(start.target)], bool(roles)), [start], ["layer"]
    known = BOTTLENECK_ACTIVATIONS
    # a hidden value has one user, which comes next: what the model does in between might change the chain's input
    while nodes[-1] not in kept:
        excitation = None
        if roles and match.places == len(roles) - 1 and not match.squeezes:
            excitation = _match_excitation(nodes[-1], modules, calls, kept, taken)
        if excitation is not None:
            nodes += excitation.nodes
            steps += excitation.steps
            match.layer_names += excitation.layer_names
            match.squeezes = True
            match.nodes, match.steps = list(nodes), list(steps)
        if len(nodes[-1].users) != 1 or (not roles and _ends_chain(steps[-1])):
            break
        node = next(iter(nodes[-1].users))
        is_next = node.args[:1] == (nodes[-1],) and nodes[-1] not in node.kwargs.values() and _follows(node, nodes[-1])
        if not is_next or node in taken:
            break
        activation, done = activation_of(node, modules), steps[-1] in ("layer", "norm")
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and is_hooked(module):
            break
        if activation in known and done:
            steps.append(activation)
        elif isinstance(module, nn.BatchNorm2d) and steps[-1] == "layer":
            after = activation_inside(module)
            if after not in known or not _can_fold(module, first) or calls[str(node.target)] > 1:
                break
            steps += ["norm"] if after == "none" else ["norm", after]
        elif module is not None and does_nothing(module):
            nodes.append(node)
            continue  # part of the chain only if something follows it
        elif module is not None and _continues(module, calls[str(node.target)], first, match.places, roles):
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


def _match_excitation(
    start: fx.Node, modules: dict[str, nn.Module], calls: Counter[str], kept: set[fx.Node], taken: set[fx.Node]
) -> ChainMatch | None:
    """Return squeeze-and-excitation of a value: mean over the image, 1×1, activation, 1×1, gate, product; or None.

    Args:
        start: the value, which the mean is taken of and which is multiplied.
        modules: of the traced module, by their names.
        calls: how often each is called.
        kept: nodes whose values the forward keeps.
        taken: nodes that are in another chain.
    """
    match, last = ChainMatch([], [], []), start
    while True:
        node = last.next
        while node.op == "get_attr":
            node = node.next
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if node in taken or last in kept or (module is not None and is_hooked(module)):
            return None
        if len(match.layer_names) == 2 and match.steps[-1] in GATES and is_product(node, start, last):
            is_only = set(start.users) == {match.nodes[0], node} and set(last.users) == {node}
            return (
                dataclasses.replace(match, nodes=[*match.nodes, node], steps=[*match.steps, "scale"])
                if is_only
                else None
            )
        if node.args[:1] != (last,) or (last is not start and len(last.users) != 1):
            return None
        activation = activation_of(node, modules)
        if not match.nodes:
            if not is_mean(node, module):
                return None
            match.steps.append("mean")
        elif module is not None and does_nothing(module):
            pass
        elif (
            len(match.layer_names) < 2 and module is not None and has_role(module, calls[str(node.target)], "pointwise")
        ):
            match.steps.append("layer")
            match.layer_names.append(str(node.target))
        elif match.steps[-1] == "layer" and activation in (
            GATES if len(match.layer_names) == 2 else BOTTLENECK_ACTIVATIONS
        ):
            match.steps.append(str(activation))
        else:
            return None
        match.nodes.append(node)
        last = node


def _ends_chain(step: str) -> bool:
    """Return whether a step is an activation that the operator has in inverted bottlenecks alone."""
    return step in BOTTLENECK_ACTIVATIONS and step not in ACTIVATIONS


def _continues(layer: nn.Module, calls: int, first: nn.Module, place: int, roles: tuple[str, ...]) -> bool:
    """Return whether a layer can be at a place of a chain, or of an inverted bottleneck."""
    if roles:
        return place < len(roles) and has_role(layer, calls, roles[place])
    return type(layer) is type(first) and unsupported_reason(layer, calls, first=False) is None


def _follows(node: fx.Node, before: fx.Node) -> bool:
    """Return whether a node comes next in the graph, but for parameters that are read."""
    node = node.prev
    while node.op == "get_attr":
        node = node.prev
    return node is before


def _can_fold(norm: nn.BatchNorm2d, layer: nn.Module) -> bool:
    """Return whether a BatchNorm has fixed statistics, and follows a convolution into which it can be folded."""
    return isinstance(layer, nn.Conv2d) and not norm.training and norm.running_mean is not None
