"""The graph of a network whose chains run as operators: what a program is recorded from."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from nin.fusion.chain import Chain, has_hooks, is_hooked
from nin.fusion.link import After, Link, Norm
from nin.fusion.match import ChainMatch
from nin.fusion.matcher import Tracer, is_operator, match_chains
from nin.fusion.node_roles import activation_inside, activation_of
from nin.fusion.pending import conv_link
from nin.fusion.program_guards import ModuleState
from nin.runtime.fx_trace import TracingError, trace_forward, unchanged_randomness
from nin.runtime.model_copy import copy_model


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers that run as one chain.

    Attributes:
        x: the node of their input.
        chain: how they are computed.
        parts: of each layer, the names of the module and of its BatchNorm, and the activation.
        roles: of each layer, see `Link`.
        after: of each layer, how what follows it is made, see `ChainMatch`.
    """

    x: fx.Node
    chain: Chain
    parts: tuple[tuple[str, str | None, str], ...]
    roles: tuple[str, ...]
    after: tuple[tuple[Callable[[nn.Module], After], ...], ...]

    def links(self, root: nn.Module) -> list[Link]:
        """Return the layers as they are now."""
        links = []
        for (name, norm_name, activation), role, makers in zip(self.parts, self.roles, self.after, strict=True):
            layer: Any = root.get_submodule(name)
            if isinstance(layer, nn.Conv2d):
                link = conv_link(layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
            else:
                link = Link(layer.weight, layer.bias, ())
            norm: Any = None if norm_name is None else root.get_submodule(norm_name)
            if norm is not None:
                norm = Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
            after = tuple(make(root) for make in makers)
            links.append(link._replace(norm=norm, activation=activation, role=role, after=after))
        return links


@dataclasses.dataclass(frozen=True)
class NetworkGraph:
    """A network's forward.

    Attributes:
        graph: its operations.
        chains: what is computed at the last node of each chain.
        inside: the nodes of chains before the last.
        inputs: the nodes of the inputs.
        state: of the modules as they were traced.
    """

    graph: fx.Graph
    chains: dict[fx.Node, Layers]
    inside: set[fx.Node]
    inputs: list[fx.Node]
    state: ModuleState


def is_traceable(module: nn.Module) -> bool:
    """Return whether all of a network is in evaluation mode, and nothing but its modules' classes says what they do."""
    inside = list(module.modules())[1:]
    if module.training or has_hooks(module) or "forward" in vars(module):
        return False
    return not any(m.training or is_hooked(m) for m in inside)


def trace_network(module: nn.Module) -> NetworkGraph | None:
    """Return the graph of a network in evaluation mode; None if calls of it may differ from what is traced.

    They may where it cannot be traced (its control flow depends on values or shapes), and where its forward changes
    attributes, draws random numbers or keeps tensors.

    Args:
        module: for which `is_traceable` holds.
    """
    state = ModuleState(module)
    with torch.inference_mode(False):  # ordinary tensors, even where the caller is in inference mode
        traced = copy_model(module, {id(p): p for p in module.parameters()})
    if not state.is_known:
        return None
    before, tracer, versions = ModuleState(traced), _StrictTracer(), _versions(traced)
    with unchanged_randomness() as drew:
        try:
            with torch.no_grad(), _NoValues():
                graph = trace_forward(traced, tracer)
        except (TracingError, _NotInGraphError):
            return None
        if drew() or not before.holds() or versions != _versions(traced):
            return None
    matches, _ = match_chains(traced, graph, kept := tracer.kept_nodes())
    if kept or not (matches or any(map(is_operator, traced.modules()))) or not state.holds():
        return None
    chains = {match.nodes[-1]: _layers(match, traced, module) for match in matches}
    inside = {node for match in matches for node in match.nodes[:-1]}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    count = sum(p.default is p.empty for p in parameters)
    return NetworkGraph(graph, chains, inside, placeholders[:count], state)


class _NotInGraphError(Exception):
    """A forward does what its graph does not say."""


class _StrictTracer(Tracer):
    """A tracer that raises where its graph would not say all: a buffer's values decide, or a mode is entered."""

    proxy_buffer_attributes = True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a node, unless autocast or gradients are on, which the graph does not say."""
        if torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
            raise _NotInGraphError("the forward enters a mode")
        return super().create_node(*args, **kwargs)


class _NoValues(TorchFunctionMode):
    """Raise where a forward makes a number of a tensor that is neither parameter nor buffer: it may change."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS:
            raise _NotInGraphError(str(func))
        return func(*args, **(kwargs or {}))


_READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__"}
_READS |= {"__contains__", "__dlpack__", "equal", "allclose", "is_nonzero"}


def _versions(module: nn.Module) -> list[int]:
    return [t._version for t in (*module.parameters(), *module.buffers()) if not t.is_inference()]


def _layers(match: ChainMatch, traced: nn.Module, root: nn.Module) -> Layers:
    """Return the layers of a match, with the chain that `fuse` made for them, or else one that runs as an operator."""
    modules = dict(traced.named_modules(remove_duplicate=False))
    parts: list[tuple[str, str | None, str]] = []
    for node in match.nodes:
        name = str(node.target)
        module = modules.get(name) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d | nn.Linear):
            parts.append((name, None, "none"))
        elif isinstance(module, nn.BatchNorm2d):
            parts[-1] = parts[-1][0], name, activation_inside(module) or "none"
        elif (activation := activation_of(node, modules)) is not None:
            parts[-1] = *parts[-1][:2], activation
    found: Chain | None = getattr(root.get_submodule(match.layer_names[0]), "nin_chain", None)
    if found is None or found.steps != tuple(match.steps):
        convolves = isinstance(modules[match.layer_names[0]], nn.Conv2d)
        found = Chain(tuple(match.steps), convolves=convolves, bottleneck=match.bottleneck)
    roles: list[str] = []
    for before, step in zip(("", *match.steps), match.steps, strict=False):
        if step == "layer":
            roles.append("squeeze" if before == "mean" else "")
        elif step == "scale":
            roles[-1] = "excite"
    after = tuple(map(tuple, match.after)) or ((),) * len(parts)
    return Layers(match.nodes[0].args[0], found, tuple(parts), tuple(roles), after)  # type: ignore[arg-type]


def held_tensor(root: nn.Module, path: str) -> Tensor | None:
    """Return the parameter or buffer at a path in a module; None if what lies there is neither."""
    owner, _, name = path.rpartition(".")
    module: Any = root.get_submodule(owner)
    tensor = module._parameters.get(name)
    return module._buffers.get(name) if tensor is None else tensor
