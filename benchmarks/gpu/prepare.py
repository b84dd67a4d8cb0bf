"""Decode an image folder into one file of arrays, so that no minute of a GPU goes into reading 60,000 files.

    python benchmarks/gpu/prepare.py FOLDER FILE.npz [--size 32]

The file holds train_images and test_images, uint8 (N, C, H, W), train_labels and test_labels, and how the images may be
mirrored and shifted; train.py takes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nin import data


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", type=int)
    given = parser.parse_args(arguments)
    images = data.load(given.folder, size=given.size)
    arrays: dict[str, Any] = {"flip": images.flip, "shift": images.shift}
    for name, part in (("train", images.train), ("test", images.test)):
        held = data.to_device(part, torch.device("cpu"))
        arrays |= {f"{name}_images": held.images.numpy(), f"{name}_labels": held.labels.numpy()}
    np.savez(given.file, **arrays)
    print(f"{given.file}: {len(images.train):,} images to train on, {len(images.test):,} to test")


if __name__ == "__main__":
    main()
