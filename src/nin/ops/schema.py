"""The operator ``nin::mlpconv``: schema, fake kernels, autograd, vmap, autocast and FLOP formulas.

The backends in `cpu.dispatch` and `gpu.dispatch` register their kernels over the reference; PyTorch's dispatcher is the
only switch between them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import unwrap_batched  # type: ignore[attr-defined]
from torch.amp.autocast_mode import _cast as cast_floats
from torch.utils.flop_counter import register_flop_formula

from nin.ops import reference
from nin.ops.arguments import (
    ChainArguments,
    Gradients,
    as_dispatcher_backward_kernel,
    as_dispatcher_kernel,
    needs_input_gradient,
)
from nin.ops.transforms import has_memory, is_plain, is_transformed, overrides_dispatch

_OPTIONS = "int[2] stride, int[2] padding, int[2] dilation, str[] activations"

# By hand and not with torch.library.custom_op and register_autograd, which flatten the lists of tensors in each call.
library = torch.library.Library("nin", "DEF")
library.define(f"mlpconv(Tensor x, Tensor[] weights, Tensor?[] biases, {_OPTIONS}) -> Tensor")
library.define(
    f"mlpconv_backward(Tensor grad, Tensor x, Tensor y, Tensor[] weights, Tensor?[] biases, {_OPTIONS}, "
    "bool[] needs) -> (Tensor, Tensor[], Tensor[])"
)


def _fallback(x: Tensor, chain: ChainArguments) -> Tensor:
    """Serve every device and layout for which no backend registers kernels of its own."""
    for t in (x, *chain.weights):
        if t.layout not in (torch.strided, torch._mkldnn):  # type: ignore[attr-defined]
            raise ValueError(f"images and weights must be dense, got one of layout {t.layout}: use its to_dense()")
    check_memory((x, *chain.weights, *chain.biases))
    return reference.mlpconv(x, chain)


def check_memory(tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError for a tensor whose storage was resized to 0, at which PyTorch's own kernels may crash."""
    for t in tensors:
        if t is not None and t.is_cpu and t.layout is torch.strided and not has_memory(t):
            raise ValueError(f"each tensor must have memory, got one of shape {tuple(t.shape)} whose storage is empty")


library.impl("mlpconv", as_dispatcher_kernel(_fallback), "CompositeExplicitAutograd")
_reference_backward = as_dispatcher_backward_kernel(reference.mlpconv_backward)
library.impl("mlpconv_backward", _reference_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("nin::mlpconv")
@as_dispatcher_kernel
def _mlpconv_fake(x: Tensor, chain: ChainArguments) -> Tensor:
    shape = chain.output_shape(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format_of(x))


@torch.library.register_fake("nin::mlpconv_backward")
@as_dispatcher_backward_kernel
def _mlpconv_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool]
) -> Gradients:
    return reference.empty_gradients(x, chain, needs)


# by device type: what the dispatcher would call below autograd
_kernels: dict[str, tuple[Callable[..., Tensor], Callable[..., Gradients]]] = {}


def register_backend(
    device_type: str, forward: Callable[..., Tensor], backward: Callable[..., Gradients], **options: bool
) -> None:
    """Register a device's kernels over the reference.

    Args:
        device_type: "cpu" or "cuda".
        forward: as `reference.mlpconv`.
        backward: as `reference.mlpconv_backward`.
        **options: of ``torch.library.Library.impl``.
    """
    library.impl("mlpconv", as_dispatcher_kernel(forward), device_type.upper(), **options)
    library.impl("mlpconv_backward", as_dispatcher_backward_kernel(backward), device_type.upper(), **options)
    _kernels[device_type] = forward, backward


