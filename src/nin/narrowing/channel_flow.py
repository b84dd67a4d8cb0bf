"""Which channels of a network are the same ones: behind activations, additions, gates and concatenations."""

import dataclasses
import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nin.models.surgery import is_same_padded_depthwise

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
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
# Of a number and a tensor.
_SCALED = {*SUMS, *_PRODUCTS, operator.sub, operator.isub, operator.truediv, operator.itruediv, torch.sub, torch.div}


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Channels that are pruned together: each of its units is one channel of the producer and all that it becomes.

    Behind a plain layer a unit is one channel of everything. Where several layers are added up, it is one of each;
    where maps are concatenated, its place behind that is another; and it is two channels of a concatenation of maps
    with what a depthwise layer makes of them.

    Attributes:
        producer: the first layer that computes them.
        consumers: layers that take them as input, in the order of the calls.
        between: BatchNorm and depthwise layers that they go through.
        readers: first layers of squeeze-and-excitation, which take them as input.
        gates: last layers of it, by whose result they are multiplied.
        writers: other layers whose outputs are added to the producer's.
        inputs: by consumer or reader, its input channels that each unit is: as many tuples as there are units.
        outputs: the same of the output channels of all others.
    """

    producer: str
    consumers: tuple[str, ...]
    between: tuple[str, ...]
    readers: tuple[str, ...]
    gates: tuple[str, ...]
    writers: tuple[str, ...]
    inputs: dict[str, tuple[tuple[int, ...], ...]]
    outputs: dict[str, tuple[tuple[int, ...], ...]]

    @property
    def key(self) -> tuple[str, str]:
        """The producer and the first consumer, which no other group has."""
        return self.producer, self.consumers[0]

    @property
    def units(self) -> int:
        """How many channels, of the producer for instance, can be pruned."""
        return len(self.outputs[self.producer])


@dataclasses.dataclass(frozen=True)
class _Value:
    """The channels of a tensor.

    Attributes:
        channels: the number of each of them, by which `ChannelFlow` knows it.
        layout: "map": dimension 1 of images; "last": the last dimension; "flat": behind a flattening, of single pixels
            where there are no more values than channels.
        is_mean: whether images have one pixel, the mean of all.
    """

    channels: list[int]
    layout: str
    is_mean: bool = False


class ChannelFlow:
    """Follows the channels through a traced model.

    Every output channel of a layer gets a number. Numbers of channels that are added or multiplied become one, and all
    that a function which is not known takes or gives is fixed.

    Args:
        graph: of the model.
        modules: of the model, under all their names.
        calls: how often each is called in the graph, under whatever name.
        layers: the names of the layers that may be changed.
        depthwise: of layers that may lose channels only.
    """

    def __init__(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        calls: dict[str, int],
        layers: Collection[str],
        depthwise: Collection[str],
    ) -> None:
        self.modules, self.calls, self.layers, self.depthwise = modules, calls, layers, depthwise
        self.parents: list[int] = []  # of the numbers, in a forest whose trees are the channels that are the same
        self.fixed: set[int] = set()
        # ("in", "out" or "through", the module's name, its channels), in the order of the calls
        self.roles: list[tuple[str, str, list[int]]] = []
        self.gates: set[str] = set()
        self.values: dict[fx.Node, _Value | None] = {}
        for node in graph.nodes:
            value = self._follow(node)
            if value is None:
                for given in node.all_input_nodes:
                    self._fix(self.values[given])
            self.values[node] = value

    def groups(self) -> tuple[ChannelGroup, ...]:
        """Return the channels that can be pruned together, in the order in which they are first computed."""
        fixed = {self._root(number) for number in self.fixed}
        members: dict[int, list[tuple[str, str, int]]] = {}
        for role, name, channels in self.roles:
            for place, number in enumerate(channels):
                members.setdefault(self._root(number), []).append((role, name, place))
        alike: dict[tuple[tuple[str, str], ...], list[list[tuple[str, str, int]]]] = {}
        for root, unit in members.items():
            if root not in fixed:
                alike.setdefault(tuple((role, name) for role, name, _ in unit), []).append(unit)
        squeezes = self._squeezes(list(alike))
        found: list[ChannelGroup] = []
        known: set[tuple[str, str]] = set()
        for units in alike.values():
            group = self._group(units, squeezes)
            pairs = {(group.producer, name) for name in group.consumers} if group is not None else set()
            if group is not None and len(units) > 1 and not pairs & known:
                found.append(group)
                known |= pairs
        return tuple(found)

    def _squeezes(self, kinds: list[tuple[tuple[str, str], ...]]) -> set[str]:
        """Return the first layers of squeeze-and-excitations: those before a last one, or that are one themselves.

        The width between the two stays: the first is fitted to the channels that are left.
        """
        squeezes = set(self.gates)
        for kind in kinds:
            readers = {name for role, name in kind if role == "in"}
            if readers and readers <= self.gates:
                squeezes |= {name for role, name in kind if role == "out"}
        return squeezes

    def _group(self, units: list[list[tuple[str, str, int]]], squeezes: set[str]) -> ChannelGroup | None:
        """Return units that go the same ways as a group; None where no layer computes or takes them."""
        places: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        for unit in units:
            for role, name in dict.fromkeys((role, name) for role, name, _ in unit):
                taken = tuple(p for r, n, p in unit if (r, n) == (role, name))
                places.setdefault((role, name), []).append(taken)
        outputs = {name: tuple(value) for (role, name), value in places.items() if role != "in"}
        inputs = {name: tuple(value) for (role, name), value in places.items() if role == "in"}
        between = tuple(name for role, name in places if role == "through")
        writers = [name for role, name in places if role == "out" and name not in self.gates]
        consumers = tuple(name for name in inputs if name not in squeezes)
        if not writers or not consumers:
            return None
        readers = tuple(name for name in inputs if name in squeezes)
        gates = tuple(name for role, name in places if role == "out" and name in self.gates)
        return ChannelGroup(writers[0], consumers, between, readers, gates, tuple(writers[1:]), inputs, outputs)

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number

    def _fresh(self, count: int) -> list[int]:
        first = len(self.parents)
        self.parents += range(first, first + count)
        return self.parents[first:]

    def _fix(self, value: _Value | None) -> None:
        if value is not None:
            self.fixed.update(value.channels)

    def _follow(self, node: fx.Node) -> _Value | None:
        """Return the channels that a node gives; None where that, and so what it takes, is not known."""
        given = node.all_input_nodes
        x = self.values[given[0]] if len(given) == 1 and node.args and node.args[0] is given[0] else None
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if isinstance(module, nn.Conv2d | nn.Linear):
                if x is None:
                    for value in given:
                        self._fix(self.values[value])
                return self._layer(str(node.target), module, x)
            return None if x is None else self._module(str(node.target), module, x)
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target in (torch.cat, torch.concat):
            return self._concatenated(node)
        if len(given) == 2 and node.target in SUMS | _PRODUCTS:
            return self._combined(node)
        return None if x is None else _function(node, x, self)

    def _layer(self, name: str, module: nn.Conv2d | nn.Linear, x: _Value | None) -> _Value:
        """Return the new channels of a layer, or those of its input where it is depthwise."""
        is_usable = self.calls[name] == 1  # one that serves several places would lose the same channels in all of them
        channels = len(x.channels) if x is not None else 0
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            plain = type(module) is nn.Conv2d or is_same_padded_depthwise(module)
            is_depthwise = module.groups == module.in_channels == module.out_channels == channels
            is_usable = is_usable and (name in self.layers or name in self.depthwise)
            if x is not None and x.layout == "map" and is_usable and plain and is_depthwise:
                self.roles.append(("through", name, x.channels))
                return dataclasses.replace(x, is_mean=False)
            self._fix(x)
            value = _Value(self._fresh(module.out_channels), "map")
            self._fix(value)
            return value
        is_usable = is_usable and name in self.layers
        if isinstance(module, nn.Conv2d):
            fits = x is not None and x.layout == "map" and module.in_channels == channels
            value = _Value(self._fresh(module.out_channels), "map", x is not None and x.is_mean)
        else:  # behind a flattening the sizes agree only where the images had a single pixel
            fits = x is not None and x.layout != "map" and module.in_features == channels
            value = _Value(self._fresh(module.out_features), "last")
        if x is not None and is_usable and fits:
            self.roles.append(("in", name, x.channels))
        else:
            self._fix(x)
        if is_usable:
            self.roles.append(("out", name, value.channels))
        else:
            self._fix(value)
        return value

    def _module(self, name: str, module: nn.Module, x: _Value) -> _Value | None:
        """Return the channels behind a module that treats each alone."""
        # an activation without parameters may serve many places, as in torchvision's ResNets
        if self.calls[name] > 1 and next(module.parameters(), None) is not None:
            return None
        if isinstance(module, tuple(_ELEMENTWISE)) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            return x
        if x.layout != "map":
            return None
        if isinstance(module, nn.Flatten):
            is_whole = module.start_dim == 1 and module.end_dim == -1
            return dataclasses.replace(x, layout="flat") if is_whole else None
        if isinstance(module, nn.BatchNorm2d):
            is_known = isinstance(activation_of(module), tuple(_ELEMENTWISE))
            if not is_known or module.num_features != len(x.channels):
                return None
            self.roles.append(("through", name, x.channels))
            return x
        if not isinstance(module, tuple(_POOLING)):
            return None
        is_global = isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
        return dataclasses.replace(x, is_mean=x.is_mean or is_global)

    def _combined(self, node: fx.Node) -> _Value | None:
        """Return the channels of a sum or product of two tensors, which become the same ones."""
        if node.kwargs or len(node.args) != 2:  # a factor of the second summand
            return None
        a, b = (self.values[given] for given in node.args if isinstance(given, fx.Node))
        if a is None or b is None or a.layout != b.layout or len(a.channels) != len(b.channels):
            return None
        if node.target in _PRODUCTS and a.is_mean != b.is_mean:
            factor = {self._root(number) for number in (a if a.is_mean else b).channels}
            self.gates |= {n for role, n, made in self.roles if role == "out" and factor & set(map(self._root, made))}
        for first, second in zip(a.channels, b.channels, strict=True):
            self.parents[self._root(second)] = self._root(first)
        return dataclasses.replace(a, is_mean=a.is_mean and b.is_mean)

    def _concatenated(self, node: fx.Node) -> _Value | None:
        """Return the channels of maps one after the other."""
        if not node.args or not isinstance(node.args[0], list | tuple):
            return None
        parts = [self.values[part] if isinstance(part, fx.Node) else None for part in node.args[0]]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        maps = [part for part in parts if part is not None and part.layout == "map"]
        if dim not in (1, -3) or len(maps) != len(parts):
            return None
        return _Value([number for part in maps for number in part.channels], "map", all(p.is_mean for p in maps))

    def padded(self, node: fx.Node, x: _Value) -> _Value | None:
        """Return the channels of maps with a border, and with channels of a constant beside them, which stay."""
        pad = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
        if x.layout != "map" or not isinstance(pad, list | tuple) or not all(isinstance(n, int) for n in pad):
            return None
        sides = [int(str(n)) for n in pad[4:]]
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        if any(n < 0 for n in sides) or any(sides[2:]) or (any(sides) and mode != "constant"):
            return None
        before, after = (_Value(self._fresh(n), "map") for n in (sides[:2] or [0, 0]))
        self._fix(before)
        self._fix(after)
        return _Value([*before.channels, *x.channels, *after.channels], "map")


def _function(node: fx.Node, x: _Value, flow: ChannelFlow) -> _Value | None:
    """Return the channels behind a function or method of one tensor that treats each alone."""
    if node.target in _ELEMENTWISE_FUNCTIONS or node.target in _SCALED:
        return x
    if x.layout != "map":
        return None
    if node.target is F.pad:
        return flow.padded(node, x)
    if node.target is operator.getitem:
        return x if _keeps_channels(node.args[1], len(x.channels)) else None
    if node.target in (torch.flatten, "flatten"):
        is_whole = tuple(node.args[1:]) == (1,) or node.kwargs == {"start_dim": 1}
        return dataclasses.replace(x, layout="flat") if is_whole else None
    if node.target in (torch.mean, "mean"):
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keepdim = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        if not isinstance(dims, list | tuple) or sorted(int(str(d)) % 4 for d in dims) != [2, 3]:
            return None
        return dataclasses.replace(x, is_mean=True) if keepdim is True else dataclasses.replace(x, layout="last")
    if node.target not in _POOLING_FUNCTIONS:
        return None
    is_global = node.target is F.adaptive_avg_pool2d and tuple(node.args[1:]) in ((1,), ((1, 1),))
    return dataclasses.replace(x, is_mean=x.is_mean or is_global)


def _keeps_channels(index: Any, channels: int) -> bool:
    """Return whether an index into maps, such as ``[:, :64, ::2, ::2]``, leaves all channels that there are."""
    if not isinstance(index, tuple) or not all(isinstance(part, slice) for part in index):
        return False
    of_channels = index[1] if len(index) > 1 else slice(None)
    stop = of_channels.stop
    is_whole = stop is None or (isinstance(stop, int) and stop >= channels)
    return of_channels.start in (None, 0) and of_channels.step in (None, 1) and is_whole


def activation_of(norm: nn.BatchNorm2d) -> nn.Module | None:
    """Return the activation that a BatchNorm applies, an identity where it applies none; None where it is not known.

    timm's BatchNormAct2d applies its modules ``drop`` and ``act``.
    """
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    act, drop = getattr(norm, "act", None), getattr(norm, "drop", None)
    known = type(norm).__name__ == "BatchNormAct2d" and type(drop) is nn.Identity
    return act if known and isinstance(act, nn.Module) else None
