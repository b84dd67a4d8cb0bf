"""The kernels as operators of their own, ``nin::triton_mlpconv`` and its backward.

``triton_op`` lets torch.compile look into them; eager calls go to the kernels straight. ``nin::mlpconv`` remains the
one operator that everybody calls: on CUDA it hands over to these (see `nin.ops.gpu.dispatch`). The activations' names
come as one text with commas, as PyTorch up to 2.11 derives no schema for a list of texts. ``triton_op`` derives the
schema from the annotations, so the fields of `ChainArguments` are parameters here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.library import triton_op

from nin.ops.arguments import ChainArguments
from nin.ops.gpu import backward, forward


@triton_op("nin::triton_mlpconv", mutates_args=())
def mlpconv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activations: str,
) -> Tensor:
    """Compute the chain; see `launching.mlpconv`."""
    return forward.mlpconv(x, ChainArguments(weights, biases, stride, padding, dilation, activations.split(",")))


@triton_op("nin::triton_mlpconv_backward", mutates_args=())
def mlpconv_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activations: str,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute the gradients; see `gradients.mlpconv_backward`."""
    layers = ChainArguments(weights, biases, stride, padding, dilation, activations.split(","))
    return backward.mlpconv_backward(grad, x, y, layers, needs)
