"""Is saved work still of the same thing? Hashes of networks, images and texts, and which settings were changed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(parts: Iterable[str | bytes | Tensor]) -> str:
    """Return the SHA-256 of texts, bytes and tensors' values, one after the other, in hexadecimal digits.

    A tensor's shape and dtype are not hashed: put them before it where they matter.
    """
    return _hexdigest(hashlib.sha256, parts)


def short_fingerprint(parts: Iterable[str | bytes | Tensor]) -> str:
    """Return a BLAKE2b of 128 bits of the same; files of version 0.1 hold both kinds."""
    return _hexdigest(functools.partial(hashlib.blake2b, digest_size=16), parts)


def _hexdigest(algorithm: Callable[[], Any], parts: Iterable[str | bytes | Tensor]) -> str:
    digest = algorithm()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return str(digest.hexdigest())


def changed_settings(now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value before, value now) of each setting that is not what it was when the work was begun."""
    for name, value in now.items():
        if before.get(name) != value:
            yield name, before.get(name), value
