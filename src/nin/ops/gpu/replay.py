"""Record what a call does, its PyTorch operators and kernel launches, and do the same again without its Python.

A call of ``nin::mlpconv`` decides by shapes, strides, dtypes and settings only. So a call that is equal in all of them
runs the same operators and launches the same kernels on other tensors: a `RecordedCall` is a flat list of them.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nin.ops.gpu import launch
from nin.ops.gpu.launch import KernelLaunch

Tensors = list[Any]

aten = torch.ops.aten
ALLOCATIONS = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)

LARGE_BYTES = 1 << 20


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
        made: of an allocation or a view, the tensor's size, strides, dtype and device.
        offset: of a view, in values from the start of the tensor that it is a view of, which is its first argument.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Slot | None]
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
        leaves = pytree.tree_leaves(results)
        if any(leaf is not None and not isinstance(leaf, Tensor) for leaf in leaves):
            raise NotReplayableError(f"{func} returned something else than tensors")
        step = _Step(func, noted_args, noted_kwargs, [None if leaf is None else self.add(leaf) for leaf in leaves])
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
    return result, RecordedCall(recorder.steps, len(recorder.tensors), len(inputs), recorder.to_slots(result))


class RecordedCall:
    """A call's operators and launches, to be run again on other tensors.

    They must be as those recorded in shape, strides, dtype, device and alignment.
    """

    def __init__(self, steps: list[_Step], tensors: int, inputs: int, result: Any) -> None:
        self._result = result
        self._blank = [None] * (tensors - inputs)
        results = slots_in(result)
        steps = _without_unused(_with_owners(steps), results)
        self._has_launches = any(isinstance(s.function, KernelLaunch) and s.function.start for s in steps)
        self._steps: list[Callable[[Tensors, int], None]] = []
        large = _large_tensors(steps)
        for i, step in enumerate(steps):
            self._steps.append(_compiled_step(step))
            # memory goes to others after its last use, as in the recorded call; a little of it may wait for the end
            later = results.union(*(other.uses() for other in steps[i + 1 :]))
            last = step.uses().union(slot for slot in step.results if slot is not None) - later
            done = [slot for slot in last if slot >= inputs and slot in large]
            if done:
                self._steps.append(_freeing_step(done))

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Run the call on tensors in the order of those that it was recorded with."""
        tensors = [*inputs, *self._blank]
        stream = launch.current_stream(inputs[0]) if self._has_launches else 0
        for step in self._steps:
            step(tensors, stream)
        return _fill(self._result, tensors)


def slots_in(tree: Any) -> set[Slot]:
    """Return the slots among arguments or results."""
    return {leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Slot)}


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


def _compiled_step(step: _Step) -> Callable[[Tensors, int], None]:
    """Return a function that runs the step on a call's tensors, on a stream."""
    if isinstance(step.function, KernelLaunch):
        return _launch_step(step.function, step.args)
    if step.made:
        return _allocation_step(step) if step.offset is None else _view_step(step)
    function, results = step.function, step.results
    args, kwargs = list(step.args), step.kwargs
    # most tensors are arguments of their own; few are in lists
    places = [(i, arg) for i, arg in enumerate(args) if isinstance(arg, Slot)]
    nested = bool(slots_in((kwargs, [arg for arg in args if not isinstance(arg, Slot)])))

    def run(tensors: Tensors, stream: int) -> None:
        filled, options = (_fill(args, tensors), _fill(kwargs, tensors)) if nested else (args.copy(), kwargs)
        for i, slot in places:
            filled[i] = tensors[slot]
        got = function(*filled, **options)
        for place, t in zip(results, [got] if isinstance(got, Tensor) else pytree.tree_leaves(got), strict=True):
            if place is not None:
                tensors[place] = t

    return run


def _launch_step(made: KernelLaunch, args: tuple[Any, ...]) -> Callable[[Tensors, int], None]:
    start = made.start
    if start is None:
        return lambda tensors, stream: made([tensors[slot] for slot in args])
    trailing = made.trailing

    def run(tensors: Tensors, stream: int) -> None:
        start(*[tensors[slot].data_ptr() + offset for slot, offset in args], *trailing, stream=stream)

    return run


def _allocation_step(step: _Step) -> Callable[[Tensors, int], None]:
    (slot,), (size, stride, dtype, device), empty = step.results, step.made, torch.empty_strided

    def run(tensors: Tensors, stream: int) -> None:
        tensors[slot] = empty(size, stride, dtype=dtype, device=device)  # type: ignore[index]

    return run


def _view_step(step: _Step) -> Callable[[Tensors, int], None]:
    (slot,), (size, stride, *_), owner, offset = step.results, step.made, step.args[0], step.offset

    def run(tensors: Tensors, stream: int) -> None:
        t = tensors[owner]
        tensors[slot] = t.as_strided(size, stride, t.storage_offset() + offset)  # type: ignore[index]

    return run


def _freeing_step(slots: list[Slot]) -> Callable[[Tensors, int], None]:
    def run(tensors: Tensors, stream: int) -> None:
        for slot in slots:
            tensors[slot] = None

    return run


def _fill(tree: Any, tensors: Tensors) -> Any:
    """Return arguments or results with tensors in the place of their slots."""
    kind = type(tree)
    if kind is Slot:
        return tensors[tree]
    if kind is tuple or kind is list:
        return kind([_fill(leaf, tensors) for leaf in tree])
    return {name: _fill(leaf, tensors) for name, leaf in tree.items()} if kind is dict else tree
