"""Layers and images for the tests of k×k convolutions with Winograd."""

import torch

from nin.ops.arguments import ChainArguments

# input tile size, kernel size
KINDS = [(6, 3), (6, 4), (6, 5), (8, 3), (8, 4), (8, 5), (8, 6), (8, 7)]


def layer(channels, columns, kernel, padding, dtype=torch.float32, activation="relu", *more):
    """Return a k×k layer and 1×1 layers after it, with values of order 1."""
    widths, kernels = [channels, columns, *more], [kernel] + [1] * len(more)
    weights = [
        (torch.randn(o, i, k, k) * (i * k * k) ** -0.5).to(dtype)
        for i, o, k in zip(widths[:-1], widths[1:], kernels, strict=True)
    ]
    biases = [torch.randn(o).to(dtype) for o in widths[1:]]
    return ChainArguments(weights, biases, (1, 1), (padding, padding), (1, 1), [activation] * len(weights))


def images(count, channels, height, width, dtype=torch.float32, layout=torch.channels_last):
    return torch.randn(count, channels, height, width).to(dtype).contiguous(memory_format=layout)


def in_float64(chain):
    parameters = [w.double() for w in chain.weights], [None if b is None else b.double() for b in chain.biases]
    return ChainArguments(*parameters, *chain[2:])
