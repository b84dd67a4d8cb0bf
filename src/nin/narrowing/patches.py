"""A layer's input patches (im2col) and outputs, at the same sampled positions of every image."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nin.models.layer_spec import LayerSpec

# Positions sampled in each image, the same in all images; all of them where there are fewer. Neighbouring positions
# are strongly correlated, so a few stand for the rest: 500 images give 32,000 samples of at most 4,608 values.
POSITIONS_PER_IMAGE = 64


@functools.cache
def sampled_positions(count: int) -> Tensor:
    """Return which of that many output positions to sample: int64 indices into height · width, ascending."""
    if count <= POSITIONS_PER_IMAGE:
        return torch.arange(count)
    # seeded by the size, so that every pass over the images, in every process, samples the same ones
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(count, generator=generator)[:POSITIONS_PER_IMAGE].sort().values


def extract_patches(x: Tensor, spec: LayerSpec) -> Tensor:
    """Return the input patches of a layer at its `sampled_positions`, its padding included.

    `torch.nn.functional.unfold` would build those of all positions, up to 50 times as much memory, and knows neither
    groups nor the other padding modes.

    Args:
        x: the layer's input: (N, C, H, W) or (C, H, W); (…, C) for a fully connected layer.
        spec: the layer's geometry.

    Returns:
        (groups, C / groups · kH · kW, N · positions).
    """
    if spec.kind == "linear":
        return _linear_samples(x, spec)
    x, positions = pad(x if x.dim() == 4 else x[None], spec), sampled_positions(spec.positions)
    n, c, width = x.shape[0], x.shape[1], x.shape[3]
    row, column = positions // spec.output_size[1], positions % spec.output_size[1]
    tap_rows = torch.arange(spec.kernel_size[0]) * spec.dilation[0]
    tap_columns = torch.arange(spec.kernel_size[1]) * spec.dilation[1]
    taps = (tap_rows[:, None] * width + tap_columns).flatten()  # (k²,)
    starts = row * spec.stride[0] * width + column * spec.stride[1]  # (positions,)
    index = (taps[:, None] + starts).flatten().to(x.device)
    values = x.flatten(2).index_select(2, index)  # (N, C, k² · positions)
    values = values.view(n, spec.groups, c // spec.groups, len(taps), len(positions))
    return values.permute(1, 2, 3, 0, 4).flatten(3).flatten(1, 2)


def extract_outputs(y: Tensor, spec: LayerSpec) -> Tensor:
    """Return a layer's outputs at its `sampled_positions`: (groups, C_out / groups, N · positions)."""
    if spec.kind == "linear":
        return _linear_samples(y, spec)
    y = y if y.dim() == 4 else y[None]
    values = y.flatten(2)[:, :, sampled_positions(spec.positions).to(y.device)]  # (N, C_out, positions)
    values = values.view(len(values), spec.groups, values.shape[1] // spec.groups, values.shape[2])
    return values.permute(1, 2, 0, 3).flatten(2)


def _linear_samples(x: Tensor, spec: LayerSpec) -> Tensor:
    """Return the vectors of a fully connected layer's input or output: (1, C, N · positions)."""
    samples = x.reshape(-1, spec.positions, x.shape[-1])[:, sampled_positions(spec.positions)]
    return samples.reshape(1, -1, x.shape[-1]).mT


def pad(x: Tensor, spec: LayerSpec) -> Tensor:
    """Return images (N, C, H, W) with the layer's padding around them."""
    if spec.padding == "same":
        # of an odd total PyTorch puts the larger half behind
        total = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
        sides = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    elif isinstance(spec.padding, str):  # "valid"
        sides = [0, 0, 0, 0]
    else:
        sides = [spec.padding[1]] * 2 + [spec.padding[0]] * 2
    if not any(sides):
        return x
    return F.pad(x, sides, mode="constant" if spec.padding_mode == "zeros" else spec.padding_mode)
