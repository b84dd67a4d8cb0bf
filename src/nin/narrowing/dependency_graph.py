"""The dependency graph of channels: between which layers they can be pruned, and where shortcuts are added.

It is found in the graph that ``torch.fx`` traces.
"""

import dataclasses
import operator
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nin.models.surgery import is_same_padded_depthwise
from nin.runtime import fx_trace

# What treats every channel alone, so that pruning a channel before it prunes the same one behind it: each module with
# the functions that do the same, and with the names of the methods. Softmax, GLU, PReLU with a parameter per channel,
# and normalisation over channels are not among them.
_ELEMENTWISE: dict[type[nn.Module], set[Any]] = {
    nn.ReLU: {F.relu, torch.relu, torch.relu_, "relu", "relu_"},
    nn.ReLU6: {F.relu6},
    nn.LeakyReLU: {F.leaky_relu},
    nn.ELU: {F.elu},
    nn.SELU: set(),
    nn.CELU: set(),
    nn.GELU: {F.gelu},
    nn.SiLU: {F.silu},
    nn.Mish: {F.mish},
    nn.Hardswish: {F.hardswish},
    nn.Hardsigmoid: set(),
    nn.Hardtanh: {F.hardtanh},
    nn.Sigmoid: {torch.sigmoid, "sigmoid"},
    nn.Tanh: {torch.tanh, "tanh"},
    nn.Softplus: set(),
    nn.Identity: {"contiguous"},
    nn.Dropout: {F.dropout},
}
# The same of what needs images, (N, C, H, W).
_POOLING: dict[type[nn.Module], set[Any]] = {
    nn.MaxPool2d: {F.max_pool2d, torch.max_pool2d},
    nn.AvgPool2d: {F.avg_pool2d},
    nn.AdaptiveAvgPool2d: {F.adaptive_avg_pool2d},
    nn.AdaptiveMaxPool2d: {F.adaptive_max_pool2d},
    nn.Dropout2d: set(),
}
_ELEMENTWISE_FUNCTIONS, _POOLING_FUNCTIONS = set().union(*_ELEMENTWISE.values()), set().union(*_POOLING.values())


@dataclasses.dataclass(frozen=True)
class Edge:
    """A layer and the only one that takes its output channels as input.

    Attributes:
        producer: the layer whose output channels can be pruned.
        consumer: the layer whose input they are.
        between: BatchNorm and depthwise layers on the way, which lose the same channels.
        readers: first layers of squeeze-and-excitation on the way, which lose them as input.
        gates: last layers of it, which lose them as output.
    """

    producer: str
    consumer: str
    between: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """The other summand of a residual addition behind a layer.

    Attributes:
        norm: the BatchNorm between the layer and the sum, or None.
        source: a module that takes or gives the other summand, where a hook can read it.
        side: "input" or "output" of that module.
    """

    norm: str | None
    source: str
    side: str


@dataclasses.dataclass(frozen=True)
class DependencyGraph:
    """Between which layers channels can be pruned, and what is added to layers' outputs.

    Attributes:
        edges: in the order of the calls.
        shortcuts: by the layer's name.
        problem: why the model could not be traced, or None.
    """

    edges: tuple[Edge, ...] = ()
    shortcuts: dict[str, Shortcut] = dataclasses.field(default_factory=dict)
    problem: str | None = None


