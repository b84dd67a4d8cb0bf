"""Receptive field of a class map's cells: which pixels a cell is computed from, and what it can show."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nin import models
from nin.server.layer_graph import layer_nodes
from nin.server.layers import LayerNode


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """The pixels that the middle cell of a map is computed from.

    Attributes:
        cells: rows and columns of the map.
        pixels: height and width of the area that the middle cell sees, at most the image.
        image: height and width of the image.
    """

    cells: tuple[int, int]
    pixels: tuple[int, int]
    image: tuple[int, int]

    def __str__(self) -> str:
        """Return in sentences what a cell can show and what it cannot.

        Example:
            >>> str(ReceptiveField((24, 24), (27, 27), (96, 96))).partition(":")[0]
            'The map has 24×24 cells, and each is computed from 27×27 of the 96×96 pixels'
        """
        cells, seen, all_pixels = (f"{h}×{w}" for h, w in (self.cells, self.pixels, self.image))
        part = max(a / b for a, b in zip(self.pixels, self.image, strict=True))
        if self.cells == (1, 1):
            return f"The map has one cell, for all of the {all_pixels} pixels: it cannot show where the evidence lies."
        if part == 1:
            said = (
                f"The map has {cells} cells, and each can depend on the whole image, {all_pixels} pixels. Mostly those "
                "around it count, but something far away can colour a cell too: compare with a covered image before "
                "you trust a map"
            )
        elif part > 1 / 2:
            said = (
                f"The map has {cells} cells, and each is computed from {seen} of the {all_pixels} pixels. So the "
                "colour says in which part of the image the evidence lies, not where its outline is"
            )
        else:
            said = (
                f"The map has {cells} cells, and each is computed from {seen} of the {all_pixels} pixels: the evidence "
                "lies within half of that distance of the colour"
            )
        return f"{said}."


def receptive_field(model: models.Network, shape: Sequence[int]) -> ReceptiveField:
    """Return what the cells of a network's class maps are computed from.

    Args:
        model: whose maps are asked for, in evaluation mode.
        shape: (C, H, W) of an image.
    """
    device = next(model.parameters()).device
    with torch.inference_mode():
        rows, columns = model.maps(torch.zeros(1, *shape, device=device)).shape[-2:]
    if isinstance(model, models.NiN | models.GoogLeNet):
        seen = layer_field(layer_nodes(model))
        pixels = [min(seen, size) for size in shape[1:]]
    else:
        pixels = [probe(model.maps, shape, (rows, columns), axis, device) for axis in (0, 1)]
    return ReceptiveField((rows, columns), (pixels[0], pixels[1]), (shape[1], shape[2]))


def layer_field(nodes: Sequence[LayerNode]) -> int:
    """Return height and width of the area that a value of the last layer is computed from, in pixels.

    A layer with kernel size k sees (k - 1) steps more than its input, and a step of its output is as many pixels as a
    step of its input times its stride.

    Source:
        Araujo, Norris, Sim: Computing receptive fields of convolutional neural networks, Distill, 2019.
    """
    fields: list[tuple[int, int]] = []
    for layer in (node.layer for node in nodes):
        inputs = [fields[i] for i in layer.inputs] or [(1, 1)]
        seen, step = (max(values) for values in zip(*inputs, strict=True))
        fields.append((seen + (layer.kernel_size - 1) * step, step * layer.stride))
    return fields[-1][0]


@torch.inference_mode()
def probe(
    maps: Callable[[Tensor], Tensor], shape: Sequence[int], cells: tuple[int, int], axis: int, device: torch.device
) -> int:
    """Return how far the area that the middle cell is computed from reaches along an axis, in pixels.

    Pixels that are not a number make all that is computed from them not a number, whatever the weights are. So the
    edges of the area are found by halving, in any network, in about 2 · log2(size) evaluations.

    Args:
        maps: maps (N, classes, h, w) of images (N, C, H, W), in evaluation mode.
        shape: (C, H, W) of an image.
        cells: (h, w).
        axis: 0 for the height, 1 for the width.
        device: where to compute.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5, stride=2), torch.nn.Conv2d(4, 2, 3))
        >>> probe(network, (3, 33, 33), (13, 13), 0, torch.device("cpu"))
        9
    """
    size = shape[1 + axis]

    def is_seen(first: int, stop: int) -> bool:
        image = torch.zeros(1, *shape, device=device)
        image.narrow(2 + axis, first, stop - first).fill_(math.nan)
        return bool(maps(image)[0, :, cells[0] // 2, cells[1] // 2].isnan().any())

    if is_seen(0, 1) and is_seen(size - 1, size):  # most often: networks for photos see all of them
        return size
    before = largest(size, lambda n: not is_seen(0, n))  # pixels before the first that is seen
    behind = largest(size, lambda n: not is_seen(size - n, size))
    return max(0, size - before - behind)


def largest(size: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number up to size for which a condition holds, which holds for 0 and for all below it."""
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
