"""The mutable state that the forwards of a network can reach: attributes, items, globals and closures."""

import collections
import enum
import functools
import gc
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# what does not change, or cannot be used by a program (tensors that are no parameters and buffers)
_FIXED: tuple[type, ...] = (
    *_PLAIN,
    type(Ellipsis),
    *(range, slice, type, enum.Enum, re.Pattern, pathlib.PurePath),
    *(
        types.BuiltinFunctionType,
        types.GenericAlias,
        types.UnionType,
        types.ModuleType,
        types.MethodDescriptorType,
        types.WrapperDescriptorType,
    ),
    *(Tensor, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, torch.Size),
)
_SEQUENCES = (list, set, collections.deque)
_MOST_VALUES = 20_000

# PyTorch's layers whose forwards read no other attributes, parameters and modules than those that they were made with
_LAYERS = {f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "conv", "dropout", "linear", "pooling")}
_OF_MODULES = {*vars(nn.Module()), "nin_chain", "_nin_program"} - {"training"}


class ReachableState:
    """What the forwards of modules may read and somebody may change: found once, to be compared in every call.

    Args:
        modules: of the network.

    Attributes:
        mappings: dicts, those of objects' and classes' attributes among them.
        sequences: other containers.
        cells: variables of enclosing functions, with what they hold.
        globals: that the forwards, and what they call, read by name: namespace, name and value.
        is_known: whether nothing was met whose state cannot be seen.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.mappings: list[dict[Any, Any]] = []
        self.sequences: list[Any] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        self.globals: list[tuple[dict[str, Any], str, Any]] = []
        self.is_known = True
        self._classes: dict[type, dict[str, Any]] = {}
        modules = list(modules)
        self._seen = {id(m): m for m in modules}  # kept, so that no other object gets the name
        for module in modules:
            self._add_classes(type(module))
            own = is_layer(module)
            for name, value in vars(module).items():
                if name not in _OF_MODULES and not (own and name.startswith("_")):
                    self._visit(value)
        count = -1
        while self.is_known and count != len(self._classes):  # what globals hold may have classes of its own
            count = len(self._classes)
            self.globals = list(_read_globals(list(self._classes.values()), self._visit))

    def _visit(self, root: Any) -> None:
        waiting = [root]
        while waiting and self.is_known:
            value = waiting.pop()
            if isinstance(value, type):
                self._add_classes(value)
            elif not isinstance(value, _FIXED) and id(value) not in self._seen:
                self._seen[id(value)] = value
                waiting += self._inside(value)
                self.is_known = self.is_known and len(self._seen) < _MOST_VALUES

    def _inside(self, value: Any) -> Iterable[Any]:
        """Note what can be changed in a value, and return what else it holds."""
        if isinstance(value, types.FunctionType):
            if not is_foreign(value.__module__):
                return ()
            cells = [(cell, contents_of(cell)) for cell in value.__closure__ or ()]
            self.cells += cells
            return [*(v for _, v in cells), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        if isinstance(value, nn.Module):
            self.mappings += [vars(value), value._parameters, value._buffers, value._modules]
            return [v for name, v in vars(value).items() if name not in _OF_MODULES] + [*value._modules.values()]
        if isinstance(value, types.MethodType):
            return value.__self__, value.__func__
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        inside: list[Any] = []
        if isinstance(value, dict):
            self.mappings.append(value)
            inside += [*value.keys(), *value.values()]
        elif isinstance(value, _SEQUENCES):
            self.sequences.append(value)
            inside += value
        elif isinstance(value, tuple | frozenset):
            inside += value
        elif type(value).__module__.partition(".")[0] in ("torch", "nin", "typing"):
            return ()
        elif not hasattr(value, "__dict__"):
            self.is_known = False  # written in another language, or with slots
            return ()
        if hasattr(value, "__dict__"):
            self.mappings.append(vars(value))
            inside += vars(value).values()
        self._add_classes(type(value))
        return inside

    def _add_classes(self, kind: type) -> None:
        for cls in kind.__mro__:
            if is_foreign(cls.__module__) and cls not in self._classes:
                self._classes[cls] = contents = dict(vars(cls))
                # the dict itself, which vars(class) only shows
                self.mappings += [d for d in gc.get_referents(cls) if isinstance(d, dict) and "__module__" in d]
                for name, value in contents.items():
                    if isinstance(value, (dict, tuple, *_SEQUENCES)) and not name.startswith("__"):
                        self._visit(value)


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is of one of PyTorch's classes that read nothing but what they were made with."""
    return type(module).__module__ in _LAYERS


def is_foreign(name: str | None) -> bool:
    """Return whether code is neither PyTorch's nor nin's nor of Python's own library, by its module's name."""
    root = (name or "builtins").partition(".")[0]
    return root == "__main__" or (root not in ("torch", "nin") and root not in sys.stdlib_module_names)


def contents_of(cell: types.CellType) -> Any:
    """Return what a variable of an enclosing function holds; the cell itself where it holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _read_globals(
    classes: list[dict[str, Any]], visit: Callable[[Any], None]
) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield the globals that forwards, and what they call, may read: namespace, name and value.

    Args:
        classes: the contents of the classes of modules, and of what they hold.
        visit: called with each value and each function.
    """
    waiting = [function for c in classes for function in _functions(c.get("forward"))]
    known: set[Any] = set()
    while waiting:
        function = waiting.pop()
        if function in known or not is_foreign(function.__module__):
            continue
        known.add(function)
        visit(function)
        names = set(_names_in(function.__code__))
        waiting += [f for name in names for c in classes if name in c for f in _functions(c[name])]
        spaces = [function.__globals__]
        spaces += [
            vars(v) for v in map(spaces[0].get, names) if isinstance(v, types.ModuleType) and is_foreign(v.__name__)
        ]
        for space in spaces:
            for name in names & space.keys():
                value = space[name]
                waiting += _functions(value)
                if not isinstance(value, types.ModuleType):
                    visit(value)
                    yield space, name, value


def _functions(value: Any) -> list[types.FunctionType]:
    """Return the Python functions of a class's attribute or a global: itself, and what it wraps."""
    found = []
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    while value is not None:
        if isinstance(value, types.FunctionType):
            found.append(value)
        value = getattr(value, "__wrapped__", None)
    return found


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
