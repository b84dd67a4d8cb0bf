"""Principal components of a layer's outputs, and the network with the layer narrowed to some of them."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from nin.models import Network
from nin.ops import mlpconv
from nin.server import activations
from nin.server.layer_graph import layer_nodes

# The eigendecomposition takes time with the cube of the channels, and at 1,024 the browser gets 5.6 MB of directions.
MAX_CHANNELS = 1024


@dataclasses.dataclass(frozen=True)
class PrincipalComponents:
    """The principal components of a convolution's pre-activations.

    With r directions the layer is a k×k convolution to r channels and a 1×1 convolution back to all of them,
    ``ŷ = m + Vᵣ Vᵣᵀ (y - m)``: of all such pairs the one of least squared error over the images and pixels.

    Attributes:
        mean: m (C,).
        directions: V (C, C), a direction in each row, the largest variance first.
        variances: of y in each direction (C,); their sum is the variance of all channels together.
        pixels: height times width of the layer's output.
        images: number of images that they were computed on.

    Source:
        `nin.narrow` does the same, with the error weighted by the sensitivity of the network's output to it.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    pixels: int
    images: int


@torch.inference_mode()
def principal_components(model: Network, x: Tensor, index: int) -> PrincipalComponents:
    """Return the principal components of a convolution's pre-activations over images.

    Args:
        model: the network.
        x: its input (N, C, H, W).
        index: of the layer in `nin.server.activations.layers`.

    Raises:
        LookupError: there is no such layer, it is no convolution, or it has too many channels.
    """
    layer = activations.find_layer(model, index).layer
    if layer.kind != "convolution" or layer.channels > MAX_CHANNELS:
        raise LookupError(f"layer {index}, {layer.name}, is no convolution of at most {MAX_CHANNELS} channels")
    total = torch.zeros(layer.channels, dtype=torch.float64)
    products = torch.zeros(layer.channels, layer.channels, dtype=torch.float64)
    count = pixels = 0
    for part in x.split(activations.ACTIVATION_BATCH_SIZE):
        y = activations.layer_activations(model, part, index, sums=True)
        pixels = y.shape[2] * y.shape[3]
        rows = y.movedim(1, -1).reshape(-1, layer.channels).double()
        count += len(rows)
        total += rows.sum(0)
        products += rows.mT @ rows
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    return PrincipalComponents(mean, vectors.flip(1).mT.contiguous(), variances.flip(0).clamp_min(0), pixels, len(x))


def low_rank_output(sums: Tensor, components: PrincipalComponents, rank: int, activation: str) -> Tensor:
    """Return a layer's output of ``rank`` directions from its pre-activations (N, C, h, w)."""
    kept = components.directions[:rank].to(sums)
    mean = components.mean.to(sums)
    inner = F.conv2d(sums, kept[:, :, None, None], -(kept @ mean))
    return mlpconv(inner, [kept.mT[:, :, None, None].contiguous()], [mean], activation=activation)


@torch.inference_mode()
def narrowed_scores(model: Network, x: Tensor, index: int, components: PrincipalComponents, rank: int) -> Tensor:
    """Return the network's scores (N, classes) with one layer narrowed to ``rank`` directions.

    Args:
        model: the network.
        x: its input (N, C, H, W).
        index: of the layer in `nin.server.activations.layers`.
        components: of the layer.
        rank: from 1 to the layer's channels.
    """
    nodes = layer_nodes(model)
    layer = nodes[index].layer
    nodes[index] = activations.without_activation(nodes[index])

    def change(changed: int, output: Tensor) -> Tensor:
        return low_rank_output(output, components, rank, layer.activation) if changed == index else output

    scores = []
    for part in x.split(activations.ACTIVATION_BATCH_SIZE):
        *_, (_, maps) = activations.layer_outputs(nodes, part, change)
        scores.append(maps.mean((2, 3)).float().cpu())
    return torch.cat(scores)
