"""The arguments of ``nin::mlpconv``, a chain of convolutions as one value, and adapters for PyTorch's dispatcher."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# of the input, of each weight and of each bias; shape (0,) where not needed
Gradients = tuple[Tensor, list[Tensor], list[Tensor]]
# stride, padding and dilation
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int]]

POINTWISE_GEOMETRY: Geometry = ((1, 1), (0, 0), (1, 1))  # of the 1×1 layers after the first


class ChainArguments(NamedTuple):
    """A chain of convolutions, in the operator's order: ``torch.ops.nin.mlpconv(x, *chain)``.

    Attributes:
        weights: the first of shape (C_1, C_in, kH, kW), the others (C_l, C_{l-1}, 1, 1).
        biases: as many as weights, each (C_l,) or None.
        stride: of the first layer, (height, width), as the next two; the others have `POINTWISE_GEOMETRY`.
        padding: zeros around the image, in pixels.
        dilation: distance of the first layer's taps, in pixels.
        activations: as many as weights, each a name of `reference.ACTIVATIONS`.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    activations: Sequence[str]

    @property
    def geometry(self) -> Geometry:
        """Stride, padding and dilation of the first layer."""
        return self.stride, self.padding, self.dilation

    def subchain(self, first: int, count: int) -> "ChainArguments":
        """Return ``count`` layers, starting with layer ``first``."""
        which = slice(first, first + count)
        geometry = self.geometry if first == 0 else POINTWISE_GEOMETRY
        return ChainArguments(self.weights[which], self.biases[which], *geometry, self.activations[which])

    def with_parameters(self, parameters: Sequence[Any]) -> "ChainArguments":
        """Return the chain with other parameters: its weights, then its biases."""
        count = len(self.weights)
        return self._replace(weights=list(parameters[:count]), biases=list(parameters[count:]))

    def is_pointwise(self) -> bool:
        """Return whether the first layer is 1×1 without padding, so that an output pixel depends on one input pixel."""
        return tuple(self.weights[0].shape[2:]) == (1, 1) and tuple(self.padding) == (0, 0)

    def output_shape(self, x: Tensor) -> tuple[Any, ...]:
        """Return (N, C_last, H', W') for an input (N, C_in, H, W), whose sizes may be symbolic."""
        weights, _, stride, padding, dilation, _ = self
        images, _, height, width = x.shape
        kernel_height, kernel_width = weights[0].shape[2:]
        height = output_size(height, kernel_height, stride[0], padding[0], dilation[0])
        width = output_size(width, kernel_width, stride[1], padding[1], dilation[1])
        return images, weights[-1].shape[0], height, width


def needs_input_gradient(needs: Sequence[bool], layer: int) -> bool:
    """Return whether the backward pass goes on to a layer's input: something before the layer needs a gradient.

    Args:
        needs: whether the chain's input needs a gradient, then each weight, then each bias.
        layer: its index.
    """
    count = len(needs) // 2
    return needs[0] or any(needs[1 : 1 + layer]) or any(needs[1 + count : 1 + count + layer])


def output_size(size: Any, kernel: int, stride: int, padding: int, dilation: int) -> Any:
    """Return the height or width of a convolution's output; ``size`` may be symbolic."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def as_dispatcher_kernel(kernel: Callable[[Tensor, ChainArguments], Tensor]) -> Callable[..., Tensor]:
    """Return ``kernel(x, chain)`` with the operator's signature: the chain's fields as separate arguments."""
    return lambda x, weights, biases, *options: kernel(x, ChainArguments(weights, resolve(biases), *options))


def as_dispatcher_backward_kernel(
    kernel: Callable[[Tensor, Tensor, Tensor, ChainArguments, Sequence[bool]], Gradients],
) -> Callable[..., Gradients]:
    """Return ``kernel(grad, x, y, chain, needs)`` with the operator's signature, as `as_dispatcher_kernel` does."""
    return lambda grad, x, y, weights, biases, *rest: kernel(
        grad, x, y, ChainArguments(weights, resolve(biases), *rest[:-1]), rest[-1]
    )


def resolve(biases: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return biases whose values lie in memory, where they are negated views or PyTorch's tensors of zeros.

    PyTorch's fallbacks do that for tensors and lists of them, and not for lists that may hold None.
    """
    resolved = [b if b is None or not b._is_zerotensor() else b.new_zeros(b.shape) for b in biases]
    return [b if b is None else b.resolve_neg() for b in resolved]
