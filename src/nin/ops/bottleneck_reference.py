"""The arguments of ``nin::inverted_bottleneck``, and its definition in plain PyTorch."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nin.ops.arguments import POINTWISE_GEOMETRY, ChainArguments, Geometry, output_size, resolve
from nin.ops.reference import activate, activation_backward, memory_format_of, to_memory_format
from nin.ops.transforms import is_transformed


class BottleneckArguments(NamedTuple):
    """An inverted bottleneck, in the operator's order: ``torch.ops.nin.inverted_bottleneck(x, *arguments)``.

    Attributes:
        weights: [(C_hidden, C_in, 1, 1),] (C_hidden, 1, kH, kW), [(C_squeezed, C_hidden, 1, 1),
            (C_hidden, C_squeezed, 1, 1),] (C_out, C_hidden, 1, 1); with ``norm_eps`` (C_in, 1, kH, kW),
            (C_hidden, C_in, 1, 1), (C_out, C_hidden, 1, 1).
        biases: as many as weights, each (C,) or None.
        stride: of the depthwise layer, (height, width), as the next two.
        padding: zeros around its input, in pixels.
        dilation: distance of its taps, in pixels.
        activations: as many as weights, each a name of `reference.BOTTLENECK_ACTIVATIONS`; of the second layer of
            squeeze-and-excitation one of `reference.GATES`.
        residual: whether the input is added to the result.
        norm_eps: of a LayerNorm over the channels behind the depthwise layer, which comes first then; None: none.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    activations: Sequence[str]
    residual: bool
    norm_eps: float | None = None

    @property
    def chain(self) -> ChainArguments:
        """The arguments without the residual."""
        return ChainArguments(*self[:6])

    # methods and no properties, which PyTorch 2.10's compiler does not read from a tuple
    def depthwise(self) -> int:
        """Return the place of the depthwise layer."""
        return 1 if len(self.weights) in (3, 5) and self.norm_eps is None else 0

    def squeezes(self) -> bool:
        """Return whether the next two layers scale the depthwise layer's channels (squeeze-and-excitation)."""
        return len(self.weights) >= 4

    def layers(self) -> list[tuple[Tensor, Tensor | None, Geometry, int, str]]:
        """Return weight, bias, geometry, groups and activation of each layer."""
        depthwise = self.depthwise()
        geometry: Geometry = (self.stride, self.padding, self.dilation)
        return [
            (w, b, geometry if i == depthwise else POINTWISE_GEOMETRY, w.shape[0] if i == depthwise else 1, a)
            for i, (w, b, a) in enumerate(zip(self.weights, self.biases, self.activations, strict=True))
        ]

    def output_shape(self, x: Tensor) -> tuple[Any, ...]:
        """Return (N, C_out, H', W') for an input (N, C_in, H, W), whose sizes may be symbolic."""
        kernel_size = self.weights[self.depthwise()].shape[2:]
        sides = (output_size(x.shape[2 + d], kernel_size[d], *(g[d] for g in self[2:5])) for d in range(2))
        return (x.shape[0], self.weights[-1].shape[0], *sides)


def as_dispatcher_kernel(kernel: Callable[[Tensor, BottleneckArguments], Tensor]) -> Callable[..., Tensor]:
    """Return ``kernel(x, arguments)`` with the operator's signature."""
    return lambda x, weights, biases, *options: kernel(x, BottleneckArguments(weights, resolve(biases), *options))


def inverted_bottleneck(x: Tensor, arguments: BottleneckArguments) -> Tensor:
    """Compute the block layer by layer, with the result in the memory format of ``x``."""
    layout = memory_format_of(x)
    return to_memory_format(conv2d_layers(x.contiguous(memory_format=layout), arguments), layout)


def conv2d_layers(x: Tensor, arguments: BottleneckArguments) -> Tensor:
    """Compute the block with PyTorch's operators, which choose the output's memory format."""
    y, scaled, depthwise = x, None, arguments.depthwise()
    for i, (weight, bias, geometry, groups, activation) in enumerate(arguments.layers()):
        if arguments.squeezes() and i == depthwise + 1:
            scaled, y = y, y.mean((2, 3), keepdim=True)
        if arguments.norm_eps is not None and i == depthwise + 1:
            y = normalize(y, arguments.norm_eps)
        y = activate(F.conv2d(y, weight, bias, *geometry, groups), activation)
        if scaled is not None and i == depthwise + 2:
            y = scaled * y
    return y + x if arguments.residual else y


