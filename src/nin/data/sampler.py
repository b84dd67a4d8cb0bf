"""Counter-based random numbers: sample order, augmentation draws and test split as hashes of (seed, epoch, index).

Not torch's Sampler and Generator, whose draws depend on what was drawn before: here what a sample gets depends neither
on its batch, nor on the number of workers or processes, nor on where a run was interrupted, so a resumed run equals an
uninterrupted one. The digests are SHA-256, and must stay it: they decide the order and the split of released versions.
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK64 = (1 << 64) - 1
_SPLITMIX_GAMMA = 0x9E3779B97F4A7C15
_SPLITMIX_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SPLITMIX_SHIFTS = (30, 27, 31)

# Up to so many samples are sorted for an epoch, in 40 bytes each (0.7 GB); above, the order is computed in parts.
MAX_SORTED = 2**24
_FEISTEL_ROUNDS = 6  # an even number: they alternate between rows and columns

_DEFAULT_TEST_FRACTION = 0.2


def _signed(value: int) -> int:
    """Return the int64 that has the same 64 bits as `value`."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def stream_key(*parts: int | str) -> int:
    """Return the 64-bit key of a random stream that parts such as ("shift", seed, epoch) name."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def hash_indices(indices: Tensor, key: int) -> Tensor:
    """Hash each index with splitmix64, on the device where the indices are.

    Args:
        indices: int64, any shape.
        key: the stream, from `stream_key`.

    Returns:
        int64 of the same shape, not negative: the upper 63 bits of the hash.

    Source:
        Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014, figure 17.
    """
    state = indices * _signed(_SPLITMIX_GAMMA) + _signed(key)
    for shift, multiplier in zip(_SPLITMIX_SHIFTS, (*_SPLITMIX_MULTIPLIERS, 1), strict=True):
        # int64 has only the arithmetic shift: the mask makes it the logical one.
        state = (state ^ ((state >> shift) & (_MASK64 >> shift))) * _signed(multiplier)
    return (state >> 1) & (_MASK64 >> 1)


def epoch_order(count: int, *, seed: int, epoch: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Return the order in which an epoch visits the samples, as a pure function of its arguments.

    Up to `MAX_SORTED` samples are sorted by their hashes. Of more, any part of the order is computed alone, so that
    the order of 10⁹ samples takes the memory of the part that is asked for.

    Args:
        count: number of samples.
        seed: the seed of the run.
        epoch: the number of the epoch, from 0.
        start: the first position of the order to return.
        stop: the position behind the last; all if not given.

    Returns:
        int64 (stop - start,): the whole is a permutation of 0 .. count - 1.

    Example:
        >>> epoch_order(5, seed=0, epoch=0).sort().values.tolist()
        [0, 1, 2, 3, 4]
    """
    stop = count if stop is None else min(stop, count)
    if count > MAX_SORTED:
        return _feistel_permutation(torch.arange(start, stop), count, seed=seed, epoch=epoch)
    hashes = hash_indices(torch.arange(count), stream_key("order", seed, epoch))
    return torch.argsort(hashes, stable=True)[start:stop]  # stable: equal hashes have one order everywhere


def balanced_order(labels: Tensor, *, seed: int, epoch: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Return samples of an epoch in which each class comes up equally often.

    The epoch is as long as one without balance. Of a class with fewer images than its part of the epoch all come up,
    equally often but for one time; of one with more, a part, another in every epoch.

    Args:
        labels: the class of each sample, int64 (N,). Classes without samples do not matter.
        seed: another seed gives another order.
        epoch: another epoch gives another order.
        start: the first position of the order to return.
        stop: the position behind the last; all if not given.

    Returns:
        int64 (stop - start,): a sample's index, plus N for each time that it has come up before in the epoch, so that
        each time it can be augmented in another way. The remainder of the division by N is the index.

    Example:
        >>> (balanced_order(torch.tensor([0, 0, 0, 0, 0, 1]), seed=0, epoch=0) % 6 == 5).sum().item()
        3
    """
    count = len(labels)
    turns = epoch_order(count, seed=seed, epoch=epoch, start=start, stop=stop)
    classes = labels.unique().tolist()
    kinds, ranks = turns % len(classes), turns // len(classes)
    order = torch.empty_like(turns)
    for kind, label in enumerate(classes):
        members = (labels == label).nonzero().flatten().cpu()
        hashes = hash_indices(members, stream_key("balance", seed, epoch))
        members = members[hashes.argsort(stable=True)]
        rank = ranks[kinds == kind]
        order[kinds == kind] = members[rank % len(members)] + rank // len(members) * count
    return order


def _feistel_permutation(positions: Tensor, count: int, *, seed: int, epoch: int) -> Tensor:
    """Return the samples at positions of a permutation that is never held as a whole.

    A Feistel network permutes a rectangle of at least `count` cells. A position that lands outside is permuted again
    until it lands inside, which keeps it a permutation; the rectangle is so close that few do.

    Source:
        Black, Rogaway: Ciphers with arbitrary finite domains, CT-RSA 2002.
    """
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    keys = [stream_key("order", seed, epoch, number) for number in range(_FEISTEL_ROUNDS)]
    samples, outside = positions.clone(), torch.ones_like(positions, dtype=torch.bool)
    while outside.any():
        left, right = samples[outside] // columns, samples[outside] % columns
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + hash_indices(right, even) % rows) % rows
            right = (right + hash_indices(left, odd) % columns) % columns
        samples[outside] = left * columns + right
        outside = samples >= count
    return samples


def stratified_holdout(
    names: Iterable[str], labels: Sequence[int], *, fraction: float | None, seed: int
) -> NDArray[np.bool_]:
    """Choose the test samples of each class by the hash of their names.

    Names rather than positions: the split is the same whatever order the file system lists files in, and a
    file that comes or goes moves at most one other file of its class to the other side.

    Args:
        names: the name of each sample, unique.
        labels: the class of each sample, same length.
        fraction: of each class, between 0 and 1; 0.2 if None. A class of n samples gives at least 1 and at most n - 1.
        seed: another seed gives another split.

    Returns:
        bool (N,): True where the sample is held out for testing.
    """
    fraction = _DEFAULT_TEST_FRACTION if fraction is None else fraction
    members: defaultdict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        digest = hashlib.sha256(f"{seed}\0".encode() + os.fsencode(name)).digest()
        members[label].append((digest, index))
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for ranked in members.values():
        ranked.sort()
        # rounded half up: round() would take the even neighbour
        count = min(max(int(fraction * len(ranked) + 0.5), 1), len(ranked) - 1)
        chosen[[index for _, index in ranked[:count]]] = True
    return chosen
