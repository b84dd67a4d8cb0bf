"""The plan of a compiled network: steps, stretches of which one call of the compiled library runs, and their memory."""

import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nin.ops.cpu.library import Kernels
from nin.ops.cpu.steps import NO_OPERAND, KernelStep, Operand, PackedSteps, StepKind

_ALIGNMENT = 64  # bytes: a cache line


class Ref(NamedTuple):
    """The place of a tensor among a plan's values."""

    slot: int


def is_ref(value: Any) -> bool:
    """Return whether a value is a `Ref`, which pytree would take for a tuple."""
    return type(value) is Ref


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a nested value, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclasses.dataclass
class Slot:
    """A tensor of a plan.

    Attributes:
        size: of the tensor.
        stride: of the tensor.
        dtype: of the tensor.
        owned: whether a kernel wrote it first, so that the plan chooses its memory; it is dense then.
        constant: a parameter or buffer, or a view of one, which is the same in every call.
        base: the slot whose memory it is a view of; -1: it is none.
        offset: of a view in its base, in bytes.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    owned: bool = False
    constant: Tensor | None = None
    base: int = -1
    offset: int = 0

    def empty(self) -> Tensor:
        """Return a tensor like it, of any values."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="cpu")


def base_of(slots: Sequence[Slot], slot: int) -> int:
    """Return the slot that holds the memory of a slot: itself, unless it is a view."""
    return slot if slots[slot].base < 0 else slots[slot].base


@dataclasses.dataclass
class KernelAction:
    """A step for the library, with its slots; ``other`` is -1 where there is none."""

    step: KernelStep
    x: int
    other: int
    y: int

    def slots(self) -> list[int]:
        """Return the slots that it reads and writes."""
        return [slot for slot in (self.x, self.other, self.y) if slot >= 0]


