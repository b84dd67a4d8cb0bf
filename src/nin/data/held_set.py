"""HeldSet: images that are decoded when they are first needed, and kept as far as memory allows."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from nin.data.dataset import DecodedSet
from nin.data.value_range import Pixels


class ImageStore:
    """Decoded images by their key, up to a number of bytes; what does not fit is decoded each time.

    Nothing is dropped for something else: where an epoch is larger than memory, the least recently used image is the
    one that comes next.

    Args:
        limit: bytes of pixels.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._images: dict[Any, Pixels] = {}
        self._lock = threading.Lock()

    def get(self, key: Any, decode: Callable[[], Pixels]) -> Pixels:
        """Return an image, decoded now where it is not held; a held one may not be written to."""
        found = self._images.get(key)
        if found is not None:
            return found
        image = decode()
        with self._lock:
            if key not in self._images and self.used + image.nbytes <= self.limit:
                self._images[key] = image
                self.used += image.nbytes
        return image

    def __getstate__(self) -> dict[str, int]:
        """Leave the images out: another process decodes its own."""
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        """Begin empty."""
        self.__init__(state["limit"])  # type: ignore[misc]  # the state of a new one


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HeldSet(DecodedSet):
    """A set of which each image is decoded once, as far as memory allows; its parts share what is held.

    Attributes:
        source: the images.
        store: of decoded ones.
        rows: int64 (N,), the number of each image in the store.
    """

    source: DecodedSet
    store: ImageStore
    rows: Tensor

    @classmethod
    def of(cls, source: DecodedSet, store: ImageStore, *, first_row: int = 0) -> "HeldSet":
        """Return the set of a source's images.

        Args:
            source: the images.
            store: where decoded ones are held, which several sets may share.
            first_row: the number of the first image in it.
        """
        return cls(
            source=source,
            store=store,
            rows=torch.arange(first_row, first_row + len(source)),
            labels=source.labels,
            names=source.names,
            channels=source.channels,
            size=source.size,
            value_range=source.value_range,
            resize=source.resize,
        )

    def decode(self, index: int) -> Pixels:
        """Return one image: (channels, size, size)."""
        return self.store.get(int(self.rows[index]), lambda: self.source.decode(index))

    def photo(self, index: int) -> Pixels:
        """Return one whole image: (H, W, channels)."""
        return self.store.get(("photo", int(self.rows[index])), lambda: self.source.photo(index))

    def select(self, indices: Tensor) -> Self:
        """Return the images at the indices, int64 (K,), in their order."""
        return dataclasses.replace(super().select(indices), source=self.source.select(indices), rows=self.rows[indices])


def hold(*parts: DecodedSet, limit: int) -> tuple[DecodedSet, ...]:
    """Return sets whose images are decoded once, as far as so many bytes suffice for all of them together."""
    if limit <= 0:
        return parts
    store, held, first = ImageStore(limit), list[DecodedSet](), 0
    for part in parts:
        held.append(HeldSet.of(part, store, first_row=first))
        first += len(part)
    return tuple(held)
