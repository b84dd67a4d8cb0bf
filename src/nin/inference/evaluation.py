"""Evaluation: the scores of the test images, and the confidence interval of an accuracy."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nin import data
from nin.runtime import distributed

TEST_BATCH_SIZE = 250
GPU_TEST_BATCH_SIZE = 2000  # smaller batches leave a GPU idle


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: data.Data,
    *,
    device: torch.device,
    dtype: torch.dtype,
    flip: bool = False,
    on_lost: Callable[[str, str], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the scores of the test images and their labels: those of this process, where there are several.

    Args:
        model: in evaluation mode, on ``device``.
        images: their test images are used.
        device: where to compute.
        dtype: of the autocast; float32 for none.
        flip: take the mean of the scores of each image and its mirror image.
        on_lost: called for files that cannot be read any more, which are left out; see `nin.data.batches`.

    Returns:
        Scores (N, classes), float32, and labels (N,), int64, on the CPU.
    """
    # joined where they are computed: reading a batch would wait for a GPU; an empty one, as there may be no other
    scores = [torch.empty(0, len(images.classes), device=device)]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    order = torch.arange(len(images.test))[distributed.rank() :: distributed.world_size()]
    batch_size = GPU_TEST_BATCH_SIZE if device.type == "cuda" else TEST_BATCH_SIZE
    for pixels, batch_labels, _ in data.batches(images.test, order, batch_size, on_lost=on_lost):
        x = data.to_float(pixels.to(device), images.mean, images.std, dtype=torch.float32)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            y = model(x).float()
            if flip:
                y = (y + model(x.flip(3)).float()) / 2
        scores.append(y)
        labels.append(batch_labels.to(device))
    return torch.cat(scores).cpu(), torch.cat(labels).cpu()


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion, ``hits`` of ``count``: (low, high), both fractions of 1.

    Source:
        Wilson: Probable inference, the law of succession, and statistical inference, 1927.
    """
    z, p = 1.959964, hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return centre - half, centre + half
