"""``nin.mlpconv``, ``nin.conv1x1`` and ``nin.inverted_bottleneck``: several convolutions as one operator."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nin.ops import schema
from nin.ops.arguments import ChainArguments
from nin.ops.bottleneck import inverted_bottleneck
from nin.ops.checks import Pair, check_images, check_like, check_reach, no_list, pair, want_gradients
from nin.ops.cpu import call_cache
from nin.ops.cpu import dispatch as cpu_dispatch
from nin.ops.cpu.weight_cache import freeze, take_back_constants
from nin.ops.gpu import dispatch as gpu_dispatch
from nin.ops.reference import ACTIVATIONS, conv2d_chain
from nin.ops.transforms import is_jit_traced, is_plain, is_wrapped, overrides_dispatch

__all__ = ["ACTIVATIONS", "backends", "conv1x1", "freeze", "inverted_bottleneck", "mlpconv"]


def conv1x1(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: Pair = 1, activation: str | None = None
) -> Tensor:
    """Apply a 1×1 convolution: one fully connected layer at every pixel.

    ``y[n, o, i, j] = activation(sum_c weight[o, c, 0, 0] * x[n, c, i * stride, j * stride] + bias[o])``

    Args:
        x: images, (N, C_in, H, W), any floating dtype of 16 bits or more, NCHW or channels_last.
        weight: filters, (C_out, C_in, 1, 1), of the dtype of ``x``.
        bias: (C_out,), or None.
        stride: one number, or (height, width).
        activation: "none" (or None), "relu", "gelu" (exact) or "silu".

    Returns:
        (N, C_out, ceil(H / stride), ceil(W / stride)), in the memory format of ``x``.

    Raises:
        ValueError: a shape, dtype or activation does not fit; the message says what was expected and got.
        TypeError: an argument is not a tensor.

    Source:
        Lin, Chen, Yan: Network in Network, 2013, arXiv 1312.4400, section 3.1 (equation 2).

    Example:
        >>> x = torch.arange(36.0).reshape(1, 1, 6, 6)
        >>> bool((nin.conv1x1(x, torch.full((1, 1, 1, 1), 2.0)) == 2 * x).all())
        True
    """
    is_matrix = not isinstance(weight, Tensor) or weight.dim() != 4 or is_jit_traced()
    if not is_matrix and weight.shape[2:] != (1, 1):
        raise ValueError(
            f"weight must have shape (C_out, C_in, 1, 1), got {tuple(weight.shape)}: use nin.mlpconv for k×k"
        )
    return mlpconv(x, (weight,), (bias,), stride=stride, activation=activation)


def mlpconv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    activation: str | Sequence[str | None] | None = "relu",
) -> Tensor:
    """Apply a mlpconv layer: a k×k convolution, then 1×1 convolutions, an activation after each.

    ``h_1 = a_1(W_1 ∗ x + b_1)``, ``h_l = a_l(W_l h_{l-1} + b_l)`` at every pixel; the result is the last ``h``.

    On the CPU, in float32 and bfloat16, a k×k convolution may be computed with Winograd's transforms: faster, and
    accurate to five digits instead of six. The environment variable ``NIN_CPU_WINOGRAD=0`` turns that off.

    Args:
        x: images, (N, C_in, H, W), any floating dtype of 16 bits or more, NCHW or channels_last.
        weights: the first of shape (C_1, C_in, kH, kW), the others (C_l, C_{l-1}, 1, 1), of the dtype of ``x``.
        biases: as many as weights, each (C_l,) or None.
        stride: of the first convolution; one number, or (height, width), as the next two.
        padding: zeros around the image, in pixels.
        dilation: distance of the first convolution's taps, in pixels.
        activation: "none" (or None), "relu", "gelu" (exact) or "silu": one for all layers, or one per layer.

    Returns:
        (N, C_last, H', W') with ``H' = floor((H + 2 padding - dilation (kH - 1) - 1) / stride) + 1``,
        in the memory format of ``x``.

    Raises:
        ValueError: a shape, dtype or activation does not fit; the message says what was expected and got.
        TypeError: an argument is not a tensor.

    Source:
        Lin, Chen, Yan: Network in Network, 2013, arXiv 1312.4400, section 3.1 (equation 2).

    Example:
        >>> x = torch.randn(2, 3, 32, 32)
        >>> weights = torch.randn(192, 3, 5, 5), torch.randn(160, 192, 1, 1), torch.randn(96, 160, 1, 1)
        >>> nin.mlpconv(x, weights, (None, None, None), padding=2).shape
        torch.Size([2, 96, 32, 32])
    """
    try:
        weights, biases = list(weights), list(biases)
    except TypeError as error:
        raise no_list(weights=weights, biases=biases) from error
    activations = _activations(activation, len(weights))
    stride, padding, dilation = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    chain = ChainArguments(weights, biases, stride, padding, dilation, activations)
    if is_jit_traced():
        # Of torch.jit.trace: its graph has no word for the operator's list of optional biases, and would keep the sizes
        # that the checks look at as constants. PyTorch's operators check for themselves.
        return conv2d_chain(x, chain)
    tensors = (x, *weights, *biases)
    plain, key = is_plain(tensors), None
    if plain and not want_gradients(tensors):
        key = cpu_dispatch.call_key(x, chain)
        if key is not None and (y := call_cache.repeat(key, x, chain)) is not None:
            return y
    _check_tensors(x, weights, biases)
    if plain or not torch.compiler.is_compiling():
        take_back_constants(weights)  # here, as autocast and transforms give the kernels other tensors
    kernel_size = weights[0].shape[2:]
    check_reach(x, kernel_size, padding, dilation)
    op: Callable[..., Tensor] = torch.ops.nin.mlpconv.default  # without .default, each call would look for the overload
    if key is not None:
        with torch._C._AutoDispatchBelowAutograd():
            return cpu_dispatch.mlpconv(x, chain, key)
    trains = want_gradients(tensors)
    if plain and schema.reaches_kernels(x, tensors):
        op = schema.call_with_gradients if trains else schema.call_kernel
    elif plain and any(map(is_wrapped, tensors)):  # of a transform that has ended, or of PyTorch's older vmap
        return conv2d_chain(x, chain)
    elif not trains and plain:
        # the autograd level would only pass the call on: 24.1 → 19.1 µs for a call on 7×7 pixels (docs/kernels.md)
        with torch._C._AutoDispatchBelowAutograd():
            return op(x, weights, biases, stride, padding, dilation, activations)
    elif not torch.compiler.is_compiling() and overrides_dispatch(tensors):
        return conv2d_chain(x, chain)
    if trains and len(weights) > 1 and kernel_size != (1, 1):
        # The backward pass recomputes hidden layers. That is cheap in a 1×1 chain and expensive for a k×k convolution,
        # so in training the k×k layer is a call of its own, which saves its output. The values are the same.
        x = op(x, weights[:1], biases[:1], stride, padding, dilation, activations[:1])
        return op(x, weights[1:], biases[1:], (1, 1), (0, 0), (1, 1), activations[1:])
    return op(x, weights, biases, stride, padding, dilation, activations)


def backends() -> dict[str, str]:
    """Return the backend of ``nin::mlpconv`` on each device type, and the reason if it is the reference.

    Example:
        >>> sorted(nin.backends())
        ['cpu', 'cuda']
    """
    return {"cpu": cpu_dispatch.backend_summary(), "cuda": gpu_dispatch.backend_summary()}


def check_activation(name: str) -> None:
    """Raise ValueError unless ``name`` is one of `ACTIVATIONS`."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")


