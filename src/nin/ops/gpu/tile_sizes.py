"""Tile sizes of the kernels: pixels and channel chunks of a tile, warps and stages, and what fits on the chip."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Of 255 registers a thread, for sums and hidden layers; addresses and loads in flight need the rest.
MAX_TILE_REGISTERS = 160
# Products that a kernel unrolls. More make the compiler slow, and cuDNN is as good at layers that wide.
MAX_UNROLLED_DOTS = 96
CHUNK_SIZES = (64, 32, 16)


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """What the tiles depend on.

    Attributes:
        shared_bytes: of shared memory that a block may use.
        multiprocessors: SMs.
        cache_bytes: of the L2 cache.
    """

    shared_bytes: int
    multiprocessors: int
    cache_bytes: int = 50 << 20

    def scratch_bytes(self) -> int:
        """Return the size of what is written for a product to read from the L2 cache.

        A part of the cache, as input and output pass through it too; cards with a small one have too little for the
        kernels' launches to be worth it, and read from memory.
        """
        return max(self.cache_bytes * 3 // 4, 16 << 20)


H200 = DeviceLimits(shared_bytes=232_448, multiprocessors=132)


def device_limits(x: Tensor) -> DeviceLimits:
    """Return the limits of a tensor's GPU; an H200's where there is none (tracing, the interpreter)."""
    return _limits_of_gpu(x.device.index) if x.is_cuda and torch.cuda.is_available() else H200


@functools.cache
def _limits_of_gpu(index: int | None) -> DeviceLimits:
    properties = torch.cuda.get_device_properties(index)
    return DeviceLimits(
        int(properties.shared_memory_per_block_optin),
        int(properties.multi_processor_count),
        int(properties.L2_cache_size),
    )


# The names of these two classes and of their fields are part of the tuning cache: it holds their ``str()``.


@dataclasses.dataclass(frozen=True)
class ChainTiles:
    """Tiles of a kernel that runs several layers.

    Attributes:
        pixels: of a tile.
        chunks: columns of a chunk of the input and of each layer, powers of two.
        warps: of a program.
        stages: tiles of the input that are loaded ahead, for Triton's software pipeline.
        resident: whether the weights stay in shared memory.
    """

    pixels: int
    chunks: tuple[int, ...]
    warps: int
    stages: int
    resident: bool

    def constants(self) -> dict[str, int]:
        """Return the kernels' compile-time arguments."""
        blocks = dict(zip(("BK", "B1", "B2", "B3"), self.chunks, strict=False))
        return {"BM": self.pixels, **blocks, "num_warps": self.warps, "num_stages": self.stages}

    def padded(self, widths: Sequence[int]) -> list[int]:
        """Return the widths with their last chunks filled up."""
        return [round_up(width, size) for width, size in zip(widths, self.chunks, strict=True)]


