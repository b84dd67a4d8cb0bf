"""ExternalClassifier: a network of another package, with its head as a 1×1 convolution where that is exact."""

from collections.abc import Iterator
from typing import cast

import torch.fx
from torch import Tensor, nn

from nin.errors import UserError
from nin.layers import Conv1x1, GlobalAveragePooling
from nin.models.head_surgery import cut_head
from nin.models.input_config import InputConfig
from nin.models.memory_format import fastest_layout
from nin.models.surgery import replace_module

# tracing sees one call, see `nin.models.memory_format`
torch.fx.wrap("fastest_layout")
torch.fx.wrap("averaged_in_window")


class ExternalClassifier(nn.Module):
    """A network of timm, torchvision or somebody's own package, as nin trains, shows and narrows it.

    Global average pooling and the linear layer after it commute: ``mean(W f + b) = W mean(f) + b``. So the linear
    layer is a 1×1 convolution here. Before the pooling it gives class maps, whose means are the scores; the scores
    alone are computed after it, on one pixel. Where the network's head does not allow that, there are no exact maps.

    Args:
        name: by which `nin.models.create` makes it: "timm:NAME", "torchvision:NAME" or "package.module:factory".
        network: in evaluation mode; its layers are used, not copied. Its class layer is kept where it has as many
            classes, else it gets a new one.
        num_classes: number of classes.
        input_config: the images that it is made for.
        dropout: probability, before the class layer.

    Attributes:
        body: from images to feature maps (N, C, h, w); to (N, D) where the maps are not exact.
        head: the class layer.
        maps_are_exact: whether `maps` gives class maps.
        no_maps_reason: why not; empty where it does.

    Raises:
        UserError: the class layer cannot be found, and there are other classes than the network's.

    Source:
        Zhou et al.: Learning Deep Features for Discriminative Localization, 2015, arXiv 1512.04150, section 2.

    Example:
        >>> network = nin.models.create("torchvision:resnet18", 5)
        >>> network.maps(torch.randn(1, 3, 64, 64)).shape, network.maps_are_exact
        (torch.Size([1, 5, 2, 2]), True)
    """

    def __init__(
        self, name: str, network: nn.Module, num_classes: int, input_config: InputConfig, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.name, self.num_classes, self.input_config = name, num_classes, input_config
        self.in_channels = input_config.channels
        cut = cut_head(network.eval())
        layer = None if cut.class_layer is None else network.get_submodule(cut.class_layer)
        if cut.reason and cut.class_layer is not None:
            replace_module(network, cut.class_layer, nn.Identity())
        self.no_maps_reason = cut.reason
        self.pools_last, self.channels_last = cut.pools_last, cut.channels_last
        self.body = cut.body
        self.between = nn.Sequential(*cut.between)
        self.dropout = nn.Dropout(dropout)
        self.pool = GlobalAveragePooling() if cut.window is None else nn.Sequential(cut.window, nn.Flatten())
        self.window = None if cut.window is None else _pair(cut.window.kernel_size)
        self.head = self._make_head(layer, cut.activation)

    def _make_head(self, layer: nn.Module | None, activation: str) -> nn.Module:
        """Return the class layer for these classes, with the weights of the network's own where it has as many."""
        if layer is None or not isinstance(layer, nn.Linear | nn.Conv2d):
            return nn.Identity()
        linear = isinstance(layer, nn.Linear)
        outputs, inputs = layer.weight.shape[:2]
        bias = layer.bias is not None
        if not self.maps_are_exact and linear:
            return layer if outputs == self.num_classes else nn.Linear(inputs, self.num_classes, bias=bias)
        head = Conv1x1(inputs, self.num_classes, bias=bias, activation=activation)
        if outputs == self.num_classes:
            head.weight = nn.Parameter(layer.weight.detach().reshape(outputs, inputs, 1, 1))
            head.bias = layer.bias  # type: ignore[assignment]  # a parameter, which PyTorch types as a tensor
        return head

    @property
    def maps_are_exact(self) -> bool:
        """Whether `maps` gives class maps whose means are the scores."""
        return not self.no_maps_reason

    def features(self, x: Tensor) -> Tensor:
        """Return what the head takes for images ``x`` (N, in_channels, H, W): feature maps (N, C, h, w).

        Of a network without exact maps, (N, D).
        """
        features = self.body(fastest_layout(x))
        return features.permute(0, 3, 1, 2) if self.channels_last else features

    def embed(self, x: Tensor) -> Tensor:
        """Return what the body makes of images, (N, D): `classify` makes the scores of it.

        D is the number of feature maps, each averaged; of a network whose head is not linear, all their pixels.
        """
        features = self.features(x)
        if not self.maps_are_exact:
            return features
        return features.flatten(1) if self.pools_last else self.pool(features)

    def classify(self, embedding: Tensor) -> Tensor:
        """Return the scores (N, num_classes) for what `embed` gave."""
        if not self.maps_are_exact:
            return self.head(self.dropout(embedding))
        if self.pools_last:
            pixels = embedding.unflatten(1, (self.head.in_channels, -1)).unsqueeze(-1)
            return self.pool(self.head(self.dropout(pixels)))
        for norm in self.between:
            pixels = embedding if isinstance(norm, nn.BatchNorm1d) else embedding[:, :, None, None]
            embedding = norm(pixels).flatten(1)
        return self.head(self.dropout(embedding)[:, :, None, None]).flatten(1)

    def maps(self, x: Tensor) -> Tensor:
        """Return the class maps (N, num_classes, h, w), whose means are the scores, in evaluation.

        Raises:
            UserError: the network has no exact maps.
        """
        if not self.maps_are_exact:
            raise UserError(f"{self.name} has no exact class maps: {self.no_maps_reason}")
        features = self.features(x)
        for norm in self.between:
            features = _as_affine(cast(nn.BatchNorm2d, norm), features)
        maps = self.head(features)
        return maps if self.window is None else averaged_in_window(maps, self.window)

    def forward(self, x: Tensor) -> Tensor:
        """Return one score per class, (N, num_classes), for images ``x`` of shape (N, in_channels, H, W)."""
        return self.classify(self.embed(x))

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters after `embed`."""
        yield from self.between.parameters()
        yield from self.head.parameters()

    def body_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of `embed`."""
        yield from self.body.parameters()


def averaged_in_window(maps: Tensor, window: tuple[int, int]) -> Tensor:
    """Return maps whose mean is that of their first rows and columns: what the scores do not count is zero.

    Args:
        maps: (N, classes, h, w).
        window: rows and columns that count; where they are all, the maps stay as they are.
    """
    height, width = maps.shape[-2:]
    if window == (height, width):
        return maps
    counted = maps[..., : window[0], : window[1]] * (height * width / (window[0] * window[1]))
    return nn.functional.pad(counted, (0, width - window[1], 0, height - window[0]))


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def _as_affine(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return what a BatchNorm makes of (N, C, h, w) in evaluation, of one for vectors too."""
    return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
