"""Network in Network: its configuration, which JSON can hold, the network, and the papers' sizes."""

import dataclasses
from typing import Any

import torch.fx
from torch import Tensor, nn

from nin.layers import GlobalAveragePooling, MLPConv
from nin.models.memory_format import fastest_layout


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One mlpconv layer of a NiN and the pooling after it.

    Attributes:
        channels: the width of each of its layers, the k×k convolution's first.
        kernel_size: k.
        stride: of the k×k convolution.
        padding: of the k×k convolution, in pixels.
        pool: "max", "average" or None: 3×3 windows at stride 2, the size rounded up.
        dropout: probability, after the pooling.
    """

    channels: tuple[int, ...]
    kernel_size: int
    stride: int = 1
    padding: int = 0
    pool: str | None = None
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class NiNConfig:
    """The architecture of a `NiN`.

    Attributes:
        name: for people.
        in_channels: of the images: 3 for colour, 1 for grey.
        num_classes: number of maps of the last layer.
        image_size: height and width that it is meant for, in pixels; others work too.
        blocks: the mlpconv layers; the last one has ``num_classes`` output channels.
        activation: after every layer but the last.
        last_activation: after the last layer. The paper has "relu" there; it stops many runs at a loss of
            ln(num_classes), so the default is "none".
        normalisation: None or "weight_standardisation" (every layer but the last).
    """

    name: str
    in_channels: int
    num_classes: int
    image_size: int
    blocks: tuple[BlockConfig, ...]
    activation: str = "relu"
    last_activation: str = "none"
    normalisation: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NiNConfig":
        """Return the configuration that `to_dict` wrote.

        Raises:
            KeyError, TypeError: a field is missing or unknown.
        """
        blocks = tuple(BlockConfig(**{**b, "channels": tuple(b["channels"])}) for b in values["blocks"])
        return cls(**{**values, "blocks": blocks})


torch.fx.wrap("fastest_layout")  # tracing sees one call, see `nin.models.memory_format`


class NiN(nn.Module):
    """A Network in Network: mlpconv layers, and global average pooling in place of dense layers.

    Args:
        config: the architecture.

    Source:
        Lin, Chen, Yan: Network in Network, 2013, arXiv 1312.4400, section 3.3.

    Example:
        >>> nin.models.nin_cifar()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: NiNConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList()
        channels = config.in_channels
        for i, block in enumerate(config.blocks):
            self.blocks.append(self._make_block(block, channels, last=i + 1 == len(config.blocks)))
            channels = block.channels[-1]
        if channels != config.num_classes:
            raise ValueError(f"the last block must give num_classes={config.num_classes} channels, got {channels}")
        self.head = GlobalAveragePooling()

    def _make_block(self, block: BlockConfig, in_channels: int, *, last: bool) -> nn.Sequential:
        config, count = self.config, len(block.channels)
        if not 0 <= block.padding < block.kernel_size:
            raise ValueError(f"padding must be below kernel_size={block.kernel_size}, got {block.padding}")
        layer = MLPConv(
            in_channels,
            block.channels,
            kernel_size=block.kernel_size,
            stride=block.stride,
            padding=block.padding,
            activation=[config.activation] * (count - 1) + [config.last_activation if last else config.activation],
            normalisation=[config.normalisation] * (count - 1) + [None if last else config.normalisation],
        )
        parts: list[nn.Module] = [layer]
        if block.pool == "max":
            parts.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        elif block.pool == "average":
            parts.append(nn.AvgPool2d(3, 2, ceil_mode=True))
        elif block.pool is not None:
            raise ValueError(f"pool must be 'max', 'average' or None, got {block.pool!r}")
        if block.dropout:
            parts.append(nn.Dropout(block.dropout))
        return nn.Sequential(*parts)

    def maps(self, x: Tensor) -> Tensor:
        """Return the class maps (N, num_classes, h, w): the evidence for each class at each pixel of the last layer."""
        x = fastest_layout(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return one score per class, (N, num_classes), for images ``x`` of shape (N, in_channels, H, W)."""
        return self.head(self.maps(x))

    def fold(self) -> "NiN":
        """Replace standardised convolutions in place by plain ones with the same result, and return the network."""
        for module in self.modules():
            if isinstance(module, MLPConv):
                module.fold()
        self.config = dataclasses.replace(self.config, normalisation=None)
        return self

    @property
    def smallest_input(self) -> int:
        """The smallest height and width that leave at least one pixel for the last layer."""
        size = 1
        for block in reversed(self.config.blocks):
            if block.pool:
                size = 2 * size  # the smallest n with ceil((n - 3) / 2) + 1 = size
            size = max(1, (size - 1) * block.stride + block.kernel_size - 2 * block.padding)
        return size


def nin_digits(num_classes: int = 10, *, in_channels: int = 1, dropout: float = 0.2, **options: Any) -> NiN:
    """Return a small NiN for 8×8 images (scikit-learn's digits): 8 → 4 pixels, two mlpconv layers."""
    blocks = (
        BlockConfig((64, 64, 64), kernel_size=3, padding=1, pool="max", dropout=dropout),
        BlockConfig((128, 128, num_classes), kernel_size=3, padding=1),
    )
    return NiN(NiNConfig("nin_digits", in_channels, num_classes, 8, blocks, **options))


def nin_cifar(num_classes: int = 10, *, in_channels: int = 3, dropout: float = 0.5, **options: Any) -> NiN:
    """Return the paper's network for 32×32 images: 966,986 parameters with 10 classes, 222.5 M MACs.

    Args:
        num_classes: of the last layer.
        in_channels: of the images.
        dropout: after each pooling; the paper has 0.5.
        options: the other fields of `NiNConfig`; ``last_activation="relu"`` gives the paper's last layer.

    Source:
        Lin, Chen, Yan: Network in Network, 2013, arXiv 1312.4400, section 4.2, as in the authors' file for CIFAR-10.

    Example:
        >>> sum(p.numel() for p in nin.models.nin_cifar().parameters())
        966986
    """
    blocks = (
        BlockConfig((192, 160, 96), kernel_size=5, padding=2, pool="max", dropout=dropout),
        BlockConfig((192, 192, 192), kernel_size=5, padding=2, pool="max", dropout=dropout),
        BlockConfig((192, 192, num_classes), kernel_size=3, padding=1),
    )
    return NiN(NiNConfig("nin_cifar", in_channels, num_classes, 32, blocks, **options))


def nin_imagenet(num_classes: int = 1000, *, in_channels: int = 3, dropout: float = 0.5, **options: Any) -> NiN:
    """Return the authors' network for 224×224 images: 7,595,176 parameters with 1,000 classes, 1.10 G MACs.

    Args:
        num_classes: of the last layer.
        in_channels: of the images.
        dropout: before the last mlpconv layer.
        options: the other fields of `NiNConfig`.

    Example:
        >>> sum(p.numel() for p in nin.models.nin_imagenet().parameters())
        7595176
    """
    blocks = (
        BlockConfig((96, 96, 96), kernel_size=11, stride=4, pool="max"),
        BlockConfig((256, 256, 256), kernel_size=5, padding=2, pool="max"),
        BlockConfig((384, 384, 384), kernel_size=3, padding=1, pool="max", dropout=dropout),
        BlockConfig((1024, 1024, num_classes), kernel_size=3, padding=1),
    )
    return NiN(NiNConfig("nin_imagenet", in_channels, num_classes, 224, blocks, **options))
