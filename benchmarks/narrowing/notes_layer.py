"""The notes' layer, 256 → 4×4 → 256, in a small CNN that was trained with it: time and accuracy, before and after.

    python benchmarks/narrowing/notes_layer.py CIFAR_FOLDER [--epochs 4] [--latency 0.4] [--finetune 1]

The network is 3×3 to 32 channels, pooling, 3×3 to 256, pooling, the notes' layer at 9×9 pixels, average, dense; with
BatchNorm and ReLU. The 4×4 layer makes four fifths of its multiplications. `nin.narrow` is told the time that is to be
left and sees 512 training images without labels: first it may change the notes' layer only, then all of them. Accuracy
on all test images, then after fine-tuning by the network before and the labels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import nin
from nin import data, narrowing, training
from nin.config import TrainConfig
from nin.runtime import device, timer

BATCH = 64
LAYER, OTHERS = "8", ("0", "4", "13")  # of the network below


def make_network() -> nn.Module:
    """Return a network with the notes' layer in it."""

    def layer(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *layer(3, 32, 3, 1),
        nn.MaxPool2d(2),
        *layer(32, 256, 3, 1),
        nn.MaxPool2d(2),
        *layer(256, 256, 4, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def inputs(images: data.Data, pixels: Tensor) -> Tensor:
    """Return pixels as the network takes them."""
    return data.to_float(pixels, images.mean, images.std, dtype=torch.float32)


@torch.no_grad()
def accuracy(model: nn.Module, images: data.Data) -> float:
    """Return the accuracy on the test images."""
    right = 0
    for pixels, labels, _ in data.batches(images.test, torch.arange(len(images.test)), 250):
        right += int((model(inputs(images, pixels)).argmax(1) == labels).sum())
    return right / len(images.test)


def augmented(images: data.Data, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's batches for fine-tuning."""
    order = data.epoch_order(len(images.train), seed=0, epoch=epoch)
    for pixels, labels, indices in data.batches(images.train, order, BATCH):
        moved = data.augment(pixels, indices, seed=0, epoch=epoch, flip=images.flip, shift=images.shift)
        yield inputs(images, moved), labels


def compare(models: dict[str, nn.Module], *shape: int) -> None:
    """Print the milliseconds of models side by side."""
    x = torch.randn(shape)
    with torch.inference_mode():
        times = timer.time_interleaved({name: partial(model, x) for name, model in models.items()}, runs=31)
    for name, t in times.items():
        print(f"{shape}  {name:9s} {t.median_ms:7.3f} ms ({t.low_ms:.3f} to {t.high_ms:.3f})")


def main() -> None:
    """Train, narrow, time, fine-tune, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--latency", type=float, default=0.4)
    parser.add_argument("--finetune", type=int, default=1)
    arguments = parser.parse_args()
    device.keep_freed_memory()
    images = data.load(arguments.folder)
    config = TrainConfig(epochs=arguments.epochs, batch_size=BATCH)
    wide = training.train(images, config, network=make_network).model.eval()
    wide = wide.to(memory_format=torch.contiguous_format)
    order = data.epoch_order(len(images.train), seed=0, epoch=0)[:512]
    seen = [inputs(images, pixels) for pixels, _, _ in data.batches(images.train, order, BATCH)]
    print(json.dumps({"before": accuracy(wide, images)}))
    shape = (3, images.size, images.size)
    steps = -(-len(images.train) // BATCH)
    tuning = narrowing.FinetuneConfig(epochs=arguments.finetune)
    for skip in (OTHERS, ()):
        result = nin.narrow(wide, seen, latency=arguments.latency, skip=skip, evaluate=lambda m: accuracy(m, images))
        narrowed = result.model.eval()
        print(f"\nleft as they are: {skip}", result.report, narrowed.get_submodule(LAYER), sep="\n")
        for count in (BATCH, 1):
            compare({"network": wide, "narrowed": narrowed}, count, *shape)
            if skip:
                layers = {"layer": wide.get_submodule(LAYER), "narrowed": narrowed.get_submodule(LAYER)}
                compare(layers, count, 256, images.size // 4, images.size // 4)
        tuned = narrowing.finetune(narrowed, wide, partial(augmented, images), tuning, steps_per_epoch=steps)
        print(json.dumps({"fine-tuned epochs": arguments.finetune, "accuracy": accuracy(tuned, images)}))


if __name__ == "__main__":
    main()
