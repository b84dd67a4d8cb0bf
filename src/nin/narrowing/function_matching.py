"""Function matching: all weights of a narrowed network fitted together to the original's outputs, on mixed images."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nin.narrowing.calibration import PIXELS_AT_A_TIME, model_inputs
from nin.optim import adamw, one_cycle_learning_rate
from nin.runtime import distributed
from nin.runtime.model_copy import copy_model
from nin.runtime.progress import ProgressCallback, ignore_progress

# Images of a step, and of all those how many (one in so many) decide whether the result is kept.
BATCH, JUDGE_EVERY = 50, 5

# It pays where it costs little: at most so many passes, and multiply-accumulates of all of them together, about half a
# minute of one core (twice: to judge, and with all images); with fewer passes nothing is gained, and none is made.
MOST_PASSES, LEAST_PASSES, MOST_MACS = 30, 5, 1.5e12

# At the peak, of AdamW. Compared with 0.0003 in benchmarks/narrowing/README.md.
LEARNING_RATE = 1e-3


def count_passes(images: int, macs: tuple[int, int]) -> int:
    """Return how many passes are made where the number is not given.

    Args:
        images: that there are.
        macs: multiply-accumulates for one image, of the original and of the narrowed network.
    """
    before, after = macs
    passes = min(MOST_PASSES, int(MOST_MACS / max(1, images * (before + 3 * after))))  # backward is twice the forward
    return passes if passes >= LEAST_PASSES else 0


def split_images(original: nn.Module, batches: list[Any]) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return batches to fit to, and others to judge by: one image in five.

    Returns:
        None where function matching is not for the network: where it does not give one table or map of floating-point
        numbers for a batch of images, where these have several shapes, where there are too few of them, and in a job of
        several processes.
    """
    images = _images(batches)
    if images is None or distributed.world_size() > 1 or not _gives_one_output(original, images[:1]):
        return None
    apart = torch.arange(len(images)) % JUDGE_EVERY == 0
    if int((~apart).sum()) < 2 * BATCH:
        return None
    return list(images[~apart].split(BATCH)), list(images[apart].split(BATCH))


def match_function(
    model: nn.Module,
    original: nn.Module,
    images: list[Tensor],
    *,
    passes: int,
    on_progress: ProgressCallback = ignore_progress,
) -> nn.Module:
    """Return a copy of a network, all weights of which are fitted together to the original's outputs.

    The images are mixed, ``λ a + (1 - λ) b`` with λ from 0 to 1 at random, new ones in each pass: of a few hundred
    images the network would learn the answers by heart, and the original is sure of the images that it was trained on.
    BatchNorm and dropout are as in evaluation.

    Args:
        model: the narrowed network, in evaluation mode; left as it is.
        original: the network before.
        images: to fit to, in batches of one shape.
        passes: over the images.
        on_progress: called with what is being done, the steps done and all steps.

    Source:
        Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov: Knowledge distillation: a good teacher is patient and
        consistent, 2021, arXiv 2106.05237.
    """
    fitted = copy_model(model).eval()
    trained = [p for p in fitted.parameters() if p.is_floating_point()]
    before = [p.requires_grad for p in trained]
    for p in trained:
        p.requires_grad_(True)
    _train(fitted, original, torch.cat(images), trained, passes, on_progress)
    for p, requires_grad in zip(trained, before, strict=True):
        p.requires_grad_(requires_grad)
        p.grad = None
    return fitted


def _train(
    fitted: nn.Module,
    original: nn.Module,
    seen: Tensor,
    trained: list[nn.Parameter],
    passes: int,
    on_progress: ProgressCallback,
) -> None:
    """Minimise the squared distance of the outputs, in place."""
    generator = torch.Generator().manual_seed(0)
    size = max(1, min(BATCH, PIXELS_AT_A_TIME // max(1, math.prod(seen.shape[2:]))))
    with torch.no_grad():
        outputs = torch.cat([original(x) for x in seen[: 4 * BATCH].split(size)])
        variance = outputs.var(0).mean().clamp_min(1e-12)
    optimizer = adamw(fitted, learning_rate=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    steps = passes * (len(seen) // size)
    for step in range(steps):
        place = step % (len(seen) // size)
        if place == 0:
            order = torch.randperm(len(seen), generator=generator)
        chosen = order[place * size : (place + 1) * size]
        others = torch.randint(len(seen), (size,), generator=generator)
        share = torch.rand(size, generator=generator).to(seen).reshape(-1, *[1] * (seen.dim() - 1))
        x = share * seen[chosen] + (1 - share) * seen[others]
        with torch.no_grad():
            wanted = original(x)
        loss = (fitted(x) - wanted).square().mean() / variance
        for group in optimizer.param_groups:
            group["lr"] = one_cycle_learning_rate(step, steps, peak=LEARNING_RATE, warmup=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        on_progress("Fitting all weights together", step + 1, steps)


def _images(batches: list[Any]) -> Tensor | None:
    """Return the images of all batches, or None where they are no images, or not of one shape."""
    inputs = list(model_inputs(batches))
    if any(kwargs or len(args) != 1 or not args[0].is_floating_point() for args, kwargs in inputs):
        return None
    tensors = [args[0] for args, _ in inputs]
    if len({(*t.shape[1:], t.dtype) for t in tensors}) != 1:
        return None
    return torch.cat(tensors)


@torch.no_grad()
def _gives_one_output(original: nn.Module, image: Tensor) -> bool:
    found = original(image)
    return isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 1
