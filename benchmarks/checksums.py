"""Checksums of what small trainings, predictions, a narrowing and the operator compute, to compare two versions of nin.

    python benchmarks/checksums.py > after.json     and the same in a checkout of the version before

A change that should change no number leaves every line as it was, on the same machine, with the same PyTorch and as
many threads. It takes half a minute on two cores. house.md has the figures that were compared last.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import nin
from nin.training import CheckpointOptions

TRAININGS = {
    "digits, float32": {"epochs": 2, "precision": "fp32"},
    "digits, bf16": {"epochs": 2, "precision": "bf16"},
    "digits, speed recipe": {"epochs": 2, "recipe": "speed"},
    "digits, dropout": {"epochs": 2, "dropout": 0.3, "seed": 3},
    "digits, nin_cifar": {"epochs": 1, "model": "nin_cifar", "batch_size": 256},
}


def main():
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        sums = trainings(Path(folder)) | network(Path(folder)) | operator()
    print(json.dumps(sums, indent=1))


def digest(tensors):
    """Return the checksum of tensors by name: their bytes, whatever their layout."""
    result = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().flatten().contiguous()
        result.update(f"{name} {values.dtype}".encode() + values.view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def digest_text(text):
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def trainings(folder):
    """Train from the same seeds, once interrupted, once on images from files; keep the first run for `network`."""
    sums = {}

    def train(name, source, config, **options):
        run = folder / name
        nin.train(source, config, out=run, **options)
        sums[name] = digest(load_file(run / "model.safetensors"))
        sums[f"{name}, metrics.csv"] = digest_text((run / "metrics.csv").read_text())

    for name, options in TRAININGS.items():
        train(name, "digits", nin.TrainConfig(**options))
    asked = []
    config = nin.TrainConfig(**TRAININGS["digits, float32"])
    try:
        stop = CheckpointOptions(stop=lambda: asked.append(1) or len(asked) == 17)
        train("digits, resumed", "digits", config, keeping=stop)
    except KeyboardInterrupt:
        train("digits, resumed", "digits", config, keeping=CheckpointOptions(resume=True))
    write_photos(folder / "photos")
    colours = nin.TrainConfig(epochs=2, precision="fp32", model="nin_cifar", flip=True, shift=2)
    train("images from files", str(folder / "photos"), colours)
    return sums


def write_photos(folder):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (40 + i, 37, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def network(folder):
    """Predict, look at maps and narrow with the first run's network; a budget of MACs asks no clock."""
    classifier = nin.load(folder / "digits, float32")
    pixels = [image.numpy()[0] for image in nin.data.load("digits").test.images[:50]]
    probabilities = [[float(value) for value in p.probabilities] for p in classifier.predict(pixels)]
    maps = np.stack([classifier.confidence_maps(image)[0] for image in pixels[:8]])
    batches = [torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    narrowed = nin.narrow(classifier.model, batches, macs=0.5, options=nin.NarrowOptions(revert_slower=False))
    return {
        "predictions": digest_text(json.dumps(probabilities)),
        "maps": digest({"maps": torch.as_tensor(maps)}),
        "narrowed": digest(narrowed.model.state_dict()),
        "plan": digest_text(narrowed.plan.to_json()),
    }


def operator():
    """Compute a 3×3 layer and two 1×1 layers forward and backward, in both dtypes of the compiled kernels."""
    sums, generator = {}, torch.Generator().manual_seed(0)
    shapes = {"x": (4, 24, 20, 21), "w1": (40, 24, 3, 3), "w2": (32, 40, 1, 1), "w3": (8, 32, 1, 1)}
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {
            name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in shapes.items()
        }
        x, *weights = tensors.values()
        y = nin.mlpconv(x, weights, (None,) * 3, padding=1)
        y.float().pow(2).sum().backward()
        sums[f"operator, {dtype}"] = digest({"y": y, **{name: t.grad for name, t in tensors.items()}})
    return sums


if __name__ == "__main__":
    main()
