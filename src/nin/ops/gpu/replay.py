"""Record what a call does, its PyTorch operators and kernel launches, and do the same again without its Python.

A call of ``nin::mlpconv`` decides by shapes, strides, dtypes and settings only. So a call that is equal in all of them
runs the same operators and launches the same kernels on other tensors: a `RecordedCall` is a flat list of them.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nin.ops.gpu import launch
from nin.ops.gpu.launch import KernelLaunch

aten = torch.ops.aten
ALLOCATIONS = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)

LARGE_BYTES = 1 << 20

# PyTorch's Python functions of operators that take longer to call as such: 1.8 µs instead of 1.2.
PYTHON_FUNCTIONS: dict[Any, Callable[..., Any]] = {aten.mm.out: torch.mm, aten.mm.dtype_out: torch.mm}

# What Inductor's code allocates by, on the current GPU, and makes views by: 0.3 µs instead of 0.8, 0.15 instead of 0.9,
# as the dispatcher is not asked. They are not public, so that they may be missing one day.
_guards = torch._C._dynamo.guards
_EMPTY: dict[str, Callable[..., Tensor]] = {
    device: getattr(_guards, name) for device in ("cpu", "cuda") if hasattr(_guards, name := f"_empty_strided_{device}")
}


def _view_slowly(t: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    return t.as_strided(size, stride, t.storage_offset() + offset)


_view: Callable[..., Tensor] = getattr(_guards, "_reinterpret_tensor", _view_slowly)


class NotReplayableError(RuntimeError):
    """The call used a tensor that is neither an argument nor made by it, or read a value of one."""


class Slot(int):
    """The place of a tensor in the list of a call's tensors: its arguments, then what it makes."""


