"""1×1 chains as PyTorch's matrix products (cuBLAS, cuBLASLt): pixels are rows, where channels lie together."""

import torch
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments


def is_supported(x: Tensor, chain: ChainArguments) -> bool:
    """Return whether the pixels are the rows of a matrix where they lie."""
    dense = x.is_contiguous(memory_format=torch.channels_last)
    pixels_are_rows = reference.memory_format_of(x) == torch.channels_last or x.shape[2] == x.shape[3] == 1
    return dense and pixels_are_rows and chain.is_pointwise() and tuple(chain.stride) == (1, 1)


def mlpconv(x: Tensor, chain: ChainArguments) -> Tensor:
    """Compute a chain of which `is_supported` is true, layer by layer, bias and ReLU in the product's epilogue."""
    images, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    for weight, bias, activation in zip(chain.weights, chain.biases, chain.activations, strict=True):
        matrix = weight.reshape(weight.shape[0], weight.shape[1]).t()
        if bias is not None and activation == "relu":
            rows = torch._addmm_activation(bias, rows, matrix)
            continue
        # its GELU is the approximation with tanh, ours the exact one
        rows = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
        rows = reference.ACTIVATIONS[activation](rows)
    if reference.memory_format_of(x) == torch.channels_last:
        return rows.view(images, height, width, -1).permute(0, 3, 1, 2)
    return rows.view(images, -1, 1, 1)  # of one pixel, which lies in both formats alike
