"""Fingerprints of networks, images and texts, and changed settings: whether saved work may be resumed."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(parts: Iterable[str | bytes | Tensor], digest: Any = None) -> str:
    """Return the hash of texts, bytes and tensors' values, one after the other, in hexadecimal digits.

    Args:
        parts: what is hashed. Of a tensor only the values are: put shape and dtype before it where they matter.
        digest: a new hash of `hashlib`, SHA-256 if not given.
    """
    digest = digest or hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return str(digest.hexdigest())


def changed_settings(now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value before, value now) of each setting that is not what it was when the work was begun.

    Example:
        >>> list(changed_settings({"seed": 1, "epochs": 5}, {"seed": 0, "epochs": 5}))
        [('seed', 0, 1)]
    """
    for name, value in now.items():
        if before.get(name) != value:
            yield name, before.get(name), value
