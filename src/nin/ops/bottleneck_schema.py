"""The operator ``nin::inverted_bottleneck``: schema, fake kernel, autograd, vmap, autocast and FLOP formula.

It is registered as ``nin::mlpconv`` is, see `schema`. Its backward pass consists of PyTorch's own operators, so no
second operator is needed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nin.ops import bottleneck_reference as reference
from nin.ops.bottleneck_reference import BottleneckArguments, as_dispatcher_kernel
from nin.ops.checks import want_gradients
from nin.ops.reference import memory_format_of
from nin.ops.schema import autocast_kernel, batched_kernel, check_memory, library
from nin.ops.transforms import is_transformed, overrides_dispatch

library.define(
    "inverted_bottleneck(Tensor x, Tensor[] weights, Tensor?[] biases, int[2] stride, int[2] padding, "
    "int[2] dilation, str[] activations, bool residual, float? norm_eps=None) -> Tensor"
)
_conv2d_layers = as_dispatcher_kernel(reference.conv2d_layers)


def _fallback(x: Tensor, arguments: BottleneckArguments) -> Tensor:
    """Serve every device and layout for which no backend registers kernels of its own."""
    for t in (x, *arguments.weights):
        if t.layout not in (torch.strided, torch._mkldnn):  # type: ignore[attr-defined]
            raise ValueError(f"images and weights must be dense, got one of layout {t.layout}: use its to_dense()")
    check_memory((x, *arguments.weights, *arguments.biases))
    return reference.inverted_bottleneck(x, arguments)


library.impl("inverted_bottleneck", as_dispatcher_kernel(_fallback), "CompositeExplicitAutograd")


@torch.library.register_fake("nin::inverted_bottleneck")
@as_dispatcher_kernel
def _fake(x: Tensor, arguments: BottleneckArguments) -> Tensor:
    shape = arguments.output_shape(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


class _InvertedBottleneckFunction(torch.autograd.Function):
    """Save the input; the backward pass computes the hidden tensors again.

    The parameters are separate arguments because autograd does not look into lists.
    """

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], count: int, x: Tensor, *parameters: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.nin.inverted_bottleneck.default(x, parameters[:count], parameters[count:], *options)
        ctx.options, ctx.count = options, count
        ctx.save_for_backward(x, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        arguments = BottleneckArguments(parameters[: ctx.count], parameters[ctx.count :], *ctx.options)
        return None, None, *reference.backward(grads[0], x, arguments, ctx.needs_input_grad[2:])


def _autograd(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *options: Any) -> Tensor:
    tensors = (x, *weights, *biases)
    if is_transformed() or overrides_dispatch(tensors):
        return _conv2d_layers(x, weights, biases, *options)
    if want_gradients(tensors):
        y: Tensor = _InvertedBottleneckFunction.apply(options, len(weights), *tensors)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.nin.inverted_bottleneck.default(x, weights, biases, *options)


library.impl("inverted_bottleneck", _autograd, "Autograd")


_operator = torch.ops.nin.inverted_bottleneck
library.impl("inverted_bottleneck", batched_kernel(_operator, _conv2d_layers), "FuncTorchBatched")
library.impl("inverted_bottleneck", autocast_kernel(_operator, "cpu"), "AutocastCPU")
library.impl("inverted_bottleneck", autocast_kernel(_operator, "cuda"), "AutocastCUDA")


def bottleneck_macs(
    x_shape: Sequence[int], y_shape: Sequence[int], weight_shapes: Sequence[Sequence[int]], *, normalizes: bool = False
) -> int:
    """Return the multiply-accumulates.

    A 1×1 layer before the depthwise one runs at the input's resolution, those of squeeze-and-excitation once an image.

    Args:
        x_shape: of the input.
        y_shape: of the result.
        weight_shapes: of the layers' weights.
        normalizes: whether the depthwise layer is the first of three, with a LayerNorm behind it.
    """
    macs = [w[0] * w[1] * w[2] * w[3] for w in weight_shapes]
    pixels_in, pixels_out = (shape[0] * shape[2] * shape[3] for shape in (x_shape, y_shape))
    if normalizes:
        return pixels_out * sum(macs)
    up = macs[:1] if len(macs) in (3, 5) else []
    depthwise, *squeeze, down = macs[len(up) :]
    return pixels_in * sum(up) + x_shape[0] * sum(squeeze) + pixels_out * (depthwise + down)


@register_flop_formula(torch.ops.nin.inverted_bottleneck)
def _flop(x_shape: Any, weights: Any, biases: Any, *options: Any, out_shape: Any = None, **__: Any) -> int:
    """Count 2 FLOP for each multiply-accumulate and, like PyTorch's formulas, no biases and activations."""
    normalizes = BottleneckArguments(weights, biases, *options).norm_eps is not None
    return 2 * bottleneck_macs(x_shape, out_shape, weights, normalizes=normalizes)