def _activations(activation: str | Sequence[str | None] | None, count: int) -> list[str]:
    if activation is None or isinstance(activation, str):
        name = "none" if activation is None else activation
        check_activation(name)
        return [name] * count
    if not isinstance(activation, list | tuple):
        raise ValueError(f"activation must be a name, or one for each of the {count} layers, got {activation!r}")
    names = ["none" if name is None else name for name in activation]
    if len(names) != count:
        raise ValueError(f"activation must be one name or one for each of the {count} layers, got {len(names)}")
    for name in names:
        check_activation(name)
    return names


def _check_tensors(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> None:
    """Raise unless the shapes, dtypes and devices of a chain match."""
    check_images(x)
    dtype, device = x.dtype, x.device
    if not weights or len(weights) != len(biases):
        raise ValueError(f"weights and biases must be as many, and at least one, got {len(weights)} and {len(biases)}")
    channels = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if not isinstance(weight, Tensor) or weight.is_nested or weight.dtype != dtype or weight.device != device:
            check_like(_name("weight", i, weights), weight, x)
        shape = weight.shape
        fits = len(shape) == 4 and shape[1] == channels and (i == 0 or shape[2:] == (1, 1))
        if not fits or 0 in shape:
            wanted = f"(C_out, {channels}, {'kH, kW' if i == 0 else '1, 1'})"
            before = "the input has" if i == 0 else "the layer before gives"
            which = _name("weight", i, weights)
            raise ValueError(f"{which} must have shape {wanted}, got {tuple(shape)}: {before} {channels} channels")
        channels = shape[0]
        if bias is not None:
            if not isinstance(bias, Tensor) or bias.is_nested or bias.dtype != dtype or bias.device != device:
                check_like(_name("bias", i, weights), bias, x)
            if bias.shape != (channels,):
                which = _name("bias", i, weights)
                raise ValueError(f"{which} must have shape ({channels},), got {tuple(bias.shape)}")


def _name(kind: str, layer: int, weights: list[Tensor]) -> str:
    return kind if len(weights) == 1 else f"{kind} {layer}"
