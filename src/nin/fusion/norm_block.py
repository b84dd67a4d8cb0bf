"""Matching ConvNeXt's block in a traced graph: depthwise layer, LayerNorm, two layers on every pixel, scale, sum."""

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nin.fusion.chain import is_hooked
from nin.fusion.link import (
    AFTER_STEPS,
    LAST_AXIS,
    SECOND_AXIS,
    After,
    LayerNorm,
    LayerScale,
    Permute,
    Residual,
    scales_channels,
)
from nin.fusion.match import ChainMatch
from nin.fusion.node_roles import (
    activation_of,
    does_nothing,
    has_role,
    input_of,
    is_stochastic_depth,
    unsupported_reason,
)
from nin.ops.reference import BOTTLENECK_ACTIVATIONS

_VIEWS = {"reshape", "view", "unsqueeze"}


def match_norm_block(
    start: fx.Node, modules: dict[str, nn.Module], calls: Counter[str], kept: set[fx.Node], taken: set[fx.Node]
) -> ChainMatch | None:
    """Return the block that begins with a depthwise layer, with the scale and the sum if they follow; or None.

    Args:
        start: the call of the depthwise layer.
        modules: of the traced module, by their names.
        calls: how often each is called.
        kept: nodes whose values the forward keeps.
        taken: nodes that are in another chain.
    """
    block = _Block(start, modules, calls)
    found = None
    while True:
        last = block.match.nodes[-1]
        if block.is_whole():
            found = block.copy()
        # a hidden value has one user, which comes next: what the model does in between might change the block's input
        if last in kept or len(last.users) != 1:
            return found
        node = next(iter(last.users))
        if node in taken or not block.follows(node, last) or not block.add(node, last):
            return found


class _Block:
    """As much of a block as was found."""

    def __init__(self, start: fx.Node, modules: dict[str, nn.Module], calls: Counter[str]) -> None:
        name = str(start.target)
        self.match = ChainMatch([start], ["layer"], [name], bottleneck=True, after=[[]])
        self._modules, self._calls = modules, calls
        layer: Any = modules[name]
        self._channels: int = layer.out_channels
        self._x = self._resolve(input_of(start))
        self._is_last = False  # whether the channels are the last axis

    def copy(self) -> ChainMatch:
        """Return what was found so far."""
        m = self.match
        after = [list(steps) for steps in m.after]
        return ChainMatch(list(m.nodes), list(m.steps), list(m.layer_names), bottleneck=True, after=after)

    def is_whole(self) -> bool:
        """Return whether all layers were found, and the channels are where they were."""
        return len(self.match.layer_names) == 3 and not self._is_last

    def follows(self, node: fx.Node, last: fx.Node) -> bool:
        """Return whether only views of parameters, and what returns the block's input, lie between two nodes."""
        node = node.prev
        while node.op == "get_attr" or constant_of(node) is not None or self._resolve(node) is self._x:
            node = node.prev
        return node is last

    def add(self, node: fx.Node, last: fx.Node) -> bool:
        """Take the next node into the block; return whether it belongs there."""
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and is_hooked(module):
            return False
        first, layers = self._first_operands(node, last), len(self.match.layer_names)
        if first and ((module is not None and does_nothing(module)) or is_stochastic_depth(node)):
            self.match.nodes.append(node)
            return True
        step = self._step_after(node, last, module, layers)
        if step is not None:
            kind, make = step
            if kind is LayerScale:
                self.match.nodes += _views_for(node)
            self.match.after[-1].append(make)
            self.match.steps.append(AFTER_STEPS[kind])
            self._is_last ^= kind is Permute
        elif first and layers == 2 and self.match.steps[-1] == "layer" and self._activation(node):
            self.match.steps.append(self._activation(node))
        elif first and module is not None and layers < 3 and self._is_layer(module, node):
            self.match.steps.append("layer")
            self.match.layer_names.append(str(node.target))
            self.match.after.append([])
        else:
            return False
        self.match.nodes.append(node)
        return True

    def _first_operands(self, node: fx.Node, last: fx.Node) -> bool:
        return node.args[:1] == (last,) and last not in node.kwargs.values() and last not in node.args[1:]

    def _activation(self, node: fx.Node) -> str:
        name = activation_of(node, self._modules)
        return name if name is not None and name in BOTTLENECK_ACTIVATIONS else ""

    def _is_layer(self, module: nn.Module, node: fx.Node) -> bool:
        """Return whether a module is the next layer, behind the norm."""
        if "layer_norm" not in self.match.steps:
            return False
        calls = self._calls[str(node.target)]
        if self._is_last:
            return type(module) is nn.Linear and unsupported_reason(module, calls, first=False) is None
        return has_role(module, calls, "pointwise")

    def _step_after(
        self, node: fx.Node, last: fx.Node, module: nn.Module | None, layers: int
    ) -> tuple[type, Callable[[nn.Module], After]] | None:
        """Return what a node is behind a layer, and how it is made with the tensors of a network; None if nothing."""
        steps = self.match.steps
        if self._first_operands(node, last) and (dims := _permutation(node)) is not None:
            expected = SECOND_AXIS if self._is_last else LAST_AXIS
            return (Permute, lambda _: Permute(dims)) if dims == expected else None
        if layers == 1 and self._is_last and "layer_norm" not in steps and self._first_operands(node, last):
            norm = _norm_of(node, module, self._channels)
            return None if norm is None else (LayerNorm, norm)
        if layers < 3 or steps[-1] == "residual":
            return None
        other = _other_operand(node, last, (operator.mul, torch.mul, "mul"))
        if other is not None and "layer_scale" not in steps and self._is_scale(other):
            return LayerScale, lambda root: LayerScale(_value(root, other))
        other = _other_operand(node, last, (operator.add, torch.add, "add"))
        if other is None and node.args[:1] == (last,):
            other = _other_operand(node, last, (operator.iadd, "add_"))
        if other is not None and not self._is_last and self._resolve(other) is self._x:
            inplace = node.target in (operator.iadd, "add_")
            return Residual, lambda _: Residual(inplace)
        return None

    def _is_scale(self, node: fx.Node) -> bool:
        """Return whether a node is a factor for each channel."""
        down: Any = self._modules[self.match.layer_names[-1]]
        factors = None if constant_of(node) is None else _value(self._modules[""], node)
        return isinstance(factors, Tensor) and scales_channels(factors, down.weight.shape[0], last=self._is_last)

    def _resolve(self, node: Any) -> Any:
        """Return the node whose value a node has, behind modules that do nothing."""
        while isinstance(node, fx.Node) and node.op == "call_module":
            module = self._modules.get(str(node.target))
            if module is None or not does_nothing(module) or is_hooked(module) or len(node.args) != 1:
                break
            node = node.args[0]
        return node


