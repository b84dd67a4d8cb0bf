"""The memory of Python's and PyTorch's objects: one native call tells whether they still hold what they held.

Asking for each attribute in Python takes 0.3 to 0.9 ms for a network of 290 modules whose objects are not in the cache:
it reads some thousand of them one after the other, and writes their counts of references. Here the few words that tell
a change are compared, and fetched ahead. Where they lie is found out by trying, once per process, and every kind of
change is tried before anything relies on it; where a try fails, as it does for dicts from Python 3.13 on, nothing is
watched and the callers ask in Python.
"""

import ctypes
import functools
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nin.ops.cpu import library

# An address, and how many words of eight bytes lie there.
Span = tuple[int, int]

# Read of PyTorch's objects, which are at least as large: TensorImpl, its storage, its counter, its gradient's metadata.
_TENSOR_WORDS, _STORAGE_WORDS, _COUNTER_WORDS, _GRADIENT_WORDS = 23, 6, 3, 20


class ObjectMemory:
    """Spans of memory with what they held.

    Args:
        spans: of objects that live; one that only lives while an object before it keeps it stands behind that object's.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        spans = list(spans)
        contents = [ctypes.string_at(address, 8 * count) for address, count in spans]
        self._expected = torch.frombuffer(bytearray(b"".join(contents) or b"\0"), dtype=torch.uint8)
        at, blocks = self._expected.data_ptr(), []
        for address, count in spans:
            blocks.append(struct.pack("3q", address, at, count))
            at += 8 * count
        self._blocks = torch.frombuffer(bytearray(b"".join(blocks) or b"\0"), dtype=torch.uint8)
        self._address, self._count = self._blocks.data_ptr(), len(blocks)

    def is_unchanged(self) -> bool:
        """Return whether every span holds what it held."""
        assert library.FIND_CHANGE is not None
        return library.FIND_CHANGE(self._address, self._count) == self._count


def watch_modules(modules: Iterable[object], dicts: Iterable[dict[Any, Any]]) -> ObjectMemory | None:
    """Return what tells that objects have the classes, and dicts the contents, that they have now; None if nothing can.

    Args:
        modules: whose class is watched; both must live as long as the result is asked.
        dicts: whose keys and values are, as objects: not what the values hold themselves.
    """
    layout = _layout()
    if layout is None or layout.tag is None:
        return None
    return ObjectMemory(_module_spans(layout, modules, dicts))


def watch_tensors(tensors: Iterable[Tensor], versioned: Iterable[Tensor] = ()) -> ObjectMemory | None:
    """Return what tells that tensors have the memory, shapes and dtypes that they have now; None if nothing can.

    Args:
        tensors: of at most five dimensions, which must live as long as the result is asked.
        versioned: those of them whose version counter and ``requires_grad`` are watched too.
    """
    layout = _layout()
    return None if layout is None else ObjectMemory(_tensor_spans(layout, tensors, versioned))


class _Layout(NamedTuple):
    """Where in an object a word lies: its number.

    Attributes:
        type: of a Python object: its class.
        handle: of a tensor's Python object: the address of PyTorch's.
        storage: of PyTorch's: the address of the storage.
        counter: that of the version counter.
        gradient: that of what belongs to gradients, or 0.
        data: of a storage: the address of the values.
        version: of a version counter: the version.
        flag: of what belongs to gradients: the word with ``requires_grad`` in it.
        tag: of a dict: what is another after each change; None if there is no such word.
    """

    type: int
    handle: int
    storage: int
    counter: int
    gradient: int
    data: int
    version: int
    flag: int
    tag: int | None


def _module_spans(layout: _Layout, modules: Iterable[object], dicts: Iterable[dict[Any, Any]]) -> list[Span]:
    assert layout.tag is not None
    spans = [(id(module) + 8 * layout.type, 1) for module in modules]
    return spans + [(id(d) + 8 * layout.tag, 1) for d in dicts]


def _tensor_spans(layout: _Layout, tensors: Iterable[Tensor], versioned: Iterable[Tensor]) -> list[Span]:
    counted = {id(t) for t in versioned}
    objects, contents, behind = [], [], []
    for t in tensors:
        address = t._cdata
        words = _words(address, _TENSOR_WORDS)
        objects.append((id(t) + 8 * layout.type, layout.handle - layout.type + 1))
        contents.append((address + 8 * layout.storage, _TENSOR_WORDS - layout.storage))
        behind.append((words[layout.storage] + 8 * layout.data, 1))
        if id(t) in counted:
            behind.append((words[layout.counter] + 8 * layout.version, 1))
            if words[layout.gradient]:
                behind.append((words[layout.gradient] + 8 * layout.flag, 1))
    return objects + contents + behind


@functools.cache
def _layout() -> _Layout | None:
    """Return where the words lie, if every change of a tensor and a module that is tried is seen; None if not."""
    if library.FIND_CHANGE is None:
        return None
    with torch.inference_mode(False):
        try:
            layout = _find_layout()
        except ValueError:  # a word is not there, or two could be it
            return None
        if not all(_sees(layout, change) for change in _TENSOR_CHANGES):
            return None
        sees_modules = layout.tag is not None and all(_sees(layout, change) for change in _MODULE_CHANGES)
        return layout if sees_modules else layout._replace(tag=None)


def _find_layout() -> _Layout:
    # of five dimensions, for which a tensor has room in itself: with fewer there are words that nobody has written
    first, *others = (torch.zeros(1, 2, 3, 2, 3, device="cpu") for _ in range(9))
    address = first.untyped_storage()._cdata
    words = _words(first._cdata, _TENSOR_WORDS)
    storage = words.index(address)
    aliases = [(_words(t._cdata, _TENSOR_WORDS), _words(t.detach()._cdata, _TENSOR_WORDS)) for t in others]
    shared = [i for i in range(_TENSOR_WORDS) if i != storage and all(t[i] == alias[i] for t, alias in aliases)]
    # an address, and another one in each tensor: a few words hold what lay there before
    (counter,) = (
        i for i in shared if len({t[i] for t, _ in aliases} - {0}) == 8 and not any(t[i] % 8 for t, _ in aliases)
    )
    version = _changed(words[counter], _COUNTER_WORDS, lambda: first.add_(1))
    first.requires_grad_()
    now = _words(first._cdata, _TENSOR_WORDS)
    (gradient,) = (i for i, w in enumerate(words) if w == 0 != now[i])
    flag = _changed(now[gradient], _GRADIENT_WORDS, lambda: first.requires_grad_(False))
    contents = {"a": 0}
    try:
        tag = _changed(id(contents), dict.__basicsize__ // 8, lambda: contents.update(a=1))
    except ValueError:
        tag = None
    words_of_object = _words(id(first), type(first).__basicsize__ // 8)
    data = _words(address, _STORAGE_WORDS).index(first.data_ptr())
    kind, handle = words_of_object.index(id(type(first))), words_of_object.index(first._cdata)
    return _Layout(kind, handle, storage, counter, gradient, data, version, flag, tag)


def _changed(address: int, count: int, change: Callable[[], object]) -> int:
    """Return the number of the one word among ``count`` that a call changes."""
    before = _words(address, count)
    change()
    (place,) = (i for i, (a, b) in enumerate(zip(before, _words(address, count), strict=True)) if a != b)
    return place


def _words(address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"{count}Q", ctypes.string_at(address, 8 * count))


def _weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, 3, 1, 1, device="cpu", dtype=torch.float32), requires_grad=False)


class _Tried(nn.Module):
    """What changes are tried on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = _weight()
        self.mode, self.inside = 1, nn.Identity()


