"""The cases of the benchmark: models of nin's layers, their input shape, inference or a training step."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from nin import layers, models


@dataclasses.dataclass(frozen=True)
class Case:
    """One model to time.

    Attributes:
        name: on the command line.
        model: makes it, of nin's layers.
        input_shape: (N, C, H, W).
        training: forward, backward and, for whole networks, the optimiser's step; else inference.
        network: a classifier, trained with a loss and an optimiser; else the gradient of the result is given.
    """

    name: str
    model: Callable[[], nn.Module]
    input_shape: tuple[int, int, int, int]
    training: bool = False
    network: bool = False


def _chain(channels: int, *widths: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: layers.MLPConv(channels, widths, **options)


def _bottleneck() -> nn.Module:
    return layers.Bottleneck(256, 64, 256, kernel_size=4)


def _nin_cifar() -> nn.Module:
    return models.nin_cifar().fold()


# (channels in, channels out, height and width) of the 1×1 convolutions of ResNet-50's four stages
RESNET_50 = ((64, 256, 56), (512, 128, 28), (1024, 256, 14), (512, 2048, 7))
# (channels, height and width) of ConvNeXt-T's stages: channels → 4 channels, GELU → channels
CONVNEXT_T = ((96, 56), (192, 28), (384, 14), (768, 7))

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("chain-192-160-96", _chain(192, 160, 96), (64, 192, 32, 32)),
        Case("1x1-192-32", _chain(192, 32), (64, 192, 28, 28)),
        Case("1x1-192-192", _chain(192, 192), (64, 192, 28, 28)),
        Case("bottleneck-256-64-4x4-256", _bottleneck, (16, 256, 28, 28)),
        Case("4x4-256-256", _chain(256, 256, kernel_size=4), (16, 256, 28, 28)),
        Case("nin-cifar-64", _nin_cifar, (64, 3, 32, 32), network=True),
        Case("nin-cifar-1", _nin_cifar, (1, 3, 32, 32), network=True),
        *(
            Case(f"resnet50-{i}-{o}-{size}px-{n}", _chain(i, o), (n, i, size, size))
            for n in (1, 16)
            for i, o, size in RESNET_50
        ),
        *(
            Case(f"convnext-{c}-{size}px-{n}", _chain(c, 4 * c, c, activation=("gelu", "none")), (n, c, size, size))
            for n in (1, 16)
            for c, size in CONVNEXT_T
        ),
        Case("train-chain-192-160-96", _chain(192, 160, 96), (64, 192, 32, 32), training=True),
        Case("train-nin-cifar-64", _nin_cifar, (64, 3, 32, 32), training=True, network=True),
    )
}
