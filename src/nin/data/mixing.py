"""Mixup and CutMix: a batch mixed in pairs, and the soft targets; a function of (seed, epoch, step).

torchvision's MixUp and CutMix roll the batch by one and draw from PyTorch's generator; here the pairs must be the same
however many processes share the batch.
"""

import dataclasses
import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from nin.data.sampler import stream_key


@dataclasses.dataclass(frozen=True)
class Mix:
    """How the images of one batch are mixed with their partners.

    Attributes:
        share: of the image itself, in its target and, without a box, in its pixels.
        box: left, top, right and bottom of what is the partner's, in parts of the sides; None mixes all pixels.
    """

    share: float
    box: tuple[float, float, float, float] | None


def partner_positions(positions: Tensor, count: int) -> Tensor:
    """Return the partner of each position of a batch: the one half a batch further.

    The order is shuffled, so it is a random one. Of n processes each has every n-th image; where n divides half of the
    batch, an image and its partner are in the same process, and nothing is loaded twice.

    Args:
        positions: int64 (B,), in the batch of all processes.
        count: images in that batch.
    """
    return (positions + count // 2) % count


def draw_mix(*, mixup: float, cutmix: float, seed: int, epoch: int, step: int) -> Mix:
    """Return how a batch is mixed.

    Args:
        mixup: alpha of the Beta distribution of the shares, 0 for never.
        cutmix: likewise for boxes. Where both are above 0, half of the steps take one, half the other.
        seed: of the run.
        epoch: from 0.
        step: of the epoch, from 0.
    """
    rng = random.Random(stream_key("mix", seed, epoch, step))
    cuts = rng.random() < 0.5 if mixup and cutmix else bool(cutmix)
    share = rng.betavariate(*2 * (cutmix if cuts else mixup,))
    if not cuts:
        return Mix(share, None)
    half = math.sqrt(1 - share) / 2
    x, y = rng.random(), rng.random()
    return Mix(share, (max(0.0, x - half), max(0.0, y - half), min(1.0, x + half), min(1.0, y + half)))


def mix_batch(
    x: Tensor, labels: Tensor, own: Tensor, other: Tensor, mix: Mix, *, classes: int
) -> tuple[Tensor, Tensor]:
    """Return mixed images and their targets.

    Args:
        x: images, float32 (B, C, H, W).
        labels: int64 (B,).
        own: the rows that are mixed, int64 (K,).
        other: the rows of their partners, int64 (K,).
        mix: how.
        classes: their number.

    Returns:
        float32 (K, C, H, W) and the probability of each class, float32 (K, classes).
    """
    share, a, b = mix.share, x[own], x[other]
    if mix.box is None:
        mixed = a * share + b * (1 - share)
    else:
        height, width = x.shape[-2:]
        left, top, right, bottom = (round(part * side) for part, side in zip(mix.box, 2 * (width, height), strict=True))
        mixed = a.clone()
        mixed[:, :, top:bottom, left:right] = b[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    first, second = (F.one_hot(labels[rows], classes).to(torch.float32) for rows in (own, other))
    return mixed, first * share + second * (1 - share)
