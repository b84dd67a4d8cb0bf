"""Evaluation: the scores of the test images, and the confidence interval of an accuracy."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from nin import data
from nin.runtime import distributed
from nin.runtime.progress import ProgressCallback, ignore_progress

Part = Literal["test", "validation"]

TEST_BATCH_SIZE = 250
GPU_TEST_BATCH_SIZE = 2000  # smaller batches leave a GPU idle

# Of larger images than these, in pixels a side, a batch has fewer, so that all batches take about the same memory: 250
# photos of 224 pixels take 1.2 GB in one layer of EfficientNet-Lite0.
FULL_BATCH_SIZE = 96


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: data.Data,
    *,
    device: torch.device,
    dtype: torch.dtype,
    part: Part = "test",
    flip: bool = False,
    on_lost: Callable[[str, str], None] | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> tuple[Tensor, Tensor]:
    """Return the scores of images and their labels: those of this process, where there are several.

    Args:
        model: in evaluation mode, on ``device``.
        images: the data set.
        device: where to compute.
        dtype: of the autocast; float32 for none.
        part: of the data set that is evaluated.
        flip: take the mean of the scores of each image and its mirror image.
        on_lost: called for files that cannot be read any more, which are left out; see `nin.data.batches`.
        on_progress: called with what is being done, the images of this process done, and all of them.

    Returns:
        Scores (N, classes), float32, and labels (N,), int64, on the CPU.
    """
    # joined where they are computed: reading a batch would wait for a GPU; an empty one, as there may be no other
    scores = [torch.empty(0, len(images.classes), device=device)]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    dataset = images.test if part == "test" else images.validation
    assert dataset is not None
    order = torch.arange(len(dataset))[distributed.rank() :: distributed.world_size()]
    batch_size = evaluation_batch_size(images.size, device)
    for number, (pixels, batch_labels, _) in enumerate(data.batches(dataset, order, batch_size, on_lost=on_lost), 1):
        x = data.to_float(pixels.to(device), images.mean, images.std, dtype=torch.float32)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            y = model(x).float()
            if flip:
                y = (y + model(x.flip(3)).float()) / 2
        scores.append(y)
        labels.append(batch_labels.to(device))
        on_progress("Testing", min(number * batch_size, len(order)), len(order))
    return torch.cat(scores).cpu(), torch.cat(labels).cpu()


def evaluation_batch_size(size: int, device: torch.device) -> int:
    """Return the number of images of a size, in pixels, that are evaluated at a time."""
    most = GPU_TEST_BATCH_SIZE if device.type == "cuda" else TEST_BATCH_SIZE
    return max(1, min(most, most * FULL_BATCH_SIZE**2 // size**2))


def gather_scores(scores: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the scores and labels of all processes, in the order of the images; those that were lost are left out.

    Args:
        scores: of this process, as `evaluate` returns them.
        labels: of this process.
        count: images of all processes together.
    """
    if distributed.world_size() == 1:
        return scores, labels
    rows = torch.arange(distributed.rank(), count, distributed.world_size())[: len(scores)]
    # each process fills in its own rows, and the sum has all of them
    all_scores = scores.new_zeros(count, scores.shape[1]).index_copy_(0, rows, scores)
    all_labels = labels.new_zeros(count).index_copy_(0, rows, labels + 1)  # 0: lost
    all_scores, all_labels = distributed.all_reduce_sum(all_scores), distributed.all_reduce_sum(all_labels)
    return all_scores[all_labels > 0], all_labels[all_labels > 0] - 1


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion, ``hits`` of ``count``: (low, high), both fractions of 1.

    Source:
        Wilson: Probable inference, the law of succession, and statistical inference, 1927.
    """
    z, p = 1.959964, hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return centre - half, centre + half
