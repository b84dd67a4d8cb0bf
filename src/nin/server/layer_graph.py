"""The layers of a network as a graph: every convolution, pooling and concatenation, with names for people."""

from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias, cast

from torch import nn

from nin import models
from nin.layers import ACTIVATION_NAMES, Conv1x1, Inception, MLPConv
from nin.server.layers import POOLINGS, Layer, LayerNode
from nin.server.traced_graph import traced_nodes

Convolution: TypeAlias = Conv1x1 | nn.Conv2d | nn.Linear


def layer_nodes(model: models.Network) -> list[LayerNode]:
    """Return the layers of a network in order, from the image to the class maps, with what computes them."""
    if isinstance(model, models.ExternalClassifier):
        return traced_nodes(model)
    builder = _GraphBuilder(model.config.in_channels if isinstance(model, models.NiN) else model.in_channels)
    if isinstance(model, models.NiN):
        for number, block in enumerate(model.blocks, start=1):
            builder.block = number
            builder.sequence(cast(nn.Sequential, block), f"block {number}")
    else:
        builder.googlenet(model)
    return builder.nodes


class _GraphBuilder:
    """Collects nodes; each method adds some, after that of index ``source``, and returns the index of the last."""

    def __init__(self, channels: int) -> None:
        self.block = 0
        self.nodes = [LayerNode(Layer("image", "image", 0, "image", (), channels, channels))]

    @property
    def last(self) -> int:
        return len(self.nodes) - 1

    def sequence(self, modules: nn.Sequential, name: str, source: int | None = None) -> int:
        """Add the layers of a sequence, without dropout."""
        source = self.last if source is None else source
        for module in modules:
            if type(module) in POOLINGS:
                pooling = f"{name}, {POOLINGS[type(module)]} pooling"
                again = any(node.layer.name == pooling for node in self.nodes)
                source = self.pooling(module, pooling + (" (2)" if again else ""), source)
            elif not isinstance(module, nn.Dropout):
                source = self.mlpconv(module, name, source)
        return source

    def mlpconv(self, module: nn.Module, name: str, source: int) -> int:
        """Add convolutions, with an activation after each; the factors of a narrowed one are numbered."""
        factored = list(factored_convolutions(module))
        sizes = [max(map(kernel_size, factors)) for factors, _ in factored]
        counts, turns = Counter(sizes[1:]), Counter[int]()
        for place, (factors, activation) in enumerate(factored):
            k = sizes[place]
            turns[k] += place > 0
            own = f"{name}, {k}×{k}" + (f" ({turns[k]})" if place and counts[k] > 1 else "")
            for part, conv in enumerate(factors, start=1):
                is_last = part == len(factors)
                k = kernel_size(conv)
                label = own if len(factors) == 1 else f"{own}, part {part} of {len(factors)}: {k}×{k}"
                at = own if is_last else f"{own}, part {part}"
                source = self.convolution(conv, label, at, activation if is_last else "none", source)
        return source

    def convolution(self, conv: Convolution, name: str, place: str, activation: str, source: int) -> int:
        """Add one convolution; a dense layer is a 1×1 convolution."""
        weight = conv.weight if conv.weight.dim() == 4 else conv.weight[:, :, None, None]
        stride, padding = _first(getattr(conv, "stride", 1)), _first(getattr(conv, "padding", 0))
        geometry = (weight.shape[2], stride, padding, activation)
        layer = Layer(name, "convolution", self.block, place, (source,), weight.shape[0], weight.shape[1], *geometry)
        self.nodes.append(LayerNode(layer, weight, conv.bias))
        return self.last

    def pooling(self, module: nn.Module, name: str, source: int) -> int:
        """Add a pooling."""
        channels = self.nodes[source].layer.channels
        k, stride, padding = (_first(getattr(module, option)) for option in ("kernel_size", "stride", "padding"))
        layer = Layer(name, "pooling", self.block, name, (source,), channels, channels, k, stride, padding)
        self.nodes.append(LayerNode(layer, module=module))
        return self.last

    def googlenet(self, model: models.GoogLeNet) -> None:
        """Add a GoogLeNet; its dense layer as a 1×1 convolution gives maps whose means are its scores."""
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
        """Add the four branches and their concatenation."""
        source = self.last
        ends = [self.mlpconv(module.ones, name, source)]
        for branch, size in ((module.threes, "3×3"), (module.fives, "5×5")):
            before, after = branch
            ends.append(self.mlpconv(after, name, self.mlpconv(before, f"{name}, before the {size}", source)))
        pooled = self.pooling(module.pools[0], f"{name}, max pooling", source)
        ends.append(self.mlpconv(module.pools[1], f"{name}, after the pooling", pooled))
        channels = sum(self.nodes[end].layer.channels for end in ends)
        joined = f"{name}, joined"
        self.nodes.append(LayerNode(Layer(joined, "joining", self.block, joined, tuple(ends), channels, channels)))


def factored_convolutions(module: nn.Module) -> Iterator[tuple[list[Convolution], str]]:
    """Yield the factors of each convolution, a single one unless it is narrowed, with the activation after it."""
    if isinstance(module, Conv1x1):
        yield [module], module.activation or "none"
    elif isinstance(module, MLPConv):
        for conv, activation in zip(module.convs, module.activations, strict=True):
            yield [cast(nn.Conv2d, conv)], activation
    elif isinstance(module, nn.Conv2d | nn.Linear):
        yield [module], "none"
    else:
        factors: list[Convolution] = []
        for child in module.children():
            if type(child) in ACTIVATION_NAMES:
                yield factors, ACTIVATION_NAMES[type(child)]
                factors = []
            else:
                ((more, _),) = factored_convolutions(child)
                factors += more
        if factors:
            yield factors, "none"


def kernel_size(conv: Convolution) -> int:
    """Return k of a k×k convolution; 1 for a dense layer."""
    return conv.weight.shape[2] if conv.weight.dim() == 4 else 1


def _first(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]
