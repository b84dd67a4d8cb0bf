"""The CIFAR ResNets of He et al. 2015, section 4.2, with shortcuts of type A, as akamaster/pytorch_resnet_cifar10 names
their layers; and the images that the benchmarks look at."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Shortcut(nn.Module):
    """Every second pixel, and zeros for the new channels."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = Shortcut(outputs - inputs) if stride != 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """``depth = 6 n + 2``: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.adaptive_avg_pool2d(y, 1).flatten(1))


def load(checkpoint: Path, depth: int) -> ResNet:
    """Return the network with the weights of a checkpoint."""
    model = ResNet(depth)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def images(folder: Path, count: int, *, batch: int = 100) -> tuple[list[Tensor], Tensor]:
    """Return ``count`` images of ``folder/<class>/*``, spread over the classes, in batches, and their labels."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        sys.exit(f"{folder} holds no class folders")
    each = count // len(classes)
    files = [sorted(path.iterdir())[:each] for path in classes]
    pixels, labels = [], []
    for number in range(each):
        for label, paths in enumerate(files):
            pixels.append(data.decode(paths[number], size=32, channels=3))
            labels.append(label)
    x = data.to_float(torch.stack(pixels), MEAN, STD, dtype=torch.float32)
    return list(x.split(batch)), torch.tensor(labels)


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Tensor], labels: Tensor) -> float:
    """Return the accuracy."""
    return (torch.cat([model(x).argmax(1) for x in batches]) == labels).float().mean().item()