@dataclasses.dataclass
class TorchAction:
    """A call of a function.

    Attributes:
        function: what is called.
        leaves: the tensors and other values in its arguments, with `Ref` in the place of tensors.
        spec: how they stand in the arguments and keyword arguments.
        results: the slots of the tensors that it returns.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    spec: pytree.TreeSpec
    results: list[int]

    def slots(self) -> list[int]:
        """Return the slots that it reads."""
        return [leaf.slot for leaf in self.leaves if is_ref(leaf)]

    def __call__(self, values: list[Any]) -> None:
        """Run it."""
        leaves = [values[leaf.slot] if type(leaf) is Ref else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        result = self.function(*args, **kwargs)
        tensors = [result] if isinstance(result, Tensor) else tensors_in(result)
        for slot, tensor in zip(self.results, tensors, strict=True):
            values[slot] = tensor


class _Stretch:
    """Steps that one call of the library runs.

    Args:
        kernels: of the instruction set in use.
        actions: the steps.
        slots: of the plan.
        places: the offsets of slots in the shared memory; the others are tensors of their own.
        made: slots for which a tensor was made before.
    """

    def __init__(
        self, kernels: Kernels, actions: list[KernelAction], slots: list[Slot], places: dict[int, int], made: set[int]
    ) -> None:
        self._tensors: list[int] = []  # whose addresses follow that of the shared memory
        self._new: list[tuple[int, Slot]] = []

        def operand(slot: int) -> Operand:
            if slot < 0:
                return NO_OPERAND
            slot, offset = base_of(slots, slot), slots[slot].offset
            if slot in places:
                return 0, places[slot] + offset
            if slots[slot].owned and slot not in made:
                self._new.append((slot, slots[slot]))
                made.add(slot)
            if slot not in self._tensors:
                self._tensors.append(slot)
            return self._tensors.index(slot) + 1, offset

        steps = [(a.step, tuple(map(operand, (a.x, a.other, a.y)))) for a in actions]
        self._packed = PackedSteps(kernels, steps)

    def __call__(self, values: list[Any], address: int) -> None:
        for number, slot in self._new:
            values[number] = slot.empty()
        self._packed.run([address, *(values[slot].data_ptr() for slot in self._tensors)])

    def slots(self) -> list[int]:
        """Return the slots whose tensors it reads and writes."""
        return self._tensors


class Plan:
    """What a compiled network does with inputs of given shapes.

    Args:
        kernels: of the instruction set in use.
        slots: the tensors.
        actions: in order.
        inputs: the slots of the inputs.
        output: the result, with Ref in the place of tensors.
    """

    def __init__(
        self,
        kernels: Kernels,
        slots: list[Slot],
        actions: Sequence[KernelAction | TorchAction],
        inputs: list[int],
        output: Any,
    ) -> None:
        self._values: list[Any] = [slot.constant for slot in slots]
        self.dtypes = {slot.dtype for slot in slots}
        self._inputs, self._output = inputs, output
        self._only = output.slot if is_ref(output) else None
        shown = {leaf.slot for leaf in pytree.tree_leaves(output, is_leaf=is_ref) if is_ref(leaf)}
        # what PyTorch reads, or the caller gets: tensors of their own
        visible = shown.union(*(action.slots() for action in actions if isinstance(action, TorchAction)))
        visible = {base_of(slots, slot) for slot in visible}
        merged = _merge(actions, slots, visible)
        places, self.memory_bytes = _place(merged, slots, visible)
        self.parts: list[_Stretch | TorchAction] = []
        made: set[int] = set()
        waiting: list[KernelAction] = []
        for action in (*merged, None):
            if isinstance(action, KernelAction):
                waiting.append(action)
                continue
            if waiting:
                self.parts.append(_Stretch(kernels, waiting, slots, places, made))
                waiting = []
            if action is not None:
                self.parts.append(action)
        self._drops = _last_uses(self.parts, {*inputs, *shown})
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """Return the result for inputs of the shapes that it was made for."""
        values = self._values.copy()
        for slot, tensor in zip(self._inputs, inputs, strict=True):
            values[slot] = tensor
        # each thread that calls takes memory of its own; one block waits for the next call
        with self._lock:
            memory = self._free.pop() if self._free else None
        if memory is None:
            with torch.inference_mode(False):
                memory = torch.empty(self.memory_bytes + _ALIGNMENT, dtype=torch.uint8, device="cpu")
        address = (memory.data_ptr() + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
        for part, drops in zip(self.parts, self._drops, strict=True):
            if type(part) is _Stretch:
                part(values, address)
            else:
                part(values)  # type: ignore[call-arg]
            for slot in drops:
                values[slot] = None
        with self._lock:
            if not self._free:
                self._free.append(memory)
        if self._only is not None:
            return values[self._only]
        return pytree.tree_map(lambda leaf: values[leaf.slot] if is_ref(leaf) else leaf, self._output, is_leaf=is_ref)


def _last_uses(parts: Sequence[_Stretch | TorchAction], kept: set[int]) -> list[list[int]]:
    """Return for each part the slots whose tensors nobody needs behind it."""
    drops: list[list[int]] = []
    for part in reversed(parts):
        slots = {*part.slots(), *(part.results if isinstance(part, TorchAction) else ())} - kept
        drops.insert(0, sorted(slots))
        kept |= slots
    return drops


def _merge(
    actions: Sequence[KernelAction | TorchAction], slots: list[Slot], visible: set[int]
) -> list[KernelAction | TorchAction]:
    """Join sums with what comes before them where one kernel does both."""
    uses = Counter(base_of(slots, slot) for action in actions for slot in action.slots())
    merged: list[KernelAction | TorchAction] = []
    for action in actions:
        before = merged[-1] if merged else None
        if isinstance(action, KernelAction) and isinstance(before, KernelAction):
            # the first result is overwritten, or nobody reads it but the second step
            passed_on = action.y == before.y or (uses[before.y] == 2 and before.y not in visible)
            joined = _joined(before, action) if passed_on and action.step.kind == StepKind.ADD else None
            if joined is not None:
                merged[-1] = joined
                continue
        merged.append(action)
    return merged


def _joined(before: KernelAction, action: KernelAction) -> KernelAction | None:
    """Return one step for two, of which the second reads what the first wrote; None if there is none."""
    if action.other < 0 and action.x == before.y and before.step.activates_nothing():
        return dataclasses.replace(before, step=before.step.with_activation(action.step.option), y=action.y)
    if before.step.kind != StepKind.BOTTLENECK or before.step.option or action.step.option:
        return None
    if {action.x, action.other} == {before.x, before.y} and before.x != before.y and action.y != before.x:
        return dataclasses.replace(before, step=before.step.with_residual(), y=action.y)
    return None


def _place(
    actions: list[KernelAction | TorchAction], slots: list[Slot], visible: set[int]
) -> tuple[dict[int, int], int]:
    """Return the offsets of the tensors in the memory that they share one after the other, and its bytes."""
    lives: dict[int, tuple[int, int]] = {}
    for i, action in enumerate(actions):
        for view in action.slots() if isinstance(action, KernelAction) else ():
            slot = base_of(slots, view)
            if slots[slot].owned and slot not in visible:
                lives[slot] = lives.get(slot, (i, i))[0], i
    places: dict[int, int] = {}
    taken: list[tuple[int, int, int]] = []  # of those alive: offset, end, last use
    total = 0
    for slot, (first, last) in lives.items():  # in the order in which they are written
        taken = sorted(block for block in taken if block[2] >= first)
        values, offset = math.prod(slots[slot].size) * slots[slot].dtype.itemsize, 0
        need = -(-values // _ALIGNMENT) * _ALIGNMENT
        for start, end, _ in taken:
            if start - offset >= need:
                break
            offset = max(offset, end)
        places[slot] = offset
        taken.append((offset, offset + need, last))
        total = max(total, offset + need)
    return places, total
