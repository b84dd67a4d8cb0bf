"""How a layer would look narrowed: its result in few directions, what that costs, and what the network says then."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from nin.models import Network
from nin.ops import mlpconv
from nin.server.activations import AT_ONCE, find, outputs, without_activation
from nin.server.layer_graph import walk

# Directions of a layer that are computed: more channels than this make the covariance dear.
MOST_CHANNELS = 1024


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The principal components of what a convolution gives before its activation.

    With r directions the layer is a k×k convolution to r channels and a 1×1 convolution back to all of them,
    ``ŷ = m + Vᵣ Vᵣᵀ (y - m)``: of all such pairs the one with the least squared error over the images and pixels.

    Attributes:
        mean: m (C,).
        directions: V (C, C), a direction in each row, the strongest first.
        variances: of y in each direction (C,); their sum is the variance of all channels together.
        pixels: height times width of what the layer gives.
        images: how many were looked at.

    Source:
        `nin.narrow` does the same, and weighs the directions by what later layers make of them.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    pixels: int
    images: int


@torch.inference_mode()
def spectrum(model: Network, x: Tensor, index: int) -> Spectrum:
    """Return the principal components of a layer's result.

    Args:
        model: the network.
        x: its input (N, C, H, W).
        index: the layer's place among `nin.server.activations.layers`.

    Raises:
        LookupError: there is no such layer, it is no convolution, or it has too many channels.
    """
    layer = find(model, index).layer
    if layer.kind != "convolution" or layer.channels > MOST_CHANNELS:
        raise LookupError(f"layer {index}, {layer.name}, is no convolution of at most {MOST_CHANNELS} channels")
    steps = walk(model)[: index + 1]
    steps[-1] = without_activation(steps[-1])
    total = torch.zeros(layer.channels, dtype=torch.float64)
    products = torch.zeros(layer.channels, layer.channels, dtype=torch.float64)
    count = pixels = 0
    for part in x.split(AT_ONCE):
        *_, (_, y) = outputs(steps, part)
        pixels = y.shape[2] * y.shape[3]
        rows = y.movedim(1, -1).reshape(-1, layer.channels).cpu().double()
        count += len(rows)
        total += rows.sum(0)
        products += rows.mT @ rows
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    return Spectrum(mean, vectors.flip(1).mT.contiguous(), variances.flip(0).clamp_min(0), pixels, len(x))


def rebuild(sums: Tensor, found: Spectrum, rank: int, activation: str) -> Tensor:
    """Return what a layer gives with ``rank`` directions, for what it gives before its activation, (N, C, h, w)."""
    kept = found.directions[:rank].to(sums)
    mean = found.mean.to(sums)
    inner = F.conv2d(sums, kept[:, :, None, None], -(kept @ mean))
    return mlpconv(inner, [kept.mT[:, :, None, None].contiguous()], [mean], activation=activation)


@torch.inference_mode()
def narrowed_scores(model: Network, x: Tensor, index: int, found: Spectrum, rank: int) -> Tensor:
    """Return the network's scores (N, classes) where that one layer has ``rank`` directions.

    Args:
        model: the network.
        x: its input (N, C, H, W).
        index: the layer's place among `nin.server.activations.layers`.
        found: the layer's spectrum.
        rank: from 1 to the layer's channels.
    """
    steps = walk(model)
    layer = steps[index].layer
    steps[index] = without_activation(steps[index])

    def change(place: int, output: Tensor) -> Tensor:
        return rebuild(output, found, rank, layer.activation) if place == index else output

    scores = []
    for part in x.split(AT_ONCE):
        *_, (_, maps) = outputs(steps, part, change)
        scores.append(maps.mean((2, 3)).float().cpu())
    return torch.cat(scores)