@dataclasses.dataclass
class _Step:
    """An operator or a launch; in its arguments slots stand for tensors.

    Attributes:
        function: what is called.
        args: its arguments.
        kwargs: its keyword arguments.
        results: slots of the tensors that it returns, None for what is none.
        several: whether it returns a tuple or list of them.
        made: of an allocation or a view, the tensor's size, strides, dtype and device.
        offset: of a view, in values from the start of the tensor that it is a view of, which is its first argument.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Slot | None]
    several: bool = False
    made: tuple[Any, ...] = ()
    offset: int | None = None

    def uses(self) -> set[Slot]:
        """Return the slots of the tensors that it takes."""
        return slots_in((self.args, self.kwargs))


class _Recorder(TorchDispatchMode):
    """Note each operator and each launch."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        # all tensors of the recording stay alive with it, so an id belongs to one of them only
        self.tensors: list[Tensor | None] = []
        self.slots: dict[int, Slot] = {}
        self.steps: list[_Step] = []
        self.paused = False
        for t in inputs:
            self.add(t)

    def add(self, t: Tensor | None) -> Slot | None:
        """Return the slot of a tensor, a new one if it is new."""
        if t is None or id(t) not in self.slots:
            self.tensors.append(t)
            if t is None:
                return None
            self.slots[id(t)] = Slot(len(self.tensors) - 1)
        return self.slots[id(t)]

    def to_slots(self, tree: Any) -> Any:
        """Return arguments with their tensors replaced by slots."""

        def to_slot(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and id(leaf) not in self.slots:
                raise NotReplayableError("a tensor from outside the call")
            return self.slots[id(leaf)] if isinstance(leaf, Tensor) else leaf

        return pytree.tree_map(to_slot, tree)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        noted_args, noted_kwargs = self.to_slots(args), self.to_slots(kwargs)
        results = func(*args, **kwargs)
        several = isinstance(results, tuple | list)
        leaves = results if several else [results]
        if any(leaf is not None and not isinstance(leaf, Tensor) for leaf in leaves):
            raise NotReplayableError(f"{func} returned something else than tensors")
        slots = [None if leaf is None else self.add(leaf) for leaf in leaves]
        step = _Step(func, noted_args, noted_kwargs, slots, several)
        is_view = func.is_view and len(leaves) == 1 and leaves[0].dtype == args[0].dtype
        if is_view or func in ALLOCATIONS:
            step.made = leaves[0].shape, leaves[0].stride(), leaves[0].dtype, leaves[0].device
        if is_view:
            step.offset = leaves[0].storage_offset() - args[0].storage_offset()
        self.steps.append(step)
        return results

    @contextlib.contextmanager
    def launching(self, made: KernelLaunch, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Note a launch, and nothing of what it does: the interpreter of kernels uses PyTorch's operators too."""
        self.steps.append(_Step(made, self.to_slots(tuple(tensors)), {}, []))
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


def record(call: Callable[..., Any], inputs: Sequence[Tensor | None]) -> tuple[Any, "RecordedCall"]:
    """Run ``call(*inputs)``; return its result, and the call to be replayed.

    Args:
        call: returns a tensor, or tuples and lists of them.
        inputs: plain tensors, no gradients wanted.

    Raises:
        NotReplayableError: see there.
    """
    # each a tensor of its own, even where the same one was given twice: the next call may be given two
    inputs = [None if t is None else t.detach() for t in inputs]
    recorder = _Recorder(inputs)
    with launch.record_launches(recorder.launching), recorder:
        result = call(*inputs)
    return result, RecordedCall(recorder.steps, len(inputs), recorder.to_slots(result))


class RecordedCall:
    """A call's operators and launches, to be run again on other tensors.

    They must be as those recorded in shape, strides, dtype, device and alignment.

    Attributes:
        source: of the function that runs it; see `_Source`.
    """

    def __init__(self, steps: list[_Step], inputs: int, result: Any) -> None:
        steps, result = _without_aliases(steps, result)
        results = slots_in(result)
        steps = _without_unused(_with_owners(steps), results)
        source = _Source()
        # memory goes to others after its last use, as in the recorded call; a little of it may wait for the end
        last_uses = {slot: i for i, step in enumerate(steps) for slot in (*step.uses(), *step.results)}
        done: list[list[Slot]] = [[] for _ in steps]
        for slot in _large_tensors(steps) - results:
            if slot is not None and slot >= inputs:
                done[last_uses[slot]].append(slot)
        for step, slots in zip(steps, done, strict=True):
            source.add(step)
            source.free(slots)
        self.source = source.function(inputs, result)
        exec(self.source, source.names)
        self._run = source.names["replay"]

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Run the call on tensors in the order of those that it was recorded with."""
        return self._run(*inputs)


def slots_in(tree: Any) -> set[Slot]:
    """Return the slots among arguments or results."""
    return {leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Slot)}


def _without_aliases(steps: list[_Step], result: Any) -> tuple[list[_Step], Any]:
    """Return steps and result without the views that are all of a tensor which the call makes, as it lies."""
    made: dict[Any, tuple[Any, ...]] = {}
    alias: dict[Any, Slot] = {}

    def to_owner(leaf: Any) -> Any:
        return alias.get(leaf, leaf) if isinstance(leaf, Slot) else leaf

    kept = []
    for step in steps:
        args, kwargs = pytree.tree_map(to_owner, (step.args, step.kwargs))
        step = dataclasses.replace(step, args=args, kwargs=kwargs)
        if step.offset == 0 and made.get(args[0]) == step.made:
            alias[step.results[0]] = args[0]
            continue
        if step.made:
            made[step.results[0]] = step.made
        kept.append(step)
    return kept, pytree.tree_map(to_owner, result)


def _with_owners(steps: list[_Step]) -> list[_Step]:
    """Return the steps with each view taken in one step from the tensor that owns the memory.

    Launches that take addresses get pairs (owner, offset in bytes), so that they need no views at all.
    """
    views: dict[Any, tuple[Slot, int, int]] = {}  # of a view: its owner, and its offset in values and in bytes
    found = []
    for step in steps:
        if step.offset is not None:
            owner, offset, _ = views.get(step.args[0], (step.args[0], 0, 0))
            offset += step.offset
            views[step.results[0]] = owner, offset, offset * step.made[2].itemsize
            step = dataclasses.replace(step, args=(owner, *step.args[1:]), offset=offset)
        elif isinstance(step.function, KernelLaunch) and step.function.start:
            owners = [views.get(slot, (slot, 0, 0)) for slot in step.args]
            step = dataclasses.replace(step, args=tuple((owner, offset) for owner, _, offset in owners))
        found.append(step)
    return found


def _large_tensors(steps: list[_Step]) -> set[Any]:
    """Return the slots of tensors that may hold a megabyte or more: allocations, their views, and results."""
    large: set[Any] = set()
    for step in steps:
        if step.offset is not None:
            is_large = step.args[0] in large
        elif step.made:
            size, _, dtype, _ = step.made
            is_large = size.numel() * dtype.itemsize >= LARGE_BYTES
        else:
            is_large = True
        if is_large:
            large.update(step.results)
    return large


def _without_unused(steps: list[_Step], results: set[Slot]) -> list[_Step]:
    """Return the steps without views and allocations that nothing reads."""
    wanted, kept = set(results), []
    for step in reversed(steps):
        if not step.made or wanted.intersection(step.results):
            wanted |= step.uses()
            kept.append(step)
    return kept[::-1]


class _Source:
    """The source of a function that runs steps: a line for each, where ``t5`` is the tensor of slot 5.

    A loop over functions that look up their tensors takes longer than what they call.

    Attributes:
        names: what its names stand for.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self._constants: dict[int, str] = {}
        self._lines: list[str] = []

    def add(self, step: _Step) -> None:
        """Append a step."""
        function, args, kwargs = PYTHON_FUNCTIONS.get(step.function, step.function), step.args, step.kwargs
        if isinstance(function, KernelLaunch):
            self._add_launch(function, args)
            return
        if step.made:
            size, stride, dtype, device = step.made
            args, kwargs = (tuple(size), stride), {}
            if step.offset is None:
                function = functools.partial(torch.empty_strided, dtype=dtype, device=device)
                if device.type in _EMPTY:
                    function, args = _EMPTY[device.type], (*args, dtype)
            else:
                function, args = _view, (step.args[0], *args, step.offset)
        named = [f"{name}={self._text(value)}" for name, value in kwargs.items()]
        call = f"{self._text(function)}({', '.join([*map(self._text, args), *named])})"
        comma = "," if step.several and not step.made else ""
        results = "".join(("_" if slot is None else self._text(slot)) + comma for slot in step.results)
        self._lines.append(f"{results} = {call}" if results else call)

    def _add_launch(self, made: KernelLaunch, args: Sequence[Any]) -> None:
        if made.start is None:
            self._lines.append(f"{self._text(made)}({self._text(list(args))})")
            return
        if "current_stream" not in self.names:
            self.names["current_stream"] = launch.current_stream
            self._lines.insert(0, "stream = current_stream(t0)")
        addresses = [f"t{int(slot)}.data_ptr()" + (f" + {offset}" if offset else "") for slot, offset in args]
        arguments = ", ".join([*addresses, *map(self._text, made.trailing), "stream=stream"])
        self._lines.append(f"{self._text(made.start)}({arguments})")

    def free(self, slots: Sequence[Slot]) -> None:
        """Append that memory is let go."""
        self._lines += [f"{self._text(slot)} = None" for slot in slots]

    def function(self, inputs: int, result: Any) -> str:
        """Return the source of ``replay``, a function of the call's tensors."""
        names = ", ".join(f"t{i}" for i in range(inputs))
        return "\n    ".join([f"def replay({names}):", *self._lines, f"return {self._text(result)}"])

    def _text(self, value: Any) -> str:
        """Return the source of a value."""
        kind = type(value)
        if kind is Slot:
            return f"t{int(value)}"
        if value is None or kind in (bool, int, str):
            return repr(value)
        if kind is list:
            return f"[{', '.join(map(self._text, value))}]"
        if kind is tuple:
            return f"({''.join(self._text(item) + ', ' for item in value)})"
        # the value stays in the names, so no other gets its id
        name = self._constants.setdefault(id(value), f"c{len(self._constants)}")
        self.names[name] = value
        return name
