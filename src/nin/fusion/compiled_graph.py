"""The graph of a network whose chains run as operators: what the steps of a compiled network are recorded from."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from nin.fusion.chain import Chain, is_hooked
from nin.fusion.link import After, Link, Norm
from nin.fusion.match import ChainMatch
from nin.fusion.matcher import Tracer, is_operator, match_chains, match_convolutions
from nin.fusion.node_roles import activation_inside, activation_of, input_of
from nin.fusion.pending import conv_link
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
    """

    graph: fx.Graph
    chains: dict[fx.Node, Layers]
    inside: set[fx.Node]
    inputs: list[fx.Node]


def trace_network(network: nn.Module) -> NetworkGraph:
    """Return the graph of a network in evaluation mode that nobody changes any more.

    Raises:
        TracingError: its control flow depends on values or shapes; hooks run in it; its forward changes attributes,
            weights or the modes of PyTorch, draws random numbers or keeps tensors; or nothing in it is an operator.
    """
    hooked = next((name or "the network" for name, m in network.named_modules() if is_hooked(m)), None)
    if hooked is not None:
        raise TracingError(f"{hooked} has a hook, or a forward of its own")
    with torch.inference_mode(False):  # ordinary tensors, even where the caller is in inference mode
        traced = copy_model(network, {id(p): p for p in network.parameters()})
    before, versions, tracer = _attributes(traced), _versions(traced), Tracer()
    with unchanged_randomness() as drew, torch.no_grad(), torch.autocast("cpu", enabled=False):
        graph = trace_forward(traced, tracer)
        if drew():
            raise TracingError("the forward draws random numbers")
    if before != _attributes(traced) or versions != _versions(traced):
        raise TracingError("the forward changes attributes, parameters or buffers")
    if len(tracer.modes) > 1:
        raise TracingError("the forward switches autocast or gradients")
    matches, _ = match_chains(traced, graph, kept := tracer.kept_nodes())
    if kept:
        raise TracingError("the forward keeps tensors")
    matches += match_convolutions(traced, graph, {node for match in matches for node in match.nodes})
    if not (matches or any(map(is_operator, traced.modules()))):
        raise TracingError("nothing in it is computed by an operator of nin's")
    chains = {match.nodes[-1]: _layers(match, traced, network) for match in matches}
    inside = {node for match in matches for node in match.nodes[:-1]}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    parameters = list(inspect.signature(type(network).forward).parameters.values())[1:]
    count = sum(p.default is p.empty for p in parameters)
    return NetworkGraph(graph, chains, inside, placeholders[:count])


def _versions(module: nn.Module) -> list[int]:
    return [t._version for t in (*module.parameters(), *module.buffers()) if not t.is_inference()]


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def _attributes(module: nn.Module) -> list[Any]:
    """Return what the attributes of a module and those in it are: plain values, and which objects."""
    return [{name: _described(value) for name, value in vars(m).items()} for m in module.modules()]


def _described(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if type(value) in (list, tuple, set):
        return [_described(item) for item in value]
    if type(value) is dict:
        return {key: _described(item) for key, item in value.items()}
    return id(value)


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
    return Layers(input_of(match.nodes[0]), found, tuple(parts), tuple(roles), after)


def held_tensor(root: nn.Module, path: str) -> Tensor | None:
    """Return the parameter or buffer at a path in a module; None if what lies there is neither."""
    owner, _, name = path.rpartition(".")
    module: Any = root.get_submodule(owner)
    tensor = module._parameters.get(name)
    return module._buffers.get(name) if tensor is None else tensor
