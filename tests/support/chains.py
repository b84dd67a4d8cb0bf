"""Chains of convolutions to test the operator with: their shapes, their definition in PyTorch, and an error bound."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


PLAIN = {"none": lambda z: z, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


LIPSCHITZ = {"none": 1.0, "relu": 1.0, "gelu": 1.13, "silu": 1.1}  # the steepest slope of each activation


each_layout = pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=LAYOUTS)


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclasses.dataclass(frozen=True)
class Chain:
    """The shape of one call: widths[0] is the input's; the rest as nin.mlpconv has it."""

    widths: tuple[int, ...]
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True

    def tensors(self, dtype=torch.float64, layout=torch.contiguous_format, *, images=2, size=(9, 8)):
        """Return x, weights and biases with values of order 1 in every layer."""
        x = torch.randn(images, self.widths[0], *size).to(dtype).contiguous(memory_format=layout)
        weights = [
            (torch.randn(o, i, *k) * (i * k[0] * k[1]) ** -0.5).to(dtype)
            for (i, o), k in zip(itertools.pairwise(self.widths), self.kernel_sizes, strict=True)
        ]
        return x, weights, [torch.randn(o).to(dtype) if self.bias else None for o in self.widths[1:]]

    @property
    def kernel_sizes(self):
        return [self.kernel_size] + [(1, 1)] * (len(self.widths) - 2)

    @property
    def geometry(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


CHAINS = {
    "1x1": Chain((5, 7)),
    "1x1 stride": Chain((4, 3), stride=(2, 3)),
    "1x1 padded": Chain((3, 4, 2), padding=(1, 2)),
    "1x1 1x1": Chain((6, 8, 5)),
    "no bias": Chain((3, 5, 4), (3, 3), padding=(1, 1), bias=False),
    "3x3 stride 2": Chain((3, 7), (3, 3), (2, 2), (1, 1)),
    "5x5 and three": Chain((3, 9, 6, 5, 2), (5, 5), padding=(2, 2)),
    "3x3 dilated": Chain((2, 5, 3), (3, 3), padding=(2, 2), dilation=(2, 2)),
    "3x2 uneven": Chain((5, 1, 3, 1), (3, 2), (1, 2), (0, 1), (2, 1)),
}


each_chain = pytest.mark.parametrize("chain", list(CHAINS.values()), ids=CHAINS)


def conv_chain(x, weights, biases, activations, geometry):
    """The definition, in PyTorch's own convolutions."""
    for i, (weight, bias, activation) in enumerate(zip(weights, biases, activations, strict=True)):
        x = PLAIN[activation](F.conv2d(x, weight, bias, **(geometry if i == 0 else {})))
    return x


def error_bound(x, weights, biases, activations, geometry, dtype):
    """Bound |computed - exact| at each place, for sums in float32 or better and results rounded to ``dtype``.

    A sum of K products is off by at most (K + 1) u_sum times the sum of the absolute values; rounding the sum, the
    sum with its bias and the activation adds 4 u. What came in wrong goes through |W| and the activation's slope.
    """
    u, u_sum = torch.finfo(dtype).eps / 2, min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2
    error = torch.zeros_like(x)
    for i, (weight, bias, activation) in enumerate(zip(weights, biases, activations, strict=True)):
        options = geometry if i == 0 else {}
        magnitude = F.conv2d(x.abs() + error, weight.abs(), None if bias is None else bias.abs(), **options)
        rounding = ((weight[0].numel() + 1) * u_sum + 4 * u) * magnitude + torch.finfo(dtype).smallest_normal
        error = LIPSCHITZ[activation] * (F.conv2d(error, weight.abs(), **options) + rounding)
        x = PLAIN[activation](F.conv2d(x, weight, bias, **options))
    return error


def random_grads(tensors, result):
    return torch.autograd.grad(result, tensors, torch.ones_like(result) + result.detach() / 8)


def tensors_of(x, weights, biases):
    return [x, *weights, *(b for b in biases if b is not None)]
