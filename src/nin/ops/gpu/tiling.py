"""How a launch is cut: pixels of a tile, chunks of each width, warps and stages, and what must fit on the chip."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import torch

# What a block may use of an SM's shared memory on Hopper, and SMs of an H200; taken where there is no device to ask.
SHARED_BYTES, PROCESSORS = 232_448, 132
# Of 255 registers a thread, what sums and held layers may take; addresses and loads in flight need the rest.
HELD_REGISTERS = 160
# Products that a kernel spells out; more make the compiler slow, and such widths are cuDNN's anyway.
MOST_PRODUCTS = 96
CHUNKS = (64, 32, 16)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the choice of tiles depends on: bytes of shared memory a block may use, and the number of SMs."""

    shared_bytes: int = SHARED_BYTES
    processors: int = PROCESSORS


@functools.cache
def describe_device(index: int | None) -> Device:
    """Return the GPU of that index; an H200 for None, and where there is no GPU (tracing, the interpreter)."""
    if index is None or not torch.cuda.is_available():
        return Device()
    properties = torch.cuda.get_device_properties(index)
    return Device(int(properties.shared_memory_per_block_optin), int(properties.multi_processor_count))


@dataclasses.dataclass(frozen=True)
class ChainTiles:
    """How a chain is cut.

    Attributes:
        pixels: of a tile.
        chunks: of the input's columns and of each layer's width, powers of two.
        warps: of a program.
        stages: tiles of the input that are on their way at once.
        resident: whether the weights stay in shared memory.
    """

    pixels: int
    chunks: tuple[int, ...]
    warps: int
    stages: int
    resident: bool


@dataclasses.dataclass(frozen=True)
class LayerTiles:
    """How one layer is cut: pixels, columns of the result and summands of a step, then as `ChainTiles`."""

    pixels: int
    columns: int
    summands: int
    warps: int
    stages: int


def chunk(width: int, largest: int = 64) -> int:
    """Return the chunk that a width is cut into: the largest that adds at most 30 %, else the one that adds least.

    Example:
        >>> from nin.ops.gpu.tiling import chunk
        >>> [chunk(width) for width in (192, 160, 96, 75, 33, 1)]
        [64, 64, 32, 32, 16, 16]
    """
    sizes = [size for size in CHUNKS if size <= largest]
    good = [size for size in sizes if padded(width, size) <= 1.3 * width]
    return good[0] if good else min(sizes, key=lambda size: (padded(width, size), -size))


