"""The plain PyTorch kernels of ``nin::mlpconv``: the definition, the fallback, the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nin.ops.arguments import POINTWISE_GEOMETRY, ChainArguments, Gradients

ACTIVATIONS = ("none", "relu", "gelu", "silu")


def activate(z: Tensor, activation: str) -> Tensor:
    """Return ``activation(z)``; the GELU is the exact one (with erf)."""
    match activation:
        case "relu":
            return F.relu(z)
        case "gelu":
            return F.gelu(z)
        case "silu":
            return F.silu(z)
        case _:
            return z


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the layout of the result for an input ``x``: channels_last where its channels lie side by side.

    PyTorch's own rule looks at the weights too and is undecided for one channel; this one depends on ``x``
    alone, so the fake kernel and every backend agree.
    """
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def to_memory_format(t: Tensor, layout: torch.memory_format) -> Tensor:
    """Return ``t`` in that layout, in the strides that `memory_format_of` recognises, one channel included."""
    t = t.contiguous(memory_format=layout)
    # the strides of one channel count as either layout for contiguous(), not for to()
    return t if memory_format_of(t) == layout else t.to(memory_format=layout)


def mlpconv(x: Tensor, layers: ChainArguments) -> Tensor:
    """Compute the chain layer by layer, as ``torch.nn.functional.conv2d`` would."""
    layout = memory_format_of(x)
    return to_memory_format(conv2d_chain(x.contiguous(memory_format=layout), layers), layout)


def conv2d_chain(x: Tensor, layers: ChainArguments) -> Tensor:
    """Compute the chain by PyTorch's operators alone, which choose the layout of the result."""
    weights, biases, stride, padding, dilation, activations = layers
    for i, (weight, bias, activation) in enumerate(zip(weights, biases, activations, strict=True)):
        x = F.conv2d(x, weight, bias, stride, padding, dilation) if i == 0 else F.conv2d(x, weight, bias)
        x = activate(x, activation)
    return x


def mlpconv_backward(grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, needs: Sequence[bool]) -> Gradients:
    """Return the gradients of ``x``, of each weight and of each bias.

    The hidden layers are computed again from ``x``; ``y``, the result of the forward pass, spares the last
    one where its activation can be undone from it (none, ReLU).

    Args:
        grad: gradient of the result, (N, C_out, H', W').
        x: input of the forward pass, (N, C_in, H, W).
        y: result of the forward pass, (N, C_out, H', W').
        needs: which gradients are wanted: the input's, then each weight's, then each bias's. The others come
            back empty (shape ``(0,)``).
    """
    weights, biases, count = layers.weights, layers.biases, len(layers.weights)
    geometry = [(layers.stride, layers.padding, layers.dilation), *[POINTWISE_GEOMETRY] * (count - 1)]
    inputs, before = _forward_again(x, y, layers, geometry)
    grad_weights = [x.new_empty(0)] * count
    grad_biases = [x.new_empty(0)] * count
    g = grad
    for i in reversed(range(count)):
        g = activation_backward(g, before[i], layers.activations[i])
        bias = biases[i]
        go_on = any(needs[1 : 1 + i]) or any(needs[1 + count : 1 + count + i]) or needs[0]
        need_weight, need_bias = needs[1 + i], needs[1 + count + i] and bias is not None
        # the layers before may need nothing: then no gradient travels further down
        mask = [go_on, need_weight, need_bias]
        grad_x, grad_w, grad_b = torch.ops.aten.convolution_backward(
            g, inputs[i], weights[i], None if bias is None else bias.shape, *geometry[i], False, (0, 0), 1, mask
        )
        if need_weight:
            grad_weights[i] = grad_w.contiguous()
        if need_bias:
            grad_biases[i] = grad_b
        if not go_on:
            break
        g = grad_x
    grad_input = to_memory_format(g, memory_format_of(x)) if needs[0] else x.new_empty(0)
    return grad_input, grad_weights, grad_biases


def _forward_again(
    x: Tensor, y: Tensor, layers: ChainArguments, geometry: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each layer's input and what its activation's derivative is taken from (see the next function)."""
    inputs, before = [x.contiguous(memory_format=memory_format_of(x))], []
    activations, last = layers.activations, len(layers.weights) - 1
    for i, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
        if i == last and activations[i] in ("none", "relu"):
            before.append(y)
            break
        z = F.conv2d(inputs[i], weight, bias, *geometry[i])
        before.append(z)
        if i < last:
            inputs.append(activate(z, activations[i]))
    return inputs, before


def activation_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """Return the gradient before the activation; for ReLU, ``z`` may be its result as well as its argument."""
    match activation:
        case "relu":
            return torch.ops.aten.threshold_backward(grad, z, 0)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, z)
        case "silu" if torch.is_grad_enabled():
            # aten's kernel has no derivative of its own; this is the same from differentiable parts
            gate = torch.sigmoid(z)
            return grad * gate * (1 + z * (1 - gate))
        case "silu":
            return torch.ops.aten.silu_backward(grad, z)
        case _:
            return grad
