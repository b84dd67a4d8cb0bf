"""The layers of a network, their weights, their activations on images, and their dead channels."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nin.models import Network
from nin.ops import ACTIVATIONS, mlpconv
from nin.server.layer_graph import layer_nodes
from nin.server.layers import Layer, LayerNode

# Images that go through a network at once: for 32 photos the first layer of a GoogLeNet gives 103 MB.
ACTIVATION_BATCH_SIZE = 32


def layers(model: Network) -> list[Layer]:
    """Return the layers of a network from the image to the class maps."""
    return [node.layer for node in layer_nodes(model)]


def layer_weights(model: Network, index: int) -> tuple[Tensor, Tensor | None]:
    """Return weight (C_out, C_in, k, k) and bias (C_out,) of one of `layers`.

    Raises:
        LookupError: there is no such layer, or it has no weights.
    """
    node = find_layer(model, index)
    if node.weight is None:
        raise LookupError(f"layer {index}, {node.layer.name}, has no weights")
    return node.weight.detach().float().cpu(), None if node.bias is None else node.bias.detach().float().cpu()


def find_layer(model: Network, index: int) -> LayerNode:
    """Return one of `layers` with what computes it.

    Raises:
        LookupError: there is no such layer.
    """
    nodes = layer_nodes(model)
    if not 0 <= index < len(nodes):
        raise LookupError(f"the layer must be from 0 (the image) to {len(nodes) - 1}, got {index}")
    return nodes[index]


@torch.inference_mode()
def layer_activations(model: Network, x: Tensor, index: int, *, sums: bool = False) -> Tensor:
    """Return the output of one of `layers` for the network's input, (N, C, h, w).

    Args:
        model: the network.
        x: its input (N, C, H, W).
        index: of the layer.
        sums: return the layer's pre-activations.

    Raises:
        LookupError: there is no such layer.
    """
    find_layer(model, index)
    nodes = layer_nodes(model)[: index + 1]
    if sums:
        nodes[-1] = without_activation(nodes[-1])
    *_, (_, last) = layer_outputs(nodes, x)
    return last.float().cpu()


@torch.inference_mode()
def all_layer_sums(model: Network, x: Tensor) -> list[Tensor]:
    """Return what each of `layers` gives before its activation, (N, C, h, w)."""
    nodes, kept = layer_nodes(model), []

    def keep(index: int, sums: Tensor) -> Tensor:
        kept.append(sums)
        return ACTIVATIONS[nodes[index].layer.activation](sums)

    for _ in layer_outputs([without_activation(node) for node in nodes], x, keep):
        pass
    return kept


@torch.inference_mode()
def dead_channels(model: Network, x: Tensor) -> list[list[int]]:
    """Return for each of `layers` the channels that a ReLU leaves at zero at every pixel of every image.

    Args:
        model: the network.
        x: its input (N, C, H, W); a channel that is dead here may be active on other images.
    """
    nodes = layer_nodes(model)
    dead = [torch.full((node.layer.channels,), node.layer.activation == "relu", device=x.device) for node in nodes]
    for part in x.split(ACTIVATION_BATCH_SIZE):
        for index, output in layer_outputs(nodes, part):
            dead[index] &= (output == 0).all(dim=0).all(dim=-1).all(dim=-1)
    return [is_dead.nonzero().flatten().tolist() for is_dead in dead]


def layer_outputs(
    nodes: list[LayerNode], x: Tensor, change: Callable[[int, Tensor], Tensor] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield index and output of each layer in order; an output is freed once no later layer takes it.

    Args:
        nodes: of the network.
        x: its input (N, C, H, W).
        change: given index and output of a layer, returns what takes the place of the output.
    """
    last_use = {source: index for index, node in enumerate(nodes) for source in node.layer.inputs}
    kept: dict[int, Tensor] = {}
    for index, node in enumerate(nodes):
        inputs = [kept[source] for source in node.layer.inputs]
        output = apply_layer(node, inputs) if inputs else x
        kept[index] = output = output if change is None else change(index, output)
        yield index, output
        for source in (*node.layer.inputs, index):
            if last_use.get(source, -1) <= index:
                del kept[source]


def without_activation(node: LayerNode) -> LayerNode:
    """Return the layer without its activation: its output are its sums."""
    return dataclasses.replace(node, layer=dataclasses.replace(node.layer, activation="none"))


def apply_layer(node: LayerNode, inputs: list[Tensor]) -> Tensor:
    """Return a layer's output, by the operator that the whole network uses."""
    layer = node.layer
    if node.weight is not None:
        geometry = {"stride": layer.stride, "padding": layer.padding}
        return mlpconv(inputs[0], [node.weight], [node.bias], activation=layer.activation, **geometry)
    if node.function is not None:
        return node.function(inputs)
    return torch.cat(inputs, dim=1) if node.module is None else node.module(inputs[0])