def padded(width: int, size: int) -> int:
    """Return a width with its last chunk filled up."""
    return -(-width // size) * size


def chain_shared_bytes(widths: Sequence[int], tiles: ChainTiles, itemsize: int, extra_columns: int = 0) -> int:
    """Return the shared memory of a chain's program, an estimate from above.

    Args:
        widths: columns of the input's matrix, then each layer's width.
        tiles: how it is cut.
        itemsize: bytes of a value.
        extra_columns: further columns that are read for each pixel, as the gradient of the result.
    """
    full = [padded(width, size) for width, size in zip(widths, tiles.chunks, strict=True)]
    pairs = list(itertools.pairwise(full))
    steps = [size * after for size, after in itertools.pairwise(tiles.chunks)]
    weights = sum(a * b for a, b in pairs) if tiles.resident else 2 * max(steps)
    # a tile of the input for each stage, and one chunk that changes from sums to factors
    moving = tiles.pixels * (tiles.stages * (full[0] + extra_columns) + 64)
    return (weights + moving) * itemsize


def held_registers(widths: Sequence[int], tiles: ChainTiles, itemsize: int) -> float:
    """Return the 32-bit registers of a thread that hold the last layer's sums, a hidden chunk's and a middle layer."""
    full = [padded(width, size) for width, size in zip(widths, tiles.chunks, strict=True)]
    middle = full[1] * itemsize / 4 if len(widths) == 4 else 0
    return tiles.pixels * (full[-1] + max(tiles.chunks[1:-1], default=0) + middle) / (32 * tiles.warps)


def count_products(widths: Sequence[int], tiles: ChainTiles) -> int:
    """Return how many products of tiles a chain's kernel spells out."""
    counts = [padded(width, size) // size for width, size in zip(widths, tiles.chunks, strict=True)]
    return sum(a * b for a, b in itertools.pairwise(counts))


# (pixels, warps, stages), the default first. The order is a guess from the roofline, not measured.
CHAIN_SHAPES = ((128, 8, 2), (64, 4, 3), (64, 4, 2), (128, 8, 1), (64, 8, 2), (64, 4, 1), (32, 4, 2), (32, 4, 1))


def chain_tiles(widths: Sequence[int], itemsize: int, device: Device) -> list[ChainTiles]:
    """Return the ways to cut a forward chain that fit on the chip, the default first; none if there is none.

    Args:
        widths: columns of the input's matrix (channels times taps), then each layer's width.
        itemsize: bytes of a value.
        device: of which the shared memory counts.
    """
    found = []
    for resident in (True, False):
        for pixels, warps, stages in CHAIN_SHAPES:
            for largest in (64, 32):
                chunks = tuple(chunk(width, 64 if i == 0 else largest) for i, width in enumerate(widths))
                tiles = ChainTiles(pixels, chunks, warps, stages, resident)
                if _chain_fits(widths, tiles, itemsize, device) and tiles not in found:
                    found.append(tiles)
        if found:
            break
    return found[:6]


def _chain_fits(widths: Sequence[int], tiles: ChainTiles, itemsize: int, device: Device) -> bool:
    return (
        chain_shared_bytes(widths, tiles, itemsize) <= device.shared_bytes
        and held_registers(widths, tiles, itemsize) <= HELD_REGISTERS
        and count_products(widths, tiles) <= MOST_PRODUCTS
    )


# (pixels, warps, stages, largest hidden chunk), the default first: what the compiler spills least of, not measured.
PAIR_INPUT_SHAPES = ((128, 8, 1, 64), (64, 4, 1, 32), (128, 8, 1, 32), (64, 4, 2, 64), (32, 4, 2, 64), (32, 4, 1, 16))
PAIR_WEIGHT_SHAPES = ((64, 8, 2, 64), (64, 8, 2, 32), (64, 8, 1, 32), (64, 4, 2, 32), (32, 4, 1, 16))


def pair_input_tiles(widths: Sequence[int], itemsize: int, device: Device) -> list[ChainTiles]:
    """Return the ways to cut the kernel of a pair's input gradient; its sums are as wide as the input."""
    found = []
    for resident in (True, False):
        for pixels, warps, stages, largest in PAIR_INPUT_SHAPES:
            chunks = chunk(widths[0]), chunk(widths[1], largest), chunk(widths[2])
            tiles = ChainTiles(pixels, chunks, warps, stages, resident)
            across = (widths[1], widths[2], widths[0])  # the sums of the kernel: hidden chunks, then the input's width
            turned = dataclasses.replace(tiles, chunks=(tiles.chunks[1], tiles.chunks[2], tiles.chunks[0]))
            gradient = padded(widths[2], tiles.chunks[2])
            if (
                chain_shared_bytes(widths, tiles, itemsize, gradient) <= device.shared_bytes
                and held_registers(across, turned, itemsize) <= HELD_REGISTERS
                and 2 * count_products(widths, tiles) <= MOST_PRODUCTS
            ):
                found.append(tiles)
        if found:
            break
    return found


def pair_weight_tiles(widths: Sequence[int], itemsize: int, device: Device) -> list[ChainTiles]:
    """Return the ways to cut the kernel of a pair's weight gradients; its sums are those of one hidden chunk."""
    found = []
    for pixels, warps, stages, largest in PAIR_WEIGHT_SHAPES:
        chunks = chunk(widths[0]), chunk(widths[1], largest), chunk(widths[2])
        tiles = ChainTiles(pixels, chunks, warps, stages, True)
        rows = padded(widths[0], chunks[0]) + padded(widths[2], chunks[2])
        sums = (rows + 2 * pixels) * chunks[1] / (32 * warps)
        shared = itemsize * rows * (chunks[1] + (stages + 1) * pixels) + 2 * itemsize * pixels * chunks[1]
        products = 2 * (padded(widths[0], chunks[0]) // chunks[0] + padded(widths[2], chunks[2]) // chunks[2])
        if shared <= device.shared_bytes and sums <= HELD_REGISTERS and products <= MOST_PRODUCTS:
            found.append(tiles)
    return found


def layer_tiles(columns: int, channels: int, taps: int, itemsize: int) -> list[LayerTiles]:
    """Return the ways to cut one layer's product, the default first; every width has some.

    Args:
        columns: of the result.
        channels: that are summed over, for each tap.
        taps: of the kernel.
        itemsize: bytes of a value.
    """
    # where a step's summands lie in one tap, a row's place is found once for all of them
    sizes = [size for size in CHUNKS if size * itemsize <= 128]
    whole = [size for size in sizes if channels % size == 0]
    summands = whole[0] if whole else chunk(channels * taps if taps > 1 else channels, sizes[0])
    wide = max(16, min(128, _power_of_two(columns)))
    shapes: Iterable[tuple[int, int, int, int]] = ((128, wide, 8, 3), (64, min(wide, 64), 4, 3), (128, wide, 4, 2))
    return list(dict.fromkeys(LayerTiles(p, n, summands, w, s) for p, n, w, s in shapes))


def weight_gradient_tiles(columns: int, summands: int) -> LayerTiles:
    """Return how one layer's weight gradient is cut: filters, columns of the matrix, and pixels that are summed."""
    filters = max(16, min(64, _power_of_two(columns)))
    return LayerTiles(64, filters, max(16, min(64, _power_of_two(summands))), 4, 3)


def count_parts(pixels: int, tile: int, weights: int, blocks: int, device: Device, most_bytes: int = 1 << 26) -> int:
    """Return into how many parts the pixels of a weight gradient are cut.

    Two programs for each SM, each part at least four tiles long, and at most 64 MB of parts.
    """
    wanted = math.ceil(2 * device.processors / blocks)
    return max(1, min(wanted, -(-pixels // (4 * tile)), most_bytes // (4 * weights)))


def _power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()