# Every kind of change, each on a new module.
_TENSOR_CHANGES: tuple[Callable[[Any], object], ...] = (
    lambda m: setattr(m.weight, "data", m.weight.data.clone()),
    lambda m: setattr(m.weight, "data", m.weight.data.transpose(0, 1)),
    lambda m: setattr(m.weight, "data", m.weight.data.view(torch.int32)),
    lambda m: torch.utils.swap_tensors(m.weight, _weight()),
    lambda m: m.weight.untyped_storage().resize_(1 << 20),
    lambda m: m.weight.add_(1),
    lambda m: m.weight.requires_grad_(),
)
_MODULE_CHANGES: tuple[Callable[[Any], object], ...] = (
    lambda m: setattr(m, "mode", 2),
    lambda m: setattr(m, "other", 2),
    lambda m: delattr(m, "mode"),
    lambda m: vars(m).update(mode=2),
    lambda m: setattr(m, "inside", nn.Identity()),
    lambda m: m._parameters.update(weight=None),
    lambda m: setattr(m, "__class__", type("Other", (_Tried,), {})),
)


def _sees(layout: _Layout, change: Callable[[Any], object]) -> bool:
    """Return whether a change of a module or its weight is seen, and nothing before it."""
    module = _Tried()
    weight = module.weight
    if change in _TENSOR_CHANGES:
        memory = ObjectMemory(_tensor_spans(layout, (weight,), (weight,)))
    else:
        memory = ObjectMemory(_module_spans(layout, (module,), (vars(module), module._parameters, module._modules)))
    module.weight, module.mode, module.inside, weight.sum(), weight.detach()
    if not memory.is_unchanged():
        return False
    change(module)
    return not memory.is_unchanged()