class _Tracer(fx.Tracer):
    """PyTorch's tracer, for which subclasses of BatchNorm and of convolutions are one node, too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d | nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def build_dependency_graph(model: nn.Module, layers: set[str], depthwise: Collection[str] = ()) -> DependencyGraph:
    """Trace a model; of one that cannot be traced the graph has no edges.

    Args:
        model: in evaluation mode.
        layers: the names of the layers that may be changed.
        depthwise: of layers that may lose channels only, see `nin.models.surgery.is_same_padded_depthwise`.
    """
    try:
        graph = fx_trace.trace(model, _Tracer())
    except fx_trace.TracingError as error:
        return DependencyGraph(problem=str(error))
    modules = dict(model.named_modules(remove_duplicate=False))
    by_id = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    calls = {name: by_id[id(module)] for name, module in modules.items()}  # under whatever name
    edges, shortcuts = [], {}
    for node in graph.nodes:
        # a layer that serves several places would have to lose the same channels in all of them
        if node.op != "call_module" or str(node.target) not in layers or calls[str(node.target)] > 1:
            continue
        edge = _find_edge(node, modules, calls, layers, depthwise)
        if edge is not None:
            edges.append(edge)
        shortcut = _find_shortcut(node, modules, calls)
        if shortcut is not None:
            shortcuts[str(node.target)] = shortcut
    # the width inside of a squeeze-and-excitation stays: its first layer is fitted to the channels that are left
    inside = {name for edge in edges for name in (*edge.readers, *edge.gates)}
    return DependencyGraph(tuple(e for e in edges if not {e.producer, e.consumer} & inside), shortcuts)


def _find_edge(
    node: fx.Node,
    modules: dict[str, nn.Module],
    calls: dict[str, int],
    layers: set[str],
    depthwise: Collection[str],
) -> Edge | None:
    """Return the edge from a layer to its only consumer, or None."""
    start = modules[str(node.target)]
    if isinstance(start, nn.Conv2d) and start.groups > 1:
        return None
    channels = start.out_channels if isinstance(start, nn.Conv2d) else start.out_features
    assert isinstance(channels, int)
    producer, between = str(node.target), []
    gates: list[_Gate] = []
    # "map": channels are dimension 1 of images; "last": they are the last dimension; "flat": of single pixels
    layout = "map" if isinstance(start, nn.Conv2d) else "last"
    while True:
        if layout == "map" and (gate := _find_gate(node, channels, modules, calls, layers)) is not None:
            gates.append(gate)
            node = gate.product
            continue
        if len(node.users) != 1:
            return None
        before, node = node, next(iter(node.users))
        if not node.args or node.args[0] is not before or before in list(node.args[1:]) + list(node.kwargs.values()):
            return None
        if node.op != "call_module":
            kind = _function_kind(node, layout == "map")
            if kind is None:
                return None
            layout = "flat" if kind == "flatten" else layout
            continue
        name, module = str(node.target), modules[str(node.target)]
        # an activation without parameters may serve many places, as in torchvision's ResNets
        if calls[name] > 1 and next(module.parameters(), None) is not None:
            return None
        if _is_channelwise(module, layout == "map"):
            if isinstance(module, nn.Conv2d) and name not in layers and name not in depthwise:
                return None
            if isinstance(module, nn.BatchNorm2d | nn.Conv2d):
                between.append(name)
            layout = "flat" if isinstance(module, nn.Flatten) else layout
        elif name in layers and _consumes(module, channels, layout):
            readers, last = tuple(g.reader for g in gates), tuple(g.gate for g in gates)
            return Edge(producer, name, tuple(between), readers, last)
        else:
            return None


@dataclasses.dataclass(frozen=True)
class _Gate:
    """Squeeze-and-excitation: the maps times a factor for each channel, which two 1×1 layers make of their means.

    Attributes:
        reader: its first layer.
        gate: its last layer.
        product: the node that multiplies.
    """

    reader: str
    gate: str
    product: fx.Node


def _find_gate(
    node: fx.Node, channels: int, modules: dict[str, nn.Module], calls: dict[str, int], layers: set[str]
) -> _Gate | None:
    """Return the squeeze-and-excitation of a node's maps, or None.

    Source:
        Hu, Shen, Sun: Squeeze-and-excitation networks, 2017, arXiv 1709.01507.
    """
    if len(node.users) != 2:
        return None
    product = next((user for user in node.users if user.target in (operator.mul, torch.mul)), None)
    step = next((user for user in node.users if user is not product), None)
    if product is None or step is None or len(product.args) != 2 or not _is_global_mean(step, modules):
        return None
    convolutions: list[str] = []
    while len(step.users) == 1:
        before, step = step, next(iter(step.users))
        if step is product:
            factor = product.args[1] if product.args[0] is node else product.args[0]
            break
        if not step.args or step.args[0] is not before:
            return None
        if step.op != "call_module":
            if _function_kind(step, is_map=True) != "channelwise":
                return None
            continue
        name, module = str(step.target), modules[str(step.target)]
        if isinstance(module, nn.Conv2d):
            if name not in layers or calls[name] > 1 or module.kernel_size != (1, 1) or module.groups > 1:
                return None
            convolutions.append(name)
        elif not isinstance(module, tuple(_ELEMENTWISE)):
            return None
    else:
        return None
    if factor is not before or len(convolutions) != 2:
        return None
    first, last = (modules[name] for name in convolutions)
    if first.in_channels != channels or last.out_channels != channels:
        return None
    return _Gate(convolutions[0], convolutions[1], product)


def _is_global_mean(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a node is the mean of each channel over all pixels, as maps of one pixel."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    if node.target is F.adaptive_avg_pool2d:
        return tuple(node.args[1:]) in ((1,), ((1, 1),))
    if node.target not in (torch.mean, "mean"):
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keepdim = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    return isinstance(dims, list | tuple) and sorted(int(d) % 4 for d in dims) == [2, 3] and keepdim is True


def _consumes(module: nn.Module, channels: int, layout: str) -> bool:
    """Return whether a layer's input channels are these channels, one for one."""
    if isinstance(module, nn.Conv2d):
        return layout == "map" and module.groups == 1 and module.in_channels == channels
    # behind a flattening the sizes agree only where the images had a single pixel
    return isinstance(module, nn.Linear) and module.in_features == channels and layout != "map"