def calls_directly(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Return whether a call may skip the dispatcher: nobody has to see it, and its device has kernels.

    The dispatcher turns every list into one of its own and back: 5 µs a call, and 12 in a backward pass.
    """
    return is_plain(tensors) and reaches_kernels(x, tensors)  # in this order, as the compiler follows the first


def reaches_kernels(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Return whether the dispatcher would call a device's kernels with these tensors, for which `is_plain` holds."""
    for t in tensors:  # those that the dispatcher would convert or refuse
        if t is not None and (t.layout is not torch.strided or t.is_neg() or not has_memory(t)):
            return False
    device_type = x.device.type
    return (
        device_type in _kernels
        and not torch.is_autocast_enabled(device_type)
        and not torch._C._autograd._profiler_enabled()
    )


def call_kernel(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *options: Any) -> Tensor:
    """Call the forward kernel of a device, where `calls_directly` allows it and no gradients are wanted."""
    with torch._C._AutoDispatchBelowAutograd():
        return _kernels[x.device.type][0](x, ChainArguments(weights, biases, *options))


def call_with_gradients(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *options: Any) -> Tensor:
    """Call the operator's autograd function, where `calls_directly` allows it and gradients are wanted."""
    y: Tensor = _MLPConvFunction.apply(options, len(weights), True, x, *weights, *biases)
    return y


class _MLPConvFunction(torch.autograd.Function):
    """Save the input; the backward operator recomputes the hidden layers.

    The output is saved if ReLU's derivative follows from it, and not else: it may be changed in place, as that of
    ``conv2d``.

    The parameters are separate arguments because autograd does not look into lists.
    """

    @staticmethod
    def forward(
        ctx: Any, options: tuple[Any, ...], count: int, direct: bool, x: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        arguments = x, parameters[:count], parameters[count:], *options
        if direct or calls_directly(x, (x, *parameters)):
            y = call_kernel(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y = torch.ops.nin.mlpconv.default(*arguments)
        ctx.options, ctx.count = options, count
        ctx.save_for_backward(x, y if options[-1][-1] == "relu" else None, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *parameters = ctx.saved_tensors
        if y is None:  # not read
            y = torch.empty_like(grads[0], memory_format=reference.memory_format_of(x))
        needs = ctx.needs_input_grad[3:]  # the first three are options, count and direct
        arguments = (grads[0], x, y, parameters[: ctx.count], parameters[ctx.count :], *ctx.options, needs)
        grad_x, grad_weights, grad_biases = _mlpconv_backward_autograd(*arguments)
        in_order = (grad_x, *grad_weights, *grad_biases)
        return None, None, None, *(g if needed else None for g, needed in zip(in_order, needs, strict=True))


_conv2d_chain = as_dispatcher_kernel(reference.conv2d_chain)


def _mlpconv_autograd(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *options: Any) -> Tensor:
    tensors = (x, *weights, *biases)
    if is_transformed() or overrides_dispatch(tensors):
        return _conv2d_chain(x, weights, biases, *options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = _MLPConvFunction.apply(options, len(weights), False, *tensors)
        return y
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.nin.mlpconv.default(x, weights, biases, *options)


def _mlpconv_backward_autograd(
    grad: Tensor, x: Tensor, y: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *rest: Any
) -> Gradients:
    # With create_graph=True, under a transform, or with is_grads_batched=True (PyTorch's older vmap): the reference
    # consists of differentiable operators, the kernels do not.
    create_graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (grad, x, *weights, *biases)
    )
    if create_graph or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad):
        return _reference_backward(grad, x, y, weights, biases, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        if calls_directly(x, (grad, x, y, *weights, *biases)):
            *options, needs = rest
            return _kernels[x.device.type][1](grad, x, y, ChainArguments(weights, biases, *options), needs)
        gradients: Gradients = torch.ops.nin.mlpconv_backward.default(grad, x, y, weights, biases, *rest)
    return gradients


library.impl("mlpconv", _mlpconv_autograd, "Autograd")
library.impl("mlpconv_backward", _mlpconv_backward_autograd, "Autograd")


def batched_kernel(operator: Any, fallback: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an operator's kernel under ``vmap``: it folds a batch of batches of images into one batch.

    Args:
        operator: takes images, weights, biases and what it likes.
        fallback: the same in PyTorch's own operators, for batched weights, which become grouped convolutions.
    """

    def kernel(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *options: Any) -> Tensor:
        level = torch._C._functorch.current_level()
        (images, *parameters), (dim, *dims) = unwrap_batched((x, *weights, *biases), level)
        if any(d is not None for d in dims):
            return fallback(x, weights, biases, *options)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)):
            arguments = parameters[: len(weights)], parameters[len(weights) :], *options
            if dim is None:
                unbatched: Tensor = operator(images, *arguments)
                return unbatched
            images = images.movedim(dim, 0)
            y = operator(images.flatten(0, 1), *arguments).unflatten(0, images.shape[:2])
        return torch._C._functorch._add_batch_dim(y, 0, level)

    return kernel


def autocast_kernel(operator: Any, device: str) -> Callable[..., Tensor]:
    """Return an operator's autocast kernel on a device type: it casts as PyTorch does for ``conv2d``."""

    def kernel(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *options: Any) -> Tensor:
        # torch.library.register_autocast does the same, but with a dtype that is fixed when it is registered
        tensors = cast_floats((x, weights, biases), device, torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y: Tensor = operator(*tensors, *options)
            return y

    return kernel


library.impl("mlpconv", batched_kernel(torch.ops.nin.mlpconv, _conv2d_chain), "FuncTorchBatched")
library.impl("mlpconv_backward", _reference_backward, "FuncTorchBatched")
library.impl("mlpconv", autocast_kernel(torch.ops.nin.mlpconv, "cpu"), "AutocastCPU")
library.impl("mlpconv", autocast_kernel(torch.ops.nin.mlpconv, "cuda"), "AutocastCUDA")


def chain_macs(y_shape: Sequence[int], weight_shapes: Sequence[Sequence[int]]) -> int:
    """Return the multiply-accumulates of a chain, whose layers all run at the output's resolution."""
    pixels = y_shape[0] * y_shape[2] * y_shape[3]
    return pixels * sum(w[0] * w[1] * w[2] * w[3] for w in weight_shapes)


@register_flop_formula(torch.ops.nin.mlpconv)
def _mlpconv_flop(x_shape: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count 2 FLOP for each multiply-accumulate and, like PyTorch's formulas, no biases and activations."""
    return 2 * chain_macs(out_shape, weights)


@register_flop_formula(torch.ops.nin.mlpconv_backward)
def _mlpconv_backward_flop(grad_shape: Any, x_shape: Any, y_shape: Any, weights: Any, *rest: Any, **__: Any) -> int:
    """Count the FLOP of the gradients, without the recomputation of hidden layers that saves memory."""
    needs, flops = rest[-1], 0
    for i, weight in enumerate(weights):
        # one product for the gradient of the weight, one for that of the layer's input
        flops += 2 * chain_macs(grad_shape, [weight]) * (int(needs[1 + i]) + int(needs_input_gradient(needs, i)))
    return flops
