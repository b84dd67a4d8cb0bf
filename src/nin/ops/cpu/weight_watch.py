"""Whether tensors still are what they were: by their version counters where `freeze` allows it, else by their bytes."""

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from nin.ops.cpu.library import Kernels
from nin.ops.cpu.object_memory import ObjectMemory, watch_tensors
from nin.ops.cpu.weight_cache import constant_of, count_given, count_taken_back, hash_blocks, is_hashable


class WatchedTensors:
    """Tensors of which something was made that holds as long as their values are the same.

    Constants (see `weight_cache.mark_constant`) are the same while their version counters are; of the others every byte
    is hashed, as in all of nin's calls. The memory of all is kept, so that no other can come to its address.

    Args:
        kernels: of the instruction set in use.
        tensors: on the CPU.
        read: those that are read anew each time: what matters is where they lie and in which shape.
    """

    def __init__(self, kernels: Kernels, tensors: Iterable[Tensor], read: Iterable[Tensor] = ()) -> None:
        self._kernels = kernels
        valued = list({id(t): t for t in tensors}.values())
        self._tensors = list({id(t): t for t in (*valued, *read)}.values())
        self._storages = [t.untyped_storage() for t in self._tensors]
        same: dict[Any, Any] = {}  # equal shapes are one object: what a check reads should be few lines of the cache
        self._places = _addresses(self._tensors)
        self._shapes = [same.setdefault(t.shape, t.shape) for t in self._tensors]
        self._strides = [same.setdefault(t.stride(), t.stride()) for t in self._tensors]
        self._valued = valued
        self.are_watchable = all(is_hashable(t) for t in self._tensors)
        self._memory: ObjectMemory | None = None  # which tells that nothing but bytes of those can have changed
        self._look_for_constants()
        self._hashes = self._hash() if self.are_watchable else b""

    def _look_for_constants(self) -> None:
        self._given, self._taken_back = count_given(), count_taken_back()
        found = [(t, constant_of(t)) for t in self._valued]
        self._constants = [t for t, constant in found if constant is not None]
        self._promises = [constant for _, constant in found if constant is not None]
        self._versions = [promise.version for promise in self._promises]
        spans = [struct.pack("2q", t.data_ptr(), t.nbytes) for t, constant in found if constant is None]
        self._spans, self._count = b"".join(spans), len(spans)

    def are_unchanged(self) -> bool:
        """Return whether nobody wrote to a tensor, or gave it other memory."""
        if self._taken_back != count_taken_back():
            if not all(promise.stands for promise in self._promises):
                return False
            self._taken_back = count_taken_back()
        if self._memory is None or not self._memory.is_unchanged():
            memory = watch_tensors(self._tensors, self._constants)  # before they are asked
            if not self._are_as_they_were():
                return False
            self._memory = memory
        if self._hash() != self._hashes:
            return False
        if self._given != count_given() and self._hashes:  # some that were hashed may be constants now
            again = WatchedTensors(self._kernels, self._valued, self._tensors)
            unchanged = self._hash() == self._hashes  # nor were they written to meanwhile
            vars(self).update(vars(again))
            return unchanged
        return True

    def _hash(self) -> bytes:
        return bytes(hash_blocks(self._kernels, self._spans, self._count)) if self._count else b""

    def _are_as_they_were(self) -> bool:
        """Ask each tensor for all but its bytes."""
        if [t._version for t in self._constants] != self._versions or any(t.requires_grad for t in self._constants):
            return False
        if _addresses(self._tensors) != self._places or [t.shape for t in self._tensors] != self._shapes:
            return False
        return list(map(Tensor.stride, self._tensors)) == self._strides


def _addresses(tensors: Sequence[Tensor]) -> bytes:
    return struct.pack(f"{len(tensors)}q", *map(Tensor.data_ptr, tensors))
