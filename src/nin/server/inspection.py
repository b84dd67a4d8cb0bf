"""Inside a network: its layers in order, what each makes of an image, and which channels never say anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from nin import models
from nin.layers import MLPConv
from nin.ops import mlpconv


@dataclasses.dataclass(frozen=True)
class Layer:
    """One step of a NiN, the hidden layers of its mlpconv layers among them.

    Attributes:
        name: for people, such as "block 2, 1×1".
        kind: "image", "convolution" or "pooling".
        block: which mlpconv layer it belongs to, counted from 1; 0 is the image.
        channels: that it gives.
        in_channels: that it takes.
        kernel_size: k.
        stride: in pixels.
        padding: in pixels.
        activation: after it.
    """

    name: str
    kind: str
    block: int
    channels: int
    in_channels: int
    kernel_size: int = 1
    stride: int = 1
    padding: int = 0
    activation: str = "none"


@dataclasses.dataclass(frozen=True)
class _Step:
    """A layer with what computes it."""

    layer: Layer
    module: nn.Module


def layers(model: models.NiN) -> list[Layer]:
    """Return the layers of a network from the image to the class maps."""
    channels = model.config.in_channels
    return [Layer("image", "image", 0, channels, channels), *(step.layer for step in _steps(model))]


def weights(model: models.NiN, index: int) -> tuple[Tensor, Tensor | None]:
    """Return weight (C_out, C_in, k, k) and bias (C_out,) of the layer at that place in `layers`.

    Raises:
        LookupError: there is no such layer, or it has no weights.
    """
    step = _step(model, index)
    if not isinstance(step.module, nn.Conv2d):
        raise LookupError(f"layer {index}, {step.layer.name}, has no weights")
    bias = step.module.bias
    return step.module.weight.detach().float().cpu(), None if bias is None else bias.detach().float().cpu()


@torch.inference_mode()
def activations(model: models.NiN, x: Tensor, index: int) -> Tensor:
    """Return what the layer at that place in `layers` makes of the network's input ``x``, (N, C, h, w).

    Raises:
        LookupError: there is no such layer.
    """
    if index:
        _step(model, index)
    for step in list(_steps(model))[:index]:
        x = _apply(step, x)
    return x.float().cpu()


@torch.inference_mode()
def dead_channels(model: models.NiN, x: Tensor) -> list[list[int]]:
    """Return for each of `layers` the channels that a ReLU leaves at zero at every pixel of every image.

    Args:
        model: the network.
        x: its input (N, C, H, W); a channel that is silent here may still speak on other images.
    """
    dead: list[list[int]] = [[]]
    for step in _steps(model):
        x = _apply(step, x)
        silent = (x == 0).all(dim=0).all(dim=-1).all(dim=-1) & torch.tensor(step.layer.activation == "relu")
        dead.append(silent.nonzero().flatten().tolist())
    return dead


def _step(model: models.NiN, index: int) -> _Step:
    steps = list(_steps(model))
    if not 1 <= index <= len(steps):
        raise LookupError(f"the layer must be from 0 (the image) to {len(steps)}, got {index}")
    return steps[index - 1]


def _apply(step: _Step, x: Tensor) -> Tensor:
    """Return the step's result by the same operator that the whole network uses."""
    if not isinstance(step.module, nn.Conv2d):
        return step.module(x)
    geometry = {"stride": step.layer.stride, "padding": step.layer.padding}
    return mlpconv(x, [step.module.weight], [step.module.bias], activation=step.layer.activation, **geometry)


def _steps(model: models.NiN) -> Iterator[_Step]:
    for number, (block, config) in enumerate(zip(model.blocks, model.config.blocks, strict=True), start=1):
        for part in cast(nn.Sequential, block):
            if isinstance(part, MLPConv):
                for place, conv in enumerate(cast(list[nn.Conv2d], part.convs)):
                    k = conv.kernel_size[0]
                    place_options = {} if place else {"stride": config.stride, "padding": config.padding}
                    name = f"block {number}, {k}×{k}{'' if len(part.convs) < 3 or place < 1 else f' ({place})'}"
                    activation = part.activations[place]
                    sizes = (conv.out_channels, conv.in_channels, k)
                    layer = Layer(name, "convolution", number, *sizes, activation=activation, **place_options)
                    yield _Step(layer, conv)
            elif not isinstance(part, nn.Dropout):
                width = config.channels[-1]
                yield _Step(
                    Layer(f"block {number}, {config.pool} pooling", "pooling", number, width, width, 3, 2), part
                )
