"""Choosing colours: a 1×1 chain learns which input colours to look at.

scikit-learn ships a photo of a flower (427×640). The target is rough: two discs drawn over the flowers. Two 1×1
layers, 3 → 8 → 1 channels and 41 parameters, see one pixel at a time and nothing of where it is, so all that they
can learn is which colours lie inside the discs. They learn from every fourth pixel in each direction.

    python docs/examples/choose_colours.py --out picture.png    # the photo, the target, what the chain says
"""

import argparse
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import nin

COLOURS = ("red", "green", "blue")
DISCS = ((222, 308, 138), (450, 364, 76))  # row and column of the centre, radius: in pixels


@dataclasses.dataclass(frozen=True)
class Result:
    """What was learned.

    Attributes:
        accuracy: the share of all pixels that are told rightly.
        influence: how much the answer rises with each colour, on average over the photo.
        picture: photo, target and answer side by side, (427, 3 · 640, 3) bytes.
    """

    accuracy: float
    influence: dict[str, float]
    picture: Tensor


def load_photo() -> Tensor:
    """Return the photo, (1, 3, 427, 640), between 0 and 1."""
    return torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None] / 255


def draw_target(height: int, width: int) -> Tensor:
    """Return 1 inside the discs and 0 outside, (1, 1, height, width)."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    inside = [(rows - row) ** 2 + (columns - column) ** 2 < radius**2 for row, column, radius in DISCS]
    return torch.stack(inside).any(0).float()[None, None]


def learn(chain: nn.Module, photo: Tensor, target: Tensor) -> None:
    """Fit the chain to the target, in 200 steps."""
    optimizer = torch.optim.Adam(chain.parameters(), lr=0.05)
    for _ in range(200):
        loss = F.binary_cross_entropy_with_logits(chain(photo), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(out: Path | None = None) -> Result:
    """Print what the chain learned and return it; write the picture to ``out``."""
    torch.manual_seed(0)
    photo = load_photo()
    target = draw_target(*photo.shape[2:])
    chain = nin.MLPConv(3, (8, 1), activation=("relu", None))
    learn(chain, photo[:, :, ::4, ::4], target[:, :, ::4, ::4])

    photo.requires_grad_()
    answer = torch.sigmoid(chain(photo))
    (slope,) = torch.autograd.grad(answer.sum(), photo)
    influence = dict(zip(COLOURS, slope.sum((0, 2, 3)).div(slope.abs().sum()).tolist(), strict=True))
    accuracy = ((answer > 0.5) == (target > 0.5)).float().mean().item()
    parameters = sum(p.numel() for p in chain.parameters())
    blind = 1 - target.mean().item()  # the accuracy of always answering "no flower"
    print(f"{parameters} parameters, {accuracy:.1%} of all pixels right ({blind:.1%} without looking)")
    for colour, weight in influence.items():
        print(f"more {colour:5} speaks {'for' if weight > 0 else 'against'} the flower ({weight:+.2f})")

    maps = [photo.detach(), target.expand(-1, 3, -1, -1), answer.detach().expand(-1, 3, -1, -1)]
    picture = torch.cat(maps, dim=3)[0].mul(255).round().byte().permute(1, 2, 0)
    if out is not None:
        Image.fromarray(picture.numpy()).save(out)
    return Result(accuracy, influence, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the picture to this file")
    main(parser.parse_args().out)
