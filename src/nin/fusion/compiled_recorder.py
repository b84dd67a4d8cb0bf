"""Record a network's forward as a plan: every step is run once, and what it was kept."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nin.fusion.compiled_graph import Layers, NetworkGraph, held_tensor
from nin.fusion.compiled_kernels import VIEWS, WEIGHTED, find_step
from nin.fusion.compiled_layers import FoundStep, concatenation, convolution
from nin.fusion.compiled_plan import KernelAction, Plan, Ref, Slot, TorchAction, base_of, is_ref, tensors_in
from nin.layers import Conv1x1, InvertedBottleneck, MLPConv
from nin.ops.cpu import call_cache
from nin.ops.cpu.library import Kernels
from nin.ops.cpu.steps import run_step, step_of_call
from nin.ops.cpu.weight_cache import is_dense
from nin.ops.reference import ACTIVATIONS, BOTTLENECK_ACTIVATIONS


class NotRecordableError(Exception):
    """What a step returns may be of another kind in another call: the message says which step it was."""


class _SameShapes(TorchDispatchMode):
    """Raise where the shape of a result, or a number, depends on the values of tensors, or a weight is written to.

    Args:
        weights: that are the same in every call.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._memory = {t.untyped_storage()._cdata for t in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
        if tags.intersection(func.tags):
            raise NotRecordableError(f"{func} depends on values")
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else kwargs.get(argument.name)
                if any(t.untyped_storage()._cdata in self._memory for t in tensors_in(written)):
                    raise NotRecordableError(f"{func} writes into a parameter or buffer")
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Let PyTorch's functions that compute tensors of tensors be run by something else.

    Args:
        run: gets the function, its arguments and its keyword arguments.
    """

    def __init__(self, run: Callable[[Callable[..., Any], Any, Any], Any]) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asks = getattr(func, "__name__", "") in ("__get__", *_QUESTIONS)
        return func(*args, **kwargs) if asks else self._run(func, args, kwargs)


# What tells shapes and dtypes of tensors, which are the same in every call of a plan.
_QUESTIONS = {"size", "dim", "stride", "numel", "ndimension", "is_floating_point", "is_contiguous", "element_size"}
_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad", "is_cpu"}


class Recorder:
    """Records a network's forward for inputs of some shapes.

    Args:
        module: the network.
        network: its graph.
        kernels: of the instruction set in use.
    """

    def __init__(self, module: nn.Module, network: NetworkGraph, kernels: Kernels) -> None:
        self._module, self._network, self._kernels = module, network, kernels
        self._slots: list[Slot] = []
        self._tensors: dict[int, tuple[int, Tensor]] = {}  # by id: slot and tensor, of those that are alive
        self._values: dict[fx.Node, Any] = {}
        self._actions: list[KernelAction | TorchAction] = []
        self._made_views: set[int] = set()  # slots of views that are tensors
        self._weights = [*module.parameters(), *module.buffers()]
        for weight in self._weights:
            self._constant(weight)

    def record(self, inputs: Sequence[Tensor]) -> tuple[Any, Plan]:
        """Run the network step by step, which may change the inputs, and return the result and the plan.

        Raises:
            NotRecordableError: no plan can be made for the network.
        """
        last_uses = _last_uses(self._network)
        given = dict(zip(self._network.inputs, inputs, strict=True))
        self._values |= given  # each has its slot until it is read
        slots = [self._slot_of(x) for x in inputs]
        done: list[fx.Node] = []
        for node in self._network.graph.nodes:
            if node.op == "output":
                result = _plain_containers(self._fill(node.args[0]))
                output = pytree.tree_map_only(Tensor, lambda t: Ref(self._shown(t)), result)
                return result, Plan(self._kernels, self._slots, self._actions, slots, output)
            done += last_uses.get(node, ())
            if node in self._network.inside:
                continue
            self._values[node] = self._run_node(node, given)
            if node.op == "get_attr":  # may stand within a chain, whose input is needed at its end
                continue
            for old in done:
                self._values.pop(old, None)
            done.clear()
            alive = {id(t) for t in pytree.tree_leaves(list(self._values.values())) if isinstance(t, Tensor)}
            self._tensors = {
                k: v for k, v in self._tensors.items() if k in alive or self._slots[v[0]].constant is not None
            }
        raise NotRecordableError("the graph has no output")

    def _run_node(self, node: fx.Node, given: dict[fx.Node, Tensor]) -> Any:
        if node.op == "placeholder":
            return given[node] if node in given else node.args[0]
        if node.op == "get_attr":
            tensor = held_tensor(self._module, str(node.target))
            if tensor is None:
                raise NotRecordableError(f"{node.target} is no parameter and no buffer")
            return self._constant(tensor)
        if node in self._network.chains:
            layers = self._network.chains[node]
            return self._run_layers(layers, self._fill(layers.x))
        args, kwargs = self._fill(node.args), self._fill(node.kwargs)
        if node.op == "call_module":
            return self._run_module(self._module.get_submodule(str(node.target)), args, kwargs)
        if node.op == "call_method":
            name = str(node.target)
            if name in _QUESTIONS:
                return getattr(args[0], name)(*args[1:], **kwargs)
            return self._run_function(getattr(type(args[0]), name), args, kwargs)
        if node.target is getattr and args[1] in _ATTRIBUTES:
            return getattr(*args)
        if node.target is operator.getitem and isinstance(args[0], tuple | list):
            return args[0][args[1]]
        return self._run_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _view(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a function, if it is the memory of its first argument in other shapes; None if not."""
        x = args[0] if args else None
        kind = type(function) if isinstance(function, nn.Module) else function
        if kind not in VIEWS or not isinstance(x, Tensor):
            return None
        result = function(*args, **kwargs)
        views, base = tensors_in(result), self._slot_of(x)
        memory = x.untyped_storage()._cdata
        if not views or any(y.untyped_storage()._cdata != memory or y.dtype != x.dtype for y in views):
            return None
        if not all(y.numel() for y in views):  # an empty one has no address
            return None
        for y in views:
            self._keep_view(y, x, base)
        return result

    def _keep_view(self, y: Tensor, x: Tensor, slot: int) -> None:
        """Give a tensor that lies in another's memory its slot."""
        if id(y) in self._tensors:
            return
        of = self._slots[slot]
        if of.constant is not None:
            self._constant(y)
            return
        offset, base = of.offset + y.data_ptr() - x.data_ptr(), base_of(self._slots, slot)
        whole = self._slots[base]
        if offset == 0 and (tuple(y.shape), y.stride()) == (whole.size, whole.stride):
            self._tensors[id(y)] = base, y
            return
        slot = self._slot_of(y, owned=of.owned)
        self._slots[slot] = dataclasses.replace(self._slots[slot], base=base, offset=offset)

    def _run_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if type(module) in (MLPConv, Conv1x1, InvertedBottleneck) and len(args) == 1 and not kwargs:
            return self._run_operator(module, args[0])
        return self._run_function(module, args, kwargs)

    def _run_layers(self, layers: Layers, x: Tensor) -> Tensor:
        """Run a chain as it runs when its modules call it."""
        links, chain = layers.links(self._module), layers.chain
        if len(links) == 1 and chain.form == "operator":
            weight, bias = chain.folded(links)[0]
            stride, padding, dilation, groups = links[0].geometry
            found = convolution(x, weight, bias, stride, padding, dilation, groups, links[0].activation)
            if found is not None:
                return self._run_step(found)
        last = links[-1].activation
        if last in ACTIVATIONS or chain.bottleneck:
            return self._run_operator(lambda x: chain.run(x, links), x)
        links[-1] = links[-1]._replace(activation="none")  # behind the operator, a step of its own
        y = self._run_operator(lambda x: chain.run(x, links), x)
        return self._run_function(BOTTLENECK_ACTIVATIONS[last], (y,), {})

    def _run_operator(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run what calls an operator once: its kernel is a step, if that is all that happens."""
        with call_cache.watch() as seen:
            y = function(x)
        if len(seen) == 1 and _same_memory(seen[0].x, x) and _same_memory(seen[0].y, y) and is_dense(y):
            step = step_of_call(seen[0])
            if step is not None:
                self._actions.append(KernelAction(step, self._memory_of(x), -1, self._memory_of(y, owned=True)))
                return y
        return self._keep_call(function, (x,), {}, y)

    def _run_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not tensors_in((args, kwargs)):
            result = function(*args, **kwargs)
            return self._keep_call(function, args, kwargs, result) if tensors_in(result) else result
        if (view := self._view(function, args, kwargs)) is not None:
            return view
        if (joined := concatenation(function, args, kwargs)) is not None:
            y, parts = joined
            whole = self._slot_of(y, owned=True)
            for part in parts:
                assert part.y is not None
                self._keep_view(part.y, y, whole)
                self._run_step(part)
            return y
        weights = tensors_in((args[1:], kwargs)) if function in WEIGHTED else []
        found = find_step(function, args, kwargs) if all(map(self._is_constant, weights)) else None
        if found is None and isinstance(function, nn.Conv2d):  # of a class with a forward of its own
            with _Functions(self._run_function):
                return function(*args, **kwargs)
        if found is not None:
            owned = self._slots[self._slot_of(found.x)].owned
            if found.step is None:
                return found.x
            if found.y is not None or owned:
                return self._run_step(found)
        with _SameShapes(self._weights):
            result = function(*args, **kwargs)
        if not all(isinstance(leaf, Tensor | None) for leaf in pytree.tree_leaves(result)):
            raise NotRecordableError(f"{getattr(function, '__name__', function)} gives what is no tensor")
        return self._keep_call(function, args, kwargs, result)

    def _run_step(self, found: FoundStep) -> Tensor:
        """Run a step, add it and return its result."""
        assert found.step is not None
        y = found.x if found.y is None else found.y
        run_step(self._kernels, found.step, found.x, found.other, y)
        other = -1 if found.other is None else self._memory_of(found.other)
        slots = self._memory_of(found.x), other, self._memory_of(y, owned=True)
        self._actions.append(KernelAction(found.step, *slots))
        return y

    def _keep_call(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> Any:
        """Add a call of a function that is no step of the library, and return its result."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves = [Ref(self._shown(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        slots = [self._slot_of(t) for t in tensors_in(result)]
        self._actions.append(TorchAction(function, leaves, spec, slots))
        return result

    def _slot_of(self, tensor: Tensor, *, owned: bool = False) -> int:
        """Return the slot of a tensor: a new one, unless it has one."""
        known = self._tensors.get(id(tensor))
        if known is not None:
            return known[0]
        self._slots.append(Slot(tuple(tensor.shape), tensor.stride(), tensor.dtype, owned))
        self._tensors[id(tensor)] = len(self._slots) - 1, tensor
        return len(self._slots) - 1

    def _memory_of(self, tensor: Tensor, *, owned: bool = False) -> int:
        """Return the slot of a tensor for a kernel, for which a view of the whole memory is the memory itself."""
        slot = self._slot_of(tensor, owned=owned)
        base = base_of(self._slots, slot)
        whole = self._slots[slot].offset == 0 and tensor.numel() == math.prod(self._slots[base].size)
        return base if whole and is_dense(tensor) else slot

    def _shown(self, tensor: Tensor) -> int:
        """Return the slot of a tensor for PyTorch or the caller, where a view has to be a tensor."""
        slot = self._slot_of(tensor)
        made = self._slots[slot]
        if made.base >= 0 and slot not in self._made_views:
            self._made_views.add(slot)
            args = Ref(made.base), made.size, made.stride, made.offset // tensor.element_size()
            leaves, spec = pytree.tree_flatten((args, {}), is_leaf=is_ref)
            self._actions.append(TorchAction(_view_of, leaves, spec, [slot]))
        return slot

    def _is_constant(self, tensor: Tensor) -> bool:
        known = self._tensors.get(id(tensor))
        return known is not None and self._slots[known[0]].constant is not None

    def _constant(self, tensor: Tensor) -> Tensor:
        self._slots[self._slot_of(tensor)].constant = tensor
        return tensor

    def _fill(self, value: Any) -> Any:
        """Return a node's argument with values in the place of nodes."""
        return fx.node.map_arg(value, self._values.__getitem__)


def _view_of(base: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    """Return a view of a tensor, whatever it is a view of."""
    return base.as_strided(size, stride, base.storage_offset() + offset)


def _plain_containers(value: Any) -> Any:
    """Return a result with the lists and dicts that a forward makes, in the place of those of torch.fx."""
    if isinstance(value, list):
        return [_plain_containers(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain_containers(item) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(map(_plain_containers, value))
    return value


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype


def _last_uses(network: NetworkGraph) -> dict[fx.Node, list[fx.Node]]:
    """Return the nodes whose values nobody needs behind a node; a chain needs its input at its end."""
    seen: set[fx.Node] = set()
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(network.graph.nodes):
        chain = network.chains.get(node)
        for value in (*node.all_input_nodes, *(() if chain is None else (chain.x,)), node):
            if value not in seen:
                seen.add(value)
                uses.setdefault(node, []).append(value)
    return uses
