"""``nin::mlpconv`` as PyTorch sees it: schema, fake kernels, autograd, autocast and the FLOP formula.

The kernels themselves are registered over the reference ones by ``cpu`` and ``gpu``; the dispatcher is the
only switch between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nin.ops import reference
from nin.ops.arguments import ChainArguments, Gradients, as_dispatcher_backward_kernel, as_dispatcher_kernel

GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, str[] activations"

library = torch.library.Library("nin", "DEF")
library.define(f"mlpconv(Tensor x, Tensor[] weights, Tensor?[] biases, {GEOMETRY}) -> Tensor")
library.define(
    f"mlpconv_backward(Tensor grad, Tensor x, Tensor y, Tensor[] weights, Tensor?[] biases, {GEOMETRY}, "
    "bool[] needs) -> (Tensor, Tensor[], Tensor[])"
)
library.impl("mlpconv", as_dispatcher_kernel(reference.mlpconv), "CompositeExplicitAutograd")
_reference_backward = as_dispatcher_backward_kernel(reference.mlpconv_backward)
library.impl("mlpconv_backward", _reference_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("nin::mlpconv")
@as_dispatcher_kernel
def _mlpconv_fake(x: Tensor, layers: ChainArguments) -> Tensor:
    shape = layers.output_shape(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format_of(x))


@torch.library.register_fake("nin::mlpconv_backward")
@as_dispatcher_backward_kernel
def _mlpconv_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, needs: Sequence[bool]
) -> Gradients:
    layout = reference.memory_format_of(x)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    parameters, count = [*layers.weights, *layers.biases], len(layers.weights)
    grads = [
        p.new_empty(p.shape) if p is not None and needed else x.new_empty(0)
        for p, needed in zip(parameters, needs[1:], strict=True)
    ]
    return grad_x if needs[0] else x.new_empty(0), grads[:count], grads[count:]


class _MLPConv(torch.autograd.Function):
    """Keeps the input and the result; the backward op computes what lies between them again.

    The parameters come as_dispatcher_kernel, as autograd does not look into lists.
    """

    @staticmethod
    def forward(ctx: Any, geometry: tuple[Any, ...], count: int, x: Tensor, *parameters: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.nin.mlpconv(x, parameters[:count], parameters[count:], *geometry)
        ctx.geometry, ctx.count = geometry, count
        ctx.save_for_backward(x, y, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *parameters = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[2:])
        # create_graph=True: the reference is made of differentiable parts, so it can be derived again
        kernel = _reference_backward if torch.is_grad_enabled() else torch.ops.nin.mlpconv_backward
        arguments = (grads[0], x, y, parameters[: ctx.count], parameters[ctx.count :], *ctx.geometry, needs)
        grad_x, grad_weights, grad_biases = kernel(*arguments)
        in_order = (grad_x, *grad_weights, *grad_biases)
        return None, None, *(g if needed else None for g, needed in zip(in_order, needs, strict=True))


def _mlpconv_autograd(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *geometry: Any) -> Tensor:
    parameters = (*weights, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        y: Tensor = _MLPConv.apply(geometry, len(weights), x, *parameters)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.nin.mlpconv(x, weights, biases, *geometry)


library.impl("mlpconv", _mlpconv_autograd, "Autograd")


def _autocast(device: str) -> Any:
    def kernel(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *rest: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

        with torch.autocast(device, enabled=False):
            return torch.ops.nin.mlpconv(
                cast(x), [cast(w) for w in weights], [None if b is None else cast(b) for b in biases], *rest
            )

    return kernel


library.impl("mlpconv", _autocast("cpu"), "AutocastCPU")
library.impl("mlpconv", _autocast("cuda"), "AutocastCUDA")


def chain_macs(y_shape: Sequence[int], weight_shapes: Sequence[Sequence[int]]) -> int:
    """Return the multiply-accumulates of a chain: every layer works at the pixels of the result."""
    pixels = y_shape[0] * y_shape[2] * y_shape[3]
    return pixels * sum(w[0] * w[1] * w[2] * w[3] for w in weight_shapes)


@register_flop_formula(torch.ops.nin.mlpconv)
def _mlpconv_flop(x_shape: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """2 FLOP for each multiply-accumulate; biases and activations are not counted, as PyTorch's own formulas."""
    return 2 * chain_macs(out_shape, weights)


@register_flop_formula(torch.ops.nin.mlpconv_backward)
def _mlpconv_backward_flop(grad_shape: Any, x_shape: Any, y_shape: Any, weights: Any, *rest: Any, **__: Any) -> int:
    """The arithmetic of the gradients; what a kernel computes again to save memory is not counted."""
    needs = rest[-1]
    count, flops = len(weights), 0
    for i, weight in enumerate(weights):
        below = needs[0] or any(needs[1 : 1 + i]) or any(needs[1 + count : 1 + count + i])
        flops += 2 * chain_macs(grad_shape, [weight]) * (int(needs[1 + i]) + int(below))
    return flops