def _is_channelwise(module: nn.Module, is_map: bool) -> bool:
    """Return whether a module treats each channel alone, or flattens images."""
    if isinstance(module, tuple(_ELEMENTWISE)) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
        return True
    if not is_map:
        return False
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and module.end_dim == -1
    if isinstance(module, nn.Conv2d):
        plain = type(module) is nn.Conv2d or is_same_padded_depthwise(module)
        return plain and 1 < module.groups == module.in_channels == module.out_channels
    if isinstance(module, nn.BatchNorm2d):
        return isinstance(_activation_of(module), tuple(_ELEMENTWISE))
    return isinstance(module, tuple(_POOLING))


def _activation_of(norm: nn.BatchNorm2d) -> nn.Module | None:
    """Return the activation that a BatchNorm applies, an identity where it applies none; None where it is not known.

    timm's BatchNormAct2d applies its modules ``drop`` and ``act``.
    """
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    act, drop = getattr(norm, "act", None), getattr(norm, "drop", None)
    known = type(norm).__name__ == "BatchNormAct2d" and type(drop) is nn.Identity
    return act if known and isinstance(act, nn.Module) else None


def _function_kind(node: fx.Node, is_map: bool) -> str | None:
    """Return "channelwise" or "flatten" for a function or method that keeps channels apart, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _ELEMENTWISE_FUNCTIONS or (is_map and node.target in _POOLING_FUNCTIONS):
        return "channelwise"
    is_flatten = is_map and node.target in (torch.flatten, "flatten")
    if is_flatten and (tuple(node.args[1:]) == (1,) or node.kwargs == {"start_dim": 1}):
        return "flatten"
    return None


def _does_nothing(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a node gives what it is given, in evaluation."""
    return node.op == "call_module" and isinstance(modules[str(node.target)], nn.Identity | nn.Dropout)


def _find_shortcut(node: fx.Node, modules: dict[str, nn.Module], calls: dict[str, int]) -> Shortcut | None:
    """Return what is added to a layer's output, directly or behind a BatchNorm."""
    norm = None
    if len(node.users) != 1 or not isinstance(modules[str(node.target)], nn.Conv2d):
        return None
    following = next(iter(node.users))
    behind = modules[str(following.target)] if following.op == "call_module" else None
    if isinstance(behind, nn.BatchNorm2d) and type(_activation_of(behind)) is nn.Identity:
        norm, node = str(following.target), following
    # what does nothing while the network answers, such as stochastic depth
    while len(node.users) == 1 and _does_nothing(following := next(iter(node.users)), modules):
        node = following
    if len(node.users) != 1:
        return None
    sums = {operator.add, operator.iadd, torch.add}
    if following.op != "call_function" or following.target not in sums or following.kwargs or len(following.args) != 2:
        return None
    other = following.args[1] if following.args[0] is node else following.args[0]
    if not isinstance(other, fx.Node) or other is node:
        return None
    if other.op == "call_module" and calls[str(other.target)] == 1:
        return Shortcut(norm, str(other.target), "output")
    for user in other.users:
        if user.op == "call_module" and user.args[:1] == (other,) and calls[str(user.target)] == 1:
            return Shortcut(norm, str(user.target), "input")
    return None