def constant_of(node: Any) -> fx.Node | None:
    """Return the parameter or buffer that a node reads or is a view of, or None."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        views = node.op == "call_method" and node.target in _VIEWS
        views = views or (node.op == "call_function" and node.target in (operator.getitem, torch.reshape))
        if not views or node.kwargs or any(isinstance(value, fx.Node) for value in node.args[1:]):
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _views_for(node: fx.Node) -> list[fx.Node]:
    """Return the views of parameters that only one node reads."""
    views: list[fx.Node] = []
    for value in node.all_input_nodes:
        chain = value
        while constant_of(chain) is not None and chain.op != "get_attr" and len(chain.users) == 1:
            views.insert(0, chain)
            chain = chain.args[0]  # type: ignore[assignment]
    return views


def _value(root: nn.Module, node: fx.Node | None) -> Any:
    """Return the value of a node for which `constant_of` holds, in a network."""
    if node is None:
        return None
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return getattr(root.get_submodule(owner), name)
    function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    return function(_value(root, node.args[0]), *node.args[1:])  # type: ignore[arg-type]


def _permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Return the order into which a node permutes four axes, or None."""
    is_function = node.op == "call_function" and node.target is torch.permute
    if not is_function and (node.op != "call_method" or node.target != "permute"):
        return None
    dims: Any = node.kwargs.get("dims", node.args[1:])
    if len(dims) == 1 and isinstance(dims[0], tuple | list):
        dims = dims[0]
    if len(dims) != 4 or not all(isinstance(d, int) for d in dims):
        return None
    return tuple(d % 4 for d in dims)


def _norm_of(node: fx.Node, module: nn.Module | None, channels: int) -> Callable[[nn.Module], After] | None:
    """Return how a LayerNorm over the last axis is made, or None if the node is none."""
    if type(module) is nn.LayerNorm:
        name = str(node.target)

        def of_module(root: nn.Module) -> LayerNorm:
            norm: Any = root.get_submodule(name)
            return LayerNorm(norm.weight, norm.bias, norm.eps)

        return of_module if tuple(module.normalized_shape) == (channels,) else None
    if node.op != "call_function" or node.target is not F.layer_norm:
        return None
    names = "input", "normalized_shape", "weight", "bias", "eps"
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    affine = [given.get("weight"), given.get("bias")]
    known = all(value is None or (isinstance(value, fx.Node) and constant_of(value)) for value in affine)
    eps = given.get("eps", 1e-5)
    if not known or tuple(given["normalized_shape"]) != (channels,) or not isinstance(eps, float):
        return None
    return lambda root: LayerNorm(_value(root, affine[0]), _value(root, affine[1]), eps)


def _other_operand(node: fx.Node, last: fx.Node, targets: tuple[Any, ...]) -> fx.Node | None:
    """Return the other operand of a function of two, or None."""
    if node.op not in ("call_function", "call_method") or node.target not in targets:
        return None
    if len(node.args) != 2 or node.kwargs or node.args.count(last) != 1:
        return None
    other = node.args[1] if node.args[0] is last else node.args[0]
    return other if isinstance(other, fx.Node) else None
