"""Randomness without state: every draw is a hash of (seed, epoch, index).

What a sample gets depends neither on the batch it is in, nor on the number of workers, nor on what was
drawn before. That is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)

# So many samples are sorted for an epoch, in 40 bytes each; above, the order is computed part by part.
MOST_SORTED = 2**24
_ROUNDS = 6


def _signed(value: int) -> int:
    """The int64 that has the same 64 bits as `value`."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def stream_key(*parts: int | str) -> int:
    """Turns what names a stream, such as ("shift", seed, epoch), into 64 bits."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def hash_indices(indices: Tensor, key: int) -> Tensor:
    """Hashes each index with splitmix64, on the device where the indices are.

    Args:
        indices: int64, any shape.
        key: the stream, from `stream_key`.

    Returns:
        int64 of the same shape, not negative: the upper 63 bits of the hash.

    Source:
        Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014, figure 17.
    """
    state = indices * _signed(_GAMMA) + _signed(key)
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        # int64 has only the arithmetic shift: the mask makes it the logical one.
        state = (state ^ ((state >> shift) & (_MASK >> shift))) * _signed(multiplier)
    return (state >> 1) & (_MASK >> 1)


def epoch_order(count: int, *, seed: int, epoch: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Returns the order in which an epoch visits the samples, as a pure function of its arguments.

    Up to `MOST_SORTED` samples are sorted by their hashes. Of more, any part of the order is computed alone, so that
    the order of 10⁹ samples takes the memory of the part that is asked for.

    Args:
        count: number of samples.
        seed: the seed of the run.
        epoch: the number of the epoch, from 0.
        start: the first place of the order to return.
        stop: the place behind the last; all if not given.

    Returns:
        int64 (stop - start,): the whole is a permutation of 0 .. count - 1.

    Example:
        >>> epoch_order(5, seed=0, epoch=0).sort().values.tolist()
        [0, 1, 2, 3, 4]
    """
    stop = count if stop is None else min(stop, count)
    if count > MOST_SORTED:
        return _permute(torch.arange(start, stop), count, seed=seed, epoch=epoch)
    hashes = hash_indices(torch.arange(count), stream_key("order", seed, epoch))
    return torch.argsort(hashes, stable=True)[start:stop]


def _permute(places: Tensor, count: int, *, seed: int, epoch: int) -> Tensor:
    """Returns the samples at places of a permutation that is never held as a whole.

    A Feistel network permutes a rectangle of at least `count` cells. A place that lands outside walks on until it
    lands inside, which keeps it a permutation; the rectangle is so close that few do.

    Source:
        Black, Rogaway: Ciphers with arbitrary finite domains, CT-RSA 2002.
    """
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    keys = [stream_key("order", seed, epoch, number) for number in range(_ROUNDS)]
    samples, outside = places.clone(), torch.ones_like(places, dtype=torch.bool)
    while outside.any():
        left, right = samples[outside] // columns, samples[outside] % columns
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + hash_indices(right, even) % rows) % rows
            right = (right + hash_indices(left, odd) % columns) % columns
        samples[outside] = left * columns + right
        outside = samples >= count
    return samples


def stratified_holdout(names: Iterable[str], labels: Sequence[int], *, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Chooses the test samples of each class by the hash of their names.

    Names rather than positions: the split is the same whatever order the file system lists files in, and a
    file that comes or goes moves at most one other file of its class to the other side.

    Args:
        names: the name of each sample, unique.
        labels: the class of each sample, same length.
        fraction: of each class, between 0 and 1. A class of n samples gives at least 1 and at most n - 1.
        seed: another seed gives another split.

    Returns:
        bool (N,): True where the sample is held out for testing.
    """
    members: defaultdict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        digest = hashlib.sha256(f"{seed}\0".encode() + os.fsencode(name)).digest()
        members[label].append((digest, index))
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for ranked in members.values():
        ranked.sort()
        count = min(max(int(fraction * len(ranked) + 0.5), 1), len(ranked) - 1)
        chosen[[index for _, index in ranked[:count]]] = True
    return chosen
