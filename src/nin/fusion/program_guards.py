"""What a recorded program depends on besides tensors' values: the modules' attributes, their classes, globals."""

import copy
import gc
import operator
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nin.ops.cpu.object_memory import ObjectMemory, watch_modules

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_CONTENTS = "_parameters", "_buffers", "_modules"
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, dict, set, tuple)
# PyTorch's layers whose forwards read no parameters, buffers and modules but those that they were made with
_LAYERS = {f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "conv", "dropout", "linear", "pooling")}
_MOST_ITEMS = 1000  # of a container whose copy is compared in every call


class ModuleState:
    """The state of a module and those in it, to see that a recorded forward would run as it did.

    It sees other values of attributes (modes such as ``training`` are attributes), other modules, parameters and
    buffers in their places, hooks, methods that were replaced in classes, and other values of the globals that the
    forwards read. It cannot see what a forward asks the world outside: a clock, a file.

    Args:
        module: in the state that is the right one.

    Attributes:
        tensors: its parameters and buffers.
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
        classes = [vars(c) for c in _foreign_classes(modules)]
        self._dicts: list[Any] = [*dicts, *classes]
        self._values = _values(self._dicts)
        behind = [d for c in classes for d in gc.get_referents(c) if isinstance(d, dict)]  # what vars(class) shows
        is_layer = [type(m).__module__ in _LAYERS for m in modules]
        kept = [d[name] for d, layer in zip(dicts, is_layer, strict=True) for name in _CONTENTS if d[name] or not layer]
        self._watched = [*dicts, *behind, *kept]
        self._memory: ObjectMemory | None = None  # which tells that these are what they were
        containers = [v for d in dicts for name, v in d.items() if not name.startswith("_") and _is_copied(v)]
        self._globals = list(_read_globals(classes))
        containers += [v for *_, v in self._globals if _is_copied(v)]
        self._containers, self._copies = containers, copy.deepcopy(containers)

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
        if self._memory is None or not self._memory.is_unchanged():
            memory = watch_modules(self._modules, self._watched)  # before they are asked
            if not self._dicts_hold():
                return False
            self._memory = memory
        try:
            return self._containers == self._copies
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
            return _values(self._dicts) == self._values
        except (RuntimeError, TypeError, ValueError):  # of tensors and arrays, which are not simply equal
            return False


def _values(spaces: Iterable[Any]) -> list[Any]:
    """Return the values in dicts: one list for all, which is read faster than one for each."""
    values: list[Any] = []
    for space in spaces:
        values += space.values()
    return values


def _is_copied(value: Any) -> bool:
    """Return whether a value is a container of plain values, which may be changed in place."""
    if type(value) is tuple and all(isinstance(item, _PLAIN) for item in value):
        return False  # nothing in it can be changed
    return type(value) in _CONTAINERS and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if type(value) not in _CONTAINERS:
        return isinstance(value, _PLAIN)
    items = [*value.keys(), *value.values()] if type(value) is dict else value
    return len(items) <= _MOST_ITEMS and all(map(_is_plain, items))


def _is_foreign(name: str | None) -> bool:
    """Return whether code is neither PyTorch's nor nin's nor Python's own, by its module's name."""
    return name is not None and name.partition(".")[0] not in ("torch", "nin", "builtins", "typing", "abc")


def _foreign_classes(modules: Iterable[nn.Module]) -> list[type]:
    classes = dict.fromkeys(c for m in modules for c in type(m).__mro__)
    return [c for c in classes if _is_foreign(c.__module__)]


def _read_globals(classes: list[Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield the globals that forwards, and what they call, may read: namespace, name and value.

    Args:
        classes: the contents of the modules' classes.
    """
    waiting = [_function(c.get("forward")) for c in classes]
    known: set[Any] = set()
    while waiting:
        function = waiting.pop()
        if function is None or function in known or not _is_foreign(function.__module__):
            continue
        known.add(function)
        names = set(_names_in(function.__code__))
        waiting += [_function(c[name]) for name in names for c in classes if name in c]
        spaces = [function.__globals__]
        spaces += [
            vars(v) for v in map(spaces[0].get, names) if isinstance(v, types.ModuleType) and _is_foreign(v.__name__)
        ]
        for space in spaces:
            for name in names & space.keys():
                value = space[name]
                if isinstance(value, types.FunctionType):
                    waiting.append(value)
                if isinstance(value, (*_PLAIN, types.FunctionType)) or type(value) in _CONTAINERS:
                    yield space, name, value


def _function(value: Any) -> types.FunctionType | None:
    """Return the Python function of a class's attribute, unwrapped; None if it is none."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value if isinstance(value, types.FunctionType) else None


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
