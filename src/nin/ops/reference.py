"""The reference kernels of ``nin::mlpconv`` in plain PyTorch: its definition, its fallback and the tests' oracle."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nin.ops.arguments import POINTWISE_GEOMETRY, ChainArguments, Geometry, Gradients, needs_input_gradient
from nin.ops.transforms import is_transformed

# GELU is the exact one, with erf. The order is that of the compiled library's activation codes (csrc/c_api.hpp), which
# goes on with those of inverted bottlenecks.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
BOTTLENECK_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}
# of the factors of squeeze-and-excitation
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of the output for an input ``x``: that of PyTorch's ``conv2d`` with contiguous weights.

    ``conv2d`` looks at the weights too. This rule looks at x alone, so that the fake kernel and every backend agree.
    """
    # PyTorch's is_channels_last_strides_2d: the strides increase from channels to columns, rows and images, and tell
    # something where there is one channel or one pixel
    (_, channels, height, width), (image, channel, row, column) = x.shape, x.stride()
    increase = channel > 0 and channel * channels <= column and column * width <= row and row * height <= image
    is_channels_last = increase and row * height != channel and x.numel() > 0
    return torch.channels_last if is_channels_last else torch.contiguous_format


def to_memory_format(t: Tensor, layout: torch.memory_format) -> Tensor:
    """Return ``t`` in a memory format, with strides that `memory_format_of` recognises, even with one channel."""
    t = t.contiguous(memory_format=layout)
    # contiguous() accepts a tensor of one channel as either format and leaves its strides; to() normalises them
    return t if memory_format_of(t) == layout else t.to(memory_format=layout)


def mlpconv(x: Tensor, chain: ChainArguments) -> Tensor:
    """Compute the chain layer by layer with ``torch.nn.functional.conv2d``."""
    # a view's strides may fit neither format, and conv2d then chooses by the weights
    layout = memory_format_of(x)
    return to_memory_format(conv2d_chain(x.contiguous(memory_format=layout), chain), layout)


def conv2d_chain(x: Tensor, chain: ChainArguments) -> Tensor:
    """Compute the chain with PyTorch's operators, which choose the output's memory format."""
    weights, biases, stride, padding, dilation, activations = chain
    for i, (weight, bias, activation) in enumerate(zip(weights, biases, activations, strict=True)):
        x = F.conv2d(x, weight, bias, stride, padding, dilation) if i == 0 else F.conv2d(x, weight, bias)
        x = activate(x, activation)
    return x


def activate(z: Tensor, activation: str) -> Tensor:
    """Apply an activation or gate by its name, with PyTorch's derivatives of every order and mode."""
    if activation == "none":
        return z
    if activation == "silu" and is_transformed():
        return z * torch.sigmoid(z)  # PyTorch has no forward-mode derivative of silu's gradient; of these it has
    if activation == "hardsigmoid" and is_transformed():
        return F.relu6(z + 3) / 6  # its second derivative is missing too
    return (GATES.get(activation) or BOTTLENECK_ACTIVATIONS[activation])(z)


def mlpconv_backward(grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool]) -> Gradients:
    """Return the gradients of ``x``, of each weight and of each bias.

    The hidden layers are recomputed from ``x``. The last layer is not if its activation's derivative follows from
    ``y`` (none, ReLU).

    Args:
        grad: gradient of the output, (N, C_out, H', W').
        x: input of the forward pass, (N, C_in, H, W).
        y: output of the forward pass, (N, C_out, H', W').
        chain: the arguments of the forward pass.
        needs: which gradients are needed: the input's, then each weight's, then each bias's. The others are
            empty (shape ``(0,)``).
    """
    weights, biases, count = chain.weights, chain.biases, len(chain.weights)
    # vmap cannot set a memory format
    layout = None if is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad) else memory_format_of(x)
    if layout is not None:
        x = x.contiguous(memory_format=layout)
    geometry = [chain.geometry, *[POINTWISE_GEOMETRY] * (count - 1)]
    inputs, saved = _recompute_forward(x, y, chain, geometry)
    grad_weights = [x.new_empty(0)] * count
    grad_biases = [x.new_empty(0)] * count
    g = grad
    for i in reversed(range(count)):
        g = activation_backward(g, saved[i], chain.activations[i])
        bias = biases[i]
        # if no earlier layer needs a gradient, the backward pass ends here
        go_on = needs_input_gradient(needs, i)
        need_weight, need_bias = needs[1 + i], needs[1 + count + i] and bias is not None
        mask = [go_on, need_weight, need_bias]
        grad_x, grad_w, grad_b = torch.ops.aten.convolution_backward(
            g, inputs[i], weights[i], None if bias is None else bias.shape, *geometry[i], False, (0, 0), 1, mask
        )
        if need_weight:
            grad_weights[i] = grad_w.contiguous()  # PyTorch's may be channels_last, as the input is
        if need_bias:
            grad_biases[i] = grad_b
        if not go_on:
            break
        g = grad_x
    if not needs[0]:
        g = x.new_empty(0)
    elif layout is not None:
        g = to_memory_format(g, layout)
    return g, grad_weights, grad_biases


def empty_gradients(x: Tensor, chain: ChainArguments, needs: Sequence[bool]) -> Gradients:
    """Return uninitialised gradients, the input's in the memory format of ``x``; shape ``(0,)`` where not needed."""
    layout = memory_format_of(x)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if needs[0] else x.new_empty(0)
    parameters, count = (*chain.weights, *chain.biases), len(chain.weights)
    grads = [
        x.new_empty(p.shape if p is not None and needed else 0) for p, needed in zip(parameters, needs[1:], strict=True)
    ]
    return grad_x, grads[:count], grads[count:]


def _recompute_forward(
    x: Tensor, y: Tensor, chain: ChainArguments, geometry: Sequence[Geometry]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each layer's input, and the tensor that `activation_backward` takes for its activation."""
    inputs, saved = [x], []
    activations, last = chain.activations, len(chain.weights) - 1
    for i, (weight, bias) in enumerate(zip(chain.weights, chain.biases, strict=True)):
        if i == last and activations[i] in ("none", "relu"):
            saved.append(y)
            break
        saved.append(F.conv2d(inputs[i], weight, bias, *geometry[i]))
        if i < last:
            inputs.append(ACTIVATIONS[activations[i]](saved[i]))
    return inputs, saved


def activation_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """Return the gradient of the pre-activation ``z``; for ReLU, ``z`` may also be its output."""
    match activation:
        case "relu":
            return torch.ops.aten.threshold_backward(grad, z, 0)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, z)
        case "silu" if torch.is_grad_enabled() or is_transformed():
            # aten's silu_backward is not differentiable, which create_graph=True needs; these operators are
            gate = torch.sigmoid(z)
            return grad * gate * (1 + z * (1 - gate))
        case "silu":
            return torch.ops.aten.silu_backward(grad, z)
        case "relu6":
            return torch.ops.aten.hardtanh_backward(grad, z, 0, 6)
        case "hardswish":
            return torch.ops.aten.hardswish_backward(grad, z)
        case "hardsigmoid":
            # aten's hardsigmoid_backward is not differentiable; this is, and has the same values
            return torch.ops.aten.hardtanh_backward(grad, z, -3, 3) / 6
        case "sigmoid":
            return torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(z))
        case _:
            return grad
