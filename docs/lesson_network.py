"""The network of the page's last lesson: one mlpconv layer, small enough to see every number, that reads digits.

    python docs/lesson_network.py --out src/nin/server/page/digits.json

5×5 → 1×1 → 1×1 (1 → 12 → 12 → 10 channels), global average pooling, 598 parameters. It learns from scikit-learn's
digits, 8×8 pixels from 0 to 16, and is written down with one held-out image of each digit.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nin

STEPS, BATCH = 6000, 64


def learn(network: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Fit the network, its step size falling to zero."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(network(images[chosen]), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def rounded(values: Tensor) -> list:
    """Return plain numbers with four decimals, in nested lists."""
    return [rounded(row) for row in values] if values.dim() > 1 else [round(value, 4) for value in values.tolist()]


def main(out: Path | None = None, *, steps: int = STEPS) -> float:
    """Train, print and return the accuracy on held-out images; write the network to ``out``."""
    torch.manual_seed(0)
    data = nin.data.load("digits")
    block = nin.MLPConv(1, (12, 12, 10), kernel_size=5, padding=2, activation=("relu", "relu", None))
    network = nn.Sequential(block, nin.GlobalAveragePooling())
    learn(network, data.train.images / 255, data.train.labels, steps)
    with torch.inference_mode():
        answers = network(data.test.images / 255).argmax(1)
    right = answers == data.test.labels
    print(f"{sum(p.numel() for p in network.parameters())} parameters, {right.float().mean():.1%} of the digits right")
    if out is not None:
        layers = [{"weight": rounded(conv.weight.flatten(1)), "bias": rounded(conv.bias)} for conv in block.convs]
        first = [int(((data.test.labels == digit) & right).nonzero()[0]) for digit in range(10)]
        images = [data.test.images[i, 0].flatten().tolist() for i in first]
        values = {"accuracy": round(right.float().mean().item(), 4), "layers": layers, "images": images}
        text = json.dumps(values, separators=(",", ":"))
        out.write_text(text + "\n")
    return right.float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the network to this file")
    main(parser.parse_args().out)
