"""The dependency graph of channels: which of them can be pruned together, and where shortcuts are added.

It is found in the graph that ``torch.fx`` traces.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection

from torch import fx, nn

from nin.narrowing.channel_flow import SUMS, ChannelFlow, ChannelGroup, activation_of
from nin.runtime import fx_trace


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
    """Which channels can be pruned together, and what is added to layers' outputs.

    Attributes:
        groups: in the order of the calls.
        shortcuts: by the layer's name.
        problem: why the model could not be traced, or None.
    """

    groups: tuple[ChannelGroup, ...] = ()
    shortcuts: dict[str, Shortcut] = dataclasses.field(default_factory=dict)
    problem: str | None = None


class _Tracer(fx.Tracer):
    """PyTorch's tracer, for which subclasses of BatchNorm and of convolutions are one node, too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d | nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def build_dependency_graph(model: nn.Module, layers: set[str], depthwise: Collection[str] = ()) -> DependencyGraph:
    """Trace a model; of one that cannot be traced the graph is empty.

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
    shortcuts = {}
    for node in graph.nodes:
        if node.op != "call_module" or str(node.target) not in layers or calls[str(node.target)] > 1:
            continue
        shortcut = _find_shortcut(node, modules, calls)
        if shortcut is not None:
            shortcuts[str(node.target)] = shortcut
    return DependencyGraph(ChannelFlow(graph, modules, calls, layers, depthwise).groups(), shortcuts)


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
    if isinstance(behind, nn.BatchNorm2d) and type(activation_of(behind)) is nn.Identity:
        norm, node = str(following.target), following
    # what does nothing while the network answers, such as stochastic depth
    while len(node.users) == 1 and _does_nothing(following := next(iter(node.users)), modules):
        node = following
    if len(node.users) != 1:
        return None
    if following.target not in SUMS or following.kwargs or len(following.args) != 2:
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
