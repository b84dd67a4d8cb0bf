"""One layer of a network as the page shows it, and what computes it."""

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

POOLINGS = {nn.MaxPool2d: "max", nn.AvgPool2d: "average"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network; each convolution of an mlpconv layer is one.

    Attributes:
        name: for people, such as "block 2, 1×1".
        kind: "image", "convolution", "pooling", "joining" (concatenation of branches), or "computation" (whatever else
            networks of other packages compute: a normalisation, an activation, a sum).
        block: the mlpconv layer or Inception module that it belongs to, counted from 1; 0 is the image.
        place: a name that the layer keeps when the network is narrowed, by which both are put beside each other.
        inputs: indices of the layers whose outputs it takes.
        channels: of its output.
        in_channels: of its input.
        kernel_size: k.
        stride: in pixels.
        padding: in pixels.
        activation: after it, "none" where there is none.
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
class LayerNode:
    """A layer with what computes it: weight and bias, a module, a function, or none where branches are concatenated."""

    layer: Layer
    weight: Tensor | None = None
    bias: Tensor | None = None
    module: nn.Module | None = None
    function: Callable[[list[Tensor]], Tensor] | None = None
