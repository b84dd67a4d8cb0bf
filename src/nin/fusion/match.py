"""ChainMatch: a chain that was found in a traced graph."""

import dataclasses
from collections.abc import Callable

from torch import fx, nn

from nin.fusion.link import After


@dataclasses.dataclass
class ChainMatch:
    """A chain in a graph.

    Attributes:
        nodes: of the graph, from the first layer to the last activation.
        steps: what they do, see `Chain`.
        layer_names: names of the layers in the traced module.
        bottleneck: whether it is an inverted bottleneck.
        squeezes: whether there is squeeze-and-excitation in it, of two layers.
        after: in a block with a LayerNorm, how what follows each layer is made with the tensors of a network.
    """

    nodes: list[fx.Node]
    steps: list[str]
    layer_names: list[str]
    bottleneck: bool = False
    squeezes: bool = False
    after: list[list[Callable[[nn.Module], After]]] = dataclasses.field(default_factory=list)

    @property
    def places(self) -> int:
        """How many layers it has, but for those of squeeze-and-excitation."""
        return len(self.layer_names) - (2 if self.squeezes else 0)
