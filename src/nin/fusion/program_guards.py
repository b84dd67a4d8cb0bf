"""What a recorded program depends on besides tensors' values: the modules' attributes, their classes, globals."""

import copy
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nin.fusion.reachable_state import ReachableState, contents_of, is_layer
from nin.ops.cpu.object_memory import ObjectMemory, watch_modules

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_CONTENTS = "_parameters", "_buffers", "_modules"


class ModuleState:
    """The state of a module and those in it, to see that a recorded forward would run as it did.

    It sees other values of attributes (modes such as ``training`` are attributes), other modules, parameters and
    buffers in their places, hooks, methods that were replaced in classes, and other values of what the forwards can
    reach (`ReachableState`). It cannot see what a forward asks the world outside: a clock, a file.

    Args:
        module: in the state that is the right one.

    Attributes:
        tensors: its parameters and buffers.
        is_known: whether nothing that the forwards may read can change unseen.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        dicts = [vars(m) for m in modules]
        contents = [d[name] for d in dicts for name in _CONTENTS]
        self._modules, self._classes = modules, [type(m) for m in modules]
        # dicts that must stay empty, and those that must keep what they hold: the very same tensors and modules
        self._hooks, self._last_hook = [d[name] for d in dicts for name in _HOOKS], -1
        self._empty = [c for c in contents if not c]
        self._filled = [c for c in contents if c]
        self._held = _values(self._filled)
        self.tensors = [held for held in self._held if isinstance(held, Tensor)]
        self._dicts, self._values = dicts, _values(dicts)
        state = ReachableState(modules)
        self.is_known = state.is_known
        self._globals, self._cells = state.globals, state.cells
        self._mappings, self._mapping_copies = state.mappings, [dict(m) for m in state.mappings]
        self._sequences, self._sequence_copies = state.sequences, [copy.copy(s) for s in state.sequences]
        kept = [
            d[name] for m, d in zip(modules, dicts, strict=True) for name in _CONTENTS if d[name] or not is_layer(m)
        ]
        self._watched = [*dicts, *kept, *self._mappings]
        self._memory: ObjectMemory | None = None  # which tells that these are what they were

    def wants_gradients(self) -> bool:
        """Return whether a parameter or buffer requires gradients."""
        return any(t.requires_grad for t in self.tensors)

    def holds(self) -> bool:
        """Return whether everything is as it was."""
        last_hook = RemovableHandle.next_id  # every hook that is registered raises it
        if last_hook != self._last_hook:
            if any(self._hooks):
                return False
            self._last_hook = last_hook
        if not all(space.get(name) is value for space, name, value in self._globals):
            return False
        if not all(contents_of(cell) is value for cell, value in self._cells):
            return False
        if self._memory is None or not self._memory.is_unchanged():
            memory = watch_modules(self._modules, self._watched)  # before they are asked
            if not self._dicts_hold():
                return False
            self._memory = memory
        try:
            return self._sequences == self._sequence_copies
        except (RuntimeError, TypeError, ValueError):  # of tensors and arrays, which are not simply equal
            return False

    def _dicts_hold(self) -> bool:
        """Ask each dict for its values."""
        if any(self._empty) or sum(map(len, self._filled)) != len(self._held):
            return False
        if not all(map(operator.is_, _values(self._filled), self._held)):
            return False
        if [type(m) for m in self._modules] != self._classes:
            return False
        try:
            return _values(self._dicts) == self._values and self._mappings == self._mapping_copies
        except (RuntimeError, TypeError, ValueError):  # of tensors and arrays, which are not simply equal
            return False


def _values(spaces: Iterable[Any]) -> list[Any]:
    """Return the values in dicts: one list for all, which is read faster than one for each."""
    values: list[Any] = []
    for space in spaces:
        values += space.values()
    return values
