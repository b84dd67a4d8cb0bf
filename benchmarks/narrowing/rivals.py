"""ResNet-56 beside other tools: at 2.1 times fewer multiply-accumulates, before and after the same fine-tuning.

    pip install torch-pruning tensorly
    python benchmarks/narrowing/rivals.py CHECKPOINT.th CIFAR_FOLDER [--tune 1] [--epochs 2] [--shares 0.8 0.6 0.476] \
        [--rates 0.0005 0.001]

The network is first tuned on CIFAR_FOLDER (train/<class>/*, test/<class>/*), so that it knows these images. Then, from
the same weights:

- `nin.narrow` with 512 training images, without labels;
- Torch-Pruning's `MagnitudePruner` (group L2 norms, global, five steps), the recipe of its README, on the
  channels inside the blocks: it stops with an error where it may touch the shortcuts, which pad with zeros;
- Tucker-2 of the weights alone (tensorly's HOSVD and alternating least squares), one share of the ranks for all layers.

At the last share nin's and Torch-Pruning's are trained alike: by the tuned network's answers and the labels, the same
batches, steps and learning rates. Accuracy on all test images. Prints one line of JSON for each figure.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

import tensorly
import torch
import torch_pruning
from cifar_resnet import MEAN, STD, load
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

import nin
from nin import data, narrowing

BATCH = 64
SHAPE = (1, 3, 32, 32)


def batches(images: data.Data, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's augmented batches."""
    order = data.epoch_order(len(images.train), seed=0, epoch=epoch)
    for pixels, labels, indices in data.batches(images.train, order, BATCH):
        moved = data.augment(pixels, indices, seed=0, epoch=epoch, flip=True, shift=2)
        yield data.to_float(moved, MEAN, STD, dtype=torch.float32), labels


@torch.no_grad()
def accuracy(model: nn.Module, images: data.Data) -> float:
    """Return the accuracy on the test images."""
    right = 0
    for pixels, labels, _ in data.batches(images.test, torch.arange(len(images.test)), 250):
        right += int((model(data.to_float(pixels, MEAN, STD, dtype=torch.float32)).argmax(1) == labels).sum())
    return right / len(images.test)


def train(model: nn.Module, teacher: nn.Module, images: data.Data, epochs: int, **settings: float) -> nn.Module:
    """Train a copy by distillation from the teacher and with the labels; settings are those of `FinetuneConfig`."""
    config = narrowing.FinetuneConfig(epochs=epochs, **settings)  # type: ignore[arg-type]
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    steps = -(-len(images.train) // BATCH)
    return narrowing.finetune(model, teacher, lambda epoch: batches(images, epoch), config, steps_per_epoch=steps)


def macs(model: nn.Module) -> int:
    """Return the multiply-accumulates of one image."""
    return nin.cost(model, SHAPE).macs


def prune(model: nn.Module, share: float) -> nn.Module:
    """Return what Torch-Pruning leaves at most ``share`` of the multiply-accumulates of."""
    wanted, x = share * macs(model), torch.randn(SHAPE)
    low, high, best = 0.0, 0.9, copy.deepcopy(model)
    for _ in range(8):  # the ratio of channels that gives the share
        ratio = (low + high) / 2
        pruned = copy.deepcopy(model)
        # it does not follow channels through the padding of these shortcuts, so their ends stay
        kept = [m for n, m in pruned.named_modules() if n in ("conv1", "linear") or n.endswith("conv2")]
        pruner = torch_pruning.pruner.MagnitudePruner(
            pruned,
            x,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            iterative_steps=5,
            pruning_ratio=ratio,
            ignored_layers=kept,
        )
        for _ in range(5):
            pruner.step()
        if macs(pruned) <= wanted:
            high, best = ratio, pruned
        else:
            low = ratio
    return best.eval()


def factorise(model: nn.Module, share: float) -> nn.Module:
    """Return the network with each 3×3 layer of more than three channels as its Tucker-2 factors."""
    low, high, best = 0.05, 1.0, model
    for _ in range(8):
        ratio = (low + high) / 2
        factorised = copy.deepcopy(model)
        for name, layer in list(factorised.named_modules()):
            if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
                parent, _, attribute = name.rpartition(".")
                setattr(factorised.get_submodule(parent), attribute, tucker(layer, ratio))
        if macs(factorised) <= share * macs(model):
            low, best = ratio, factorised
        else:
            high = ratio
    return best


def tucker(layer: nn.Conv2d, ratio: float) -> nn.Sequential:
    """Return 1×1 → k×k → 1×1 from the weights of one layer."""
    ranks = [max(1, round(ratio * n)) for n in layer.weight.shape[:2]]
    with torch.no_grad():
        (core, (outputs, inputs)), _ = partial_tucker(layer.weight.detach(), rank=ranks, modes=[0, 1])
    first = nn.Conv2d(layer.in_channels, ranks[1], 1, bias=False)
    middle = nn.Conv2d(ranks[1], ranks[0], 3, layer.stride, layer.padding, bias=False)
    last = nn.Conv2d(ranks[0], layer.out_channels, 1, bias=layer.bias is not None)
    first.weight.data, middle.weight.data, last.weight.data = (
        inputs.mT[:, :, None, None],
        core,
        outputs[:, :, None, None],
    )
    if layer.bias is not None:
        last.bias = layer.bias
    return nn.Sequential(first, middle, last)


def main() -> None:
    """Fine-tune, narrow, prune and factorise, fine-tune two of the results, and print accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--tune", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.001])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6, 1 / 2.1])
    arguments = parser.parse_args()
    tensorly.set_backend("pytorch")
    images = data.load(arguments.folder)
    started = time.perf_counter()

    def print_figures(what: str, model: nn.Module, share: float) -> None:
        figures = {"what": what, "share": round(share, 3), "macs": macs(model), "accuracy": accuracy(model, images)}
        print(json.dumps({**figures, "seconds": round(time.perf_counter() - started)}), flush=True)

    original = load(arguments.checkpoint, arguments.depth)
    print_figures("as it comes", original, 1)
    tuned = train(original, original, images, arguments.tune, label_weight=1.0)
    tuned = tuned.to(memory_format=torch.contiguous_format)
    print_figures("tuned", tuned, 1)
    order = data.epoch_order(len(images.train), seed=0, epoch=0)[:512]
    seen = [data.to_float(p, MEAN, STD, dtype=torch.float32) for p, _, _ in data.batches(images.train, order, BATCH)]
    options = narrowing.NarrowOptions(measure_latency=False, revert_slower=False)
    last = {}
    for share in arguments.shares:
        last = {
            "nin.narrow": nin.narrow(tuned, seen, macs=share, options=options).model.eval(),
            "Torch-Pruning": prune(tuned, share),
            "Tucker-2 of the weights": factorise(tuned, share),
        }
        for name, model in last.items():
            print_figures(name, model, share)
    del last["Tucker-2 of the weights"]
    for rate in arguments.rates:
        for name, model in last.items():
            trained = train(model, tuned, images, arguments.epochs, learning_rate=rate)
            print_figures(f"{name}, {arguments.epochs} epochs, {rate}", trained, arguments.shares[-1])


if __name__ == "__main__":
    main()