@dataclasses.dataclass(frozen=True)
class PairTiles:
    """Tiles of the kernel that computes the gradients of two layers.

    Attributes:
        pixels: of a tile.
        chunks: columns of a chunk of the input and of each layer, powers of two.
        warps: of a program.
    """

    pixels: int
    chunks: tuple[int, int, int]
    warps: int

    def constants(self) -> dict[str, Any]:
        """Return the kernel's compile-time arguments."""
        blocks = dict(zip(("BK", "B1", "B2"), self.chunks, strict=True))
        return {"BM": self.pixels, **blocks, "num_warps": self.warps, "num_stages": 1}

    def grid(self, pixels: Any, widths: Sequence[int]) -> tuple[Any]:
        """Return a program for each tile of pixels."""
        return (-(-pixels // self.pixels),)


@dataclasses.dataclass(frozen=True)
class LayerGradientTiles:
    """Tiles of the kernel that computes one layer's gradients.

    Attributes:
        pixels: of a tile.
        chunk: input channels of a product's tile.
        chunks: of a program: it holds that many sums.
        filters: of an iteration.
        warps: of a program.
        stages: of Triton's software pipeline.
    """

    pixels: int
    chunk: int
    chunks: int
    filters: int
    warps: int
    stages: int

    def constants(self) -> dict[str, Any]:
        """Return the kernel's compile-time arguments."""
        blocks = {"BM": self.pixels, "BK": self.chunk, "BN": self.filters, "CHUNKS": self.chunks}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}

    def grid(self, pixels: Any, widths: Sequence[int]) -> tuple[Any]:
        """Return a program for each tile of pixels and block of input channels."""
        return (-(-pixels // self.pixels) * -(-widths[0] // (self.chunk * self.chunks)),)


@dataclasses.dataclass(frozen=True)
class LayerTiles:
    """Tiles of one layer's matrix product.

    Attributes:
        pixels: rows of a tile.
        columns: of a tile of the result.
        summands: of an iteration.
        warps: of a program.
        stages: iterations that are loaded ahead.
    """

    pixels: int
    columns: int
    summands: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """Return the kernels' compile-time arguments."""
        blocks = {"BM": self.pixels, "BK": self.summands, "BN": self.columns}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


def chunk_size(width: int, largest: int = 64) -> int:
    """Return the chunk for a width: the largest that pads it by at most 30 %, else the one that pads it least.

    Example:
        >>> from nin.ops.gpu.tile_sizes import chunk_size
        >>> [chunk_size(width) for width in (192, 160, 96, 75, 33, 1)]
        [64, 64, 32, 32, 16, 16]
    """
    sizes = [size for size in CHUNK_SIZES if size <= largest]
    good = [size for size in sizes if round_up(width, size) <= 1.3 * width]
    return good[0] if good else min(sizes, key=lambda size: (round_up(width, size), -size))


def round_up(width: int, size: int) -> int:
    """Return the next multiple of ``size``."""
    return -(-width // size) * size


def chain_shared_bytes(widths: Sequence[int], tiles: ChainTiles, itemsize: int, extra_columns: int = 0) -> int:
    """Return an upper estimate of the shared memory of a chain's program.

    Args:
        widths: columns of the input's im2col matrix, then each layer's width.
        tiles: of the kernel.
        itemsize: bytes of a value.
        extra_columns: further columns that are read for each pixel, as the output's gradient.
    """
    padded = tiles.padded(widths)
    if tiles.resident:
        weights = sum(a * b for a, b in itertools.pairwise(padded))
    else:  # two tiles of weights: one in use, one on its way
        weights = 2 * max(a * b for a, b in itertools.pairwise(tiles.chunks))
    # a tile of the input for each stage, and one chunk that changes from sums to factors
    inputs = tiles.pixels * (tiles.stages * (padded[0] + extra_columns) + 64)
    return (weights + inputs) * itemsize


def tile_registers(widths: Sequence[int], tiles: ChainTiles, itemsize: int) -> float:
    """Return the 32-bit registers a thread for the last layer's sums, a hidden chunk's, and a middle layer's values."""
    padded = tiles.padded(widths)
    middle = padded[1] * itemsize / 4 if len(widths) == 4 else 0
    return tiles.pixels * (padded[-1] + max(tiles.chunks[1:-1], default=0) + middle) / (32 * tiles.warps)


def count_unrolled_dots(widths: Sequence[int], tiles: ChainTiles) -> int:
    """Return how many products of tiles a chain's kernel unrolls."""
    counts = [padded // size for padded, size in zip(tiles.padded(widths), tiles.chunks, strict=True)]
    return sum(a * b for a, b in itertools.pairwise(counts))


# (pixels, warps, stages), the default first: eight warps before four, as 192→192→192 with four was at 27 % of an H100's
# bandwidth, and the compiler spilled. Not measured otherwise.
CHAIN_CONFIGS = ((128, 8, 2), (128, 8, 1), (64, 4, 3), (64, 4, 2), (64, 8, 2), (64, 4, 1), (32, 4, 2), (32, 4, 1))


def chain_tiles(widths: Sequence[int], itemsize: int, device: DeviceLimits) -> list[ChainTiles]:
    """Return the tiles of a forward chain that fit on the chip, the default first; none if there is none.

    Args:
        widths: columns of the input's im2col matrix (channels times taps), then each layer's width.
        itemsize: bytes of a value.
        device: whose shared memory is the limit.
    """
    # resident weights are read once by each program, others again for each tile of pixels
    found: dict[bool, list[ChainTiles]] = {True: [], False: []}
    for resident, (pixels, warps, stages), largest in itertools.product(found, CHAIN_CONFIGS, (64, 32)):
        if stages > 1 and not resident:
            # The pipeline holds what the loop over the pixels loads, which is then all weights, once a stage: 1 MB for
            # three layers of 192.
            continue
        chunks = (chunk_size(widths[0]), *(chunk_size(width, largest) for width in widths[1:]))
        tiles = ChainTiles(pixels, chunks, warps, stages, resident)
        if (
            chain_shared_bytes(widths, tiles, itemsize) <= device.shared_bytes
            and tile_registers(widths, tiles, itemsize) <= MAX_TILE_REGISTERS
            and count_unrolled_dots(widths, tiles) <= MAX_UNROLLED_DOTS
            and tiles not in found[resident]  # both limits give the same chunks where no width takes 64
        ):
            found[resident].append(tiles)
    # Six, as tuning compiles and times every one of them. One whose weights are not resident is among the first: it
    # takes so little of the chip that two or more programs share an SM.
    return [*found[True][:1], *found[False][:1], *found[True][1:], *found[False][1:]][:6]


# (pixels, warps, largest hidden chunk), the default first: two programs of four warps fit an SM, and so one loads while
# the other multiplies. Not measured.
PAIR_CONFIGS = ((64, 4, 64), (128, 8, 64), (128, 8, 32), (64, 4, 32), (32, 4, 16))
MAX_PAIR_REGISTERS = 180  # above, the compiler spills


def pair_tiles(widths: Sequence[int], itemsize: int, device: DeviceLimits) -> list[PairTiles]:
    """Return the tiles that fit for the gradients of a pair of layers, the default first; none if there is none."""
    columns, hidden, filters = widths
    found = []
    for pixels, warps, largest in PAIR_CONFIGS:
        chunks = chunk_size(columns), chunk_size(hidden, largest), chunk_size(filters)
        padded = [round_up(width, size) for width, size in zip(widths, chunks, strict=True)]
        counts = [width // size for width, size in zip(padded, chunks, strict=True)]
        # a chunk of the hidden layer and of its gradient; one of dx and dz as it is written, or all of dx
        held = min(chunks[0] + padded[1] * itemsize / 4, padded[0])
        registers = pixels * (2 * chunks[1] + held + padded[2] * itemsize / 4) / (32 * warps)
        weights = 2 * max(chunks[0] * chunks[1], chunks[1] * chunks[2])
        shared_bytes = itemsize * (pixels * (padded[0] + padded[2]) + weights)
        dots = counts[1] * (2 * counts[0] + counts[2])
        if registers <= MAX_PAIR_REGISTERS and shared_bytes <= device.shared_bytes and dots <= MAX_UNROLLED_DOTS:
            found.append(PairTiles(pixels, chunks, warps))
    return found


def layer_gradient_tiles(channels: int, filters: int) -> list[LayerGradientTiles]:
    """Return the tiles of one 1×1 layer's gradients, the default first; every width has some."""
    chunk = chunk_size(channels)
    configs = ((128, 8, 3), (64, 4, 3), (128, 8, 1))
    return [
        LayerGradientTiles(pixels, chunk, min(-(-channels // chunk), 192 // chunk), _tile_width(filters, 64), *rest)
        for pixels, *rest in configs
    ]


def layer_tiles(columns: int, channels: int, taps: int, itemsize: int) -> list[LayerTiles]:
    """Return the tiles of one layer's matrix product, the default first; every width has some.

    Args:
        columns: of the result.
        channels: that are summed over, for each tap.
        taps: of the kernel.
        itemsize: bytes of a value.
    """
    # where the summands of an iteration lie in one tap, a row's offset is computed once for all of them
    sizes = [size for size in CHUNK_SIZES if size * itemsize <= 128]
    whole = [size for size in sizes if channels % size == 0]
    summands = whole[0] if whole else chunk_size(channels * taps, sizes[0])
    wide = _tile_width(columns, 128)
    configs = ((128, wide, 8, 3), (64, min(wide, 64), 4, 3), (128, wide, 4, 2))
    return list(
        dict.fromkeys(LayerTiles(pixels, width, summands, warps, stages) for pixels, width, warps, stages in configs)
    )


def _tile_width(width: int, largest: int) -> int:
    """Return the power of two that holds a width, at least 16, which matrix units multiply, and at most ``largest``."""
    return max(16, min(largest, 1 << (width - 1).bit_length()))