def normalize(x: Tensor, eps: float) -> Tensor:
    """Return LayerNorm over the channels of each pixel, without weight and bias: (N, C, H, W)."""
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=eps).permute(0, 3, 1, 2)


def _normalize_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return the gradient of the input of `normalize`."""
    last, shape = x.permute(0, 2, 3, 1), (x.shape[1],)
    _, mean, factor = torch.native_layer_norm(last, shape, None, None, eps)
    arguments = grad.permute(0, 2, 3, 1), last, shape, mean, factor, None, None, (True, False, False)
    grad_x: Tensor = torch.ops.aten.native_layer_norm_backward(*arguments)[0]
    return grad_x.permute(0, 3, 1, 2)


def backward(
    grad: Tensor, x: Tensor, arguments: BottleneckArguments, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``x``, of each weight and of each bias; None where not needed.

    The hidden tensors are computed again from ``x``. Each step is one of PyTorch's differentiable operators.

    Args:
        grad: gradient of the output, (N, C_out, H', W').
        x: input of the forward pass, (N, C_in, H, W).
        arguments: of the forward pass.
        needs: which gradients are needed: the input's, then each weight's, then each bias's.
    """
    layers, count = arguments.layers(), len(arguments.weights)
    depthwise, eps = arguments.depthwise(), arguments.norm_eps
    squeeze = depthwise + 1 if arguments.squeezes() else None
    # vmap cannot set a memory format
    plain = not (is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad))
    layout = memory_format_of(x) if plain else None
    h = x if layout is None else x.contiguous(memory_format=layout)
    inputs, sums = [], []
    scaled = factors = h  # the depthwise layer's result, which is normalized or scaled, and what scales it
    for i, (weight, bias, geometry, groups, activation) in enumerate(layers):
        if i == squeeze:
            scaled, h = h, h.mean((2, 3), keepdim=True)
        if eps is not None and i == depthwise + 1:
            scaled, h = h, normalize(h, eps)
        inputs.append(h)
        is_last = i + 1 == count
        sums.append(h if is_last and activation == "none" else F.conv2d(h, weight, bias, *geometry, groups))
        if not is_last:
            h = activate(sums[i], activation)
        if squeeze is not None and i == squeeze + 1:
            factors, h = h, scaled * h
    grads: list[Tensor | None] = [None] * len(needs)
    g = grad
    direct = g  # the gradient of the depthwise layer's result that does not come through its mean
    for i, (weight, bias, geometry, groups, activation) in reversed([*enumerate(layers)]):
        if squeeze is not None and i == squeeze + 1:
            direct, g = g * factors, (g * scaled).sum((2, 3), keepdim=True)
        g = activation_backward(g, sums[i], activation)
        need_weight, need_bias = needs[1 + i], needs[1 + count + i] and bias is not None
        # if no earlier layer needs a gradient, the backward pass ends here
        go_on = needs[0] or any(needs[1 : 1 + i]) or any(needs[1 + count : 1 + count + i])
        sizes = None if bias is None else bias.shape
        mask = [go_on, need_weight, need_bias]
        before, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            g, inputs[i], weight, sizes, *geometry, False, (0, 0), groups, mask
        )
        if need_weight:
            grads[1 + i] = grad_weight.contiguous()  # PyTorch's may be channels_last, as the input is
        if need_bias:
            grads[1 + count + i] = grad_bias
        if not go_on:
            break
        g = before
        if i == squeeze:
            g = direct + g / math.prod(direct.shape[2:])
        if eps is not None and i == depthwise + 1:
            g = _normalize_backward(g, scaled, eps)
    if needs[0]:
        g = g + grad if arguments.residual else g
        grads[0] = g if layout is None else to_memory_format(g, layout)
    return tuple(grads)
