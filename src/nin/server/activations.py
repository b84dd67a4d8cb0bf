"""Inside a network: its layers in order, what each makes of an image, and which channels never say anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nin.models import Network
from nin.ops import mlpconv
from nin.server.layer_graph import Layer, Step, walk

# Images that go through a network at once, where many are looked at.
AT_ONCE = 32


def layers(model: Network) -> list[Layer]:
    """Return the layers of a network from the image to the class maps."""
    return [step.layer for step in walk(model)]


def weights(model: Network, index: int) -> tuple[Tensor, Tensor | None]:
    """Return weight (C_out, C_in, k, k) and bias (C_out,) of the layer at that place in `layers`.

    Raises:
        LookupError: there is no such layer, or it has no weights.
    """
    step = find(model, index)
    if step.weight is None:
        raise LookupError(f"layer {index}, {step.layer.name}, has no weights")
    return step.weight.detach().float().cpu(), None if step.bias is None else step.bias.detach().float().cpu()


def find(model: Network, index: int) -> Step:
    """Return a layer with what computes it.

    Raises:
        LookupError: there is no such layer.
    """
    steps = walk(model)
    if not 0 <= index < len(steps):
        raise LookupError(f"the layer must be from 0 (the image) to {len(steps) - 1}, got {index}")
    return steps[index]


@torch.inference_mode()
def activations(model: Network, x: Tensor, index: int, *, sums: bool = False) -> Tensor:
    """Return what the layer at that place in `layers` makes of the network's input ``x``, (N, C, h, w).

    Args:
        model: the network.
        x: its input (N, C, H, W).
        index: of the layer.
        sums: what it gives before its activation.

    Raises:
        LookupError: there is no such layer.
    """
    find(model, index)
    steps = walk(model)[: index + 1]
    if sums:
        steps[-1] = without_activation(steps[-1])
    *_, (_, last) = outputs(steps, x)
    return last.float().cpu()


@torch.inference_mode()
def dead_channels(model: Network, x: Tensor) -> list[list[int]]:
    """Return for each of `layers` the channels that a ReLU leaves at zero at every pixel of every image.

    Args:
        model: the network.
        x: its input (N, C, H, W); a channel that is silent here may still speak on other images.
    """
    steps = walk(model)
    silent = [torch.full((step.layer.channels,), step.layer.activation == "relu", device=x.device) for step in steps]
    for part in x.split(AT_ONCE):
        for index, output in outputs(steps, part):
            silent[index] &= (output == 0).all(dim=0).all(dim=-1).all(dim=-1)
    return [found.nonzero().flatten().tolist() for found in silent]


def outputs(
    steps: list[Step], x: Tensor, change: Callable[[int, Tensor], Tensor] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield place and output of each layer in turn; an output is let go of once no later layer takes it.

    Args:
        steps: of the network.
        x: its input (N, C, H, W).
        change: given place and output of a layer, what later layers take in its stead.
    """
    needed = {source: index for index, step in enumerate(steps) for source in step.layer.inputs}
    kept: dict[int, Tensor] = {}
    for index, step in enumerate(steps):
        given = [kept[source] for source in step.layer.inputs]
        output = apply(step, given) if given else x
        kept[index] = output = output if change is None else change(index, output)
        yield index, output
        for source in (*step.layer.inputs, index):
            if needed.get(source, -1) <= index:
                del kept[source]


def without_activation(step: Step) -> Step:
    """Return the step that leaves its sums as they are."""
    return dataclasses.replace(step, layer=dataclasses.replace(step.layer, activation="none"))


def apply(step: Step, given: list[Tensor]) -> Tensor:
    """Return a layer's output by the same operator that the whole network uses."""
    layer = step.layer
    if step.weight is not None:
        geometry = {"stride": layer.stride, "padding": layer.padding}
        return mlpconv(given[0], [step.weight], [step.bias], activation=layer.activation, **geometry)
    return torch.cat(given, dim=1) if step.module is None else step.module(given[0])
