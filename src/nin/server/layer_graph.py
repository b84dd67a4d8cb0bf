"""What a network is made of, in order, as people speak of it: every convolution, pooling and joining of branches."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias, cast

from torch import Tensor, nn

from nin import models
from nin.layers import Conv1x1, Inception, MLPConv

Filters: TypeAlias = Conv1x1 | nn.Conv2d | nn.Linear

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}
POOLINGS = {nn.MaxPool2d: "max", nn.AvgPool2d: "average"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One step of a network, the hidden layers of its mlpconv layers among them.

    Attributes:
        name: for people, such as "block 2, 1×1".
        kind: "image", "convolution", "pooling" or "joining" (of branches).
        block: which mlpconv layer or Inception module it belongs to, counted from 1; 0 is the image.
        place: the same for the layer of another network that stands for it: a narrowed network has it too.
        inputs: the places in the list of layers that it takes.
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
    place: str
    inputs: tuple[int, ...]
    channels: int
    in_channels: int
    kernel_size: int = 1
    stride: int = 1
    padding: int = 0
    activation: str = "none"


@dataclasses.dataclass(frozen=True)
class Step:
    """A layer with what computes it: weight and bias, or a module, or neither where branches are joined."""

    layer: Layer
    weight: Tensor | None = None
    bias: Tensor | None = None
    module: nn.Module | None = None


def walk(model: models.Network) -> list[Step]:
    """Return the steps of a network from the image to the class maps; a narrowed one may have more."""
    steps = _Steps(model.config.in_channels if isinstance(model, models.NiN) else model.in_channels)
    if isinstance(model, models.NiN):
        for number, block in enumerate(model.blocks, start=1):
            steps.block = number
            steps.sequence(cast(nn.Sequential, block), f"block {number}")
    else:
        steps.googlenet(model)
    return steps.steps


class _Steps:
    """The steps so far; each method adds some and returns the place of the last."""

    def __init__(self, channels: int) -> None:
        self.block = 0
        self.steps = [Step(Layer("image", "image", 0, "image", (), channels, channels))]

    @property
    def last(self) -> int:
        return len(self.steps) - 1

    def sequence(self, modules: nn.Sequential, name: str, source: int | None = None) -> int:
        """Add layers that follow one another."""
        source = self.last if source is None else source
        for module in modules:
            if type(module) in POOLINGS:
                pooling = f"{name}, {POOLINGS[type(module)]} pooling"
                again = any(step.layer.name == pooling for step in self.steps)
                source = self.pooling(module, pooling + (" (2)" if again else ""), source)
            elif not isinstance(module, nn.Dropout):
                source = self.mlpconv(module, name, source)
        return source

    def mlpconv(self, module: nn.Module, name: str, source: int) -> int:
        """Add convolutions, with an activation after each; what a narrowed layer is made of is numbered."""
        found = list(chains(module))
        sizes = [max(map(kernel_size, chain)) for chain, _ in found]
        counts, turns = Counter(sizes[1:]), Counter[int]()
        for place, (chain, activation) in enumerate(found):
            k = sizes[place]
            turns[k] += place > 0
            own = f"{name}, {k}×{k}" + (f" ({turns[k]})" if place and counts[k] > 1 else "")
            for turn, filters in enumerate(chain, start=1):
                whole = turn == len(chain)
                part = "" if len(chain) == 1 else f", part {turn} of {len(chain)}: {size_of(filters)}"
                at = own if whole else f"{own}, part {turn}"
                source = self.convolution(filters, own + part, at, activation if whole else "none", source)
        return source

    def convolution(self, filters: Filters, name: str, place: str, activation: str, source: int) -> int:
        """Add one convolution; a dense layer is a 1×1 convolution."""
        weight = filters.weight if filters.weight.dim() == 4 else filters.weight[:, :, None, None]
        stride, padding = _first(getattr(filters, "stride", 1)), _first(getattr(filters, "padding", 0))
        geometry = (weight.shape[2], stride, padding, activation)
        layer = Layer(name, "convolution", self.block, place, (source,), weight.shape[0], weight.shape[1], *geometry)
        self.steps.append(Step(layer, weight, filters.bias))
        return self.last

    def pooling(self, module: nn.Module, name: str, source: int) -> int:
        """Add a pooling."""
        channels = self.steps[source].layer.channels
        k, stride, padding = (_first(getattr(module, option)) for option in ("kernel_size", "stride", "padding"))
        layer = Layer(name, "pooling", self.block, name, (source,), channels, channels, k, stride, padding)
        self.steps.append(Step(layer, module=module))
        return self.last

    def googlenet(self, model: models.GoogLeNet) -> None:
        """Add a GoogLeNet; its dense layer, moved from pixel to pixel, gives maps whose means are its scores."""
        self.block = 1
        self.sequence(model.stem, "stem")
        stage, turn = 3, 0
        for module in model.inceptions:
            self.block += 1
            if isinstance(module, Inception):
                self.inception(module, f"inception {stage}{'abcdefgh'[turn]}")
                turn += 1
            else:
                self.pooling(module, f"max pooling after {stage}", self.last)
                stage, turn = stage + 1, 0
        self.block += 1
        self.mlpconv(model.classifier, "classes", self.last)

    def inception(self, module: Inception, name: str) -> None:
        """Add the four branches, and where they are joined."""
        source = self.last
        ends = [self.mlpconv(module.ones, name, source)]
        for branch, size in ((module.threes, "3×3"), (module.fives, "5×5")):
            before, after = branch
            ends.append(self.mlpconv(after, name, self.mlpconv(before, f"{name}, before the {size}", source)))
        pooled = self.pooling(module.pools[0], f"{name}, max pooling", source)
        ends.append(self.mlpconv(module.pools[1], f"{name}, after the pooling", pooled))
        channels = sum(self.steps[end].layer.channels for end in ends)
        joined = f"{name}, joined"
        self.steps.append(Step(Layer(joined, "joining", self.block, joined, tuple(ends), channels, channels)))


def chains(module: nn.Module) -> Iterator[tuple[list[Filters], str]]:
    """Yield each convolution with the activation after it; a narrowed one is a chain of several."""
    if isinstance(module, Conv1x1):
        yield [module], module.activation or "none"
    elif isinstance(module, MLPConv):
        for conv, activation in zip(module.convs, module.activations, strict=True):
            yield [cast(nn.Conv2d, conv)], activation
    elif isinstance(module, nn.Conv2d | nn.Linear):
        yield [module], "none"
    elif all(isinstance(child, nn.Conv2d | nn.Linear) for child in module.children()):
        yield [cast(Filters, child) for child in module.children()], "none"
    else:
        held: list[Filters] = []
        for child in module.children():
            if type(child) in ACTIVATIONS:
                yield held, ACTIVATIONS[type(child)]
                held = []
            else:
                ((held, _),) = chains(child)
        if held:
            yield held, "none"


def kernel_size(filters: Filters) -> int:
    """Return k."""
    return filters.weight.shape[2] if filters.weight.dim() == 4 else 1


def size_of(filters: Filters) -> str:
    """Return such as "3×3"."""
    return f"{kernel_size(filters)}×{kernel_size(filters)}"


def _first(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]
