"""GoogLeNet: Inception modules, whose 1×1 convolutions reduce channels before the larger ones."""

import torch.fx
from torch import Tensor, nn

from nin.layers import GlobalAveragePooling, Inception, MLPConv
from nin.models.memory_format import fastest_layout

torch.fx.wrap("fastest_layout")  # tracing sees one call, see `nin.models.memory_format`


class GoogLeNet(nn.Module):
    """Nine Inception modules behind a convolutional stem, 1×1 convolutions in all of them.

    Source:
        Szegedy et al.: Going Deeper with Convolutions, 2014, arXiv 1409.4842, table 1 (without the auxiliary
        classifiers and the local response normalisation, which Inception's later versions left out too).
    """

    # in_channels, 1×1, reduce 3×3, 3×3, reduce 5×5, 5×5, pool; None is a 3×3 max pooling at stride 2
    INCEPTIONS = (
        (192, 64, 96, 128, 16, 32, 32),
        (256, 128, 128, 192, 32, 96, 64),
        None,
        (480, 192, 96, 208, 16, 48, 64),
        (512, 160, 112, 224, 24, 64, 64),
        (512, 128, 128, 256, 24, 64, 64),
        (512, 112, 144, 288, 32, 64, 64),
        (528, 256, 160, 320, 32, 128, 128),
        None,
        (832, 256, 160, 320, 32, 128, 128),
        (832, 384, 192, 384, 48, 128, 128),
    )

    def __init__(self, num_classes: int = 1000, *, in_channels: int = 3, dropout: float = 0.4) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.stem = nn.Sequential(
            MLPConv(in_channels, (64,), kernel_size=7, stride=2, padding=3),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            MLPConv(64, (64,)),
            MLPConv(64, (192,), kernel_size=3, padding=1),
            nn.MaxPool2d(3, 2, ceil_mode=True),
        )
        self.inceptions = nn.Sequential(
            *(
                nn.MaxPool2d(3, 2, ceil_mode=True) if widths is None else Inception(*widths)
                for widths in self.INCEPTIONS
            )
        )
        self.pool, self.dropout = GlobalAveragePooling(), nn.Dropout(dropout)
        self.classifier = nn.Linear(1024, num_classes)

    def maps(self, x: Tensor) -> Tensor:
        """Return the class maps (N, num_classes, h, w), whose means are the scores, without dropout.

        The fully connected layer is linear, so it commutes with the global average pooling: before it, it is a 1×1
        convolution that gives the contribution of each pixel to each class.

        Source:
            Zhou et al.: Learning Deep Features for Discriminative Localization, 2015, arXiv 1512.04150, section 2.
        """
        return self.classifier(self.inceptions(self.stem(x)).movedim(1, -1)).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one score per class, (N, num_classes), for images ``x`` of shape (N, in_channels, H, W)."""
        return self.classifier(self.dropout(self.pool(self.inceptions(self.stem(fastest_layout(x))))))


def googlenet(num_classes: int = 1000, *, in_channels: int = 3, dropout: float = 0.4) -> GoogLeNet:
    """Return GoogLeNet for 224×224 images: 6,998,552 parameters with 1,000 classes.

    Example:
        >>> sum(p.numel() for p in nin.models.googlenet().parameters())
        6998552
    """
    return GoogLeNet(num_classes, in_channels=in_channels, dropout=dropout)
