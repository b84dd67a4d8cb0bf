"""``nin.inverted_bottleneck``: 1×1 layers around, or behind, a depthwise k×k convolution, as one operator."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nin.ops import bottleneck_schema, schema
from nin.ops.bottleneck_reference import BottleneckArguments, conv2d_layers
from nin.ops.checks import Pair, check_images, check_like, check_reach, no_list, pair, want_gradients
from nin.ops.cpu import bottleneck as cpu_bottleneck
from nin.ops.cpu import call_cache
from nin.ops.cpu.weight_cache import take_back_constants
from nin.ops.reference import BOTTLENECK_ACTIVATIONS, GATES
from nin.ops.transforms import is_jit_traced, is_plain, is_wrapped, overrides_dispatch

assert bottleneck_schema  # registers the operator


def inverted_bottleneck(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    activation: str | Sequence[str | None] | None = "relu6",
    residual: bool = False,
    norm_eps: float | None = None,
) -> Tensor:
    """Apply an inverted bottleneck: a 1×1 convolution up, a depthwise k×k convolution, a 1×1 convolution down.

    ``h = a_1(W_1 x + b_1)``, ``d = a_2(W_2 ⊛ h + b_2)``, ``y = a_3(W_3 d + b_3) [+ x]``, where ⊛ convolves each channel
    with a filter of its own. With two weights the first layer is missing and ``h = x``: a depthwise separable
    convolution. With two weights more, U and V, squeeze-and-excitation scales the channels of ``d``: W_3 gets
    ``d ⊙ gate(V a(U mean(d) + u) + v)``, with the mean over the pixels of an image.

    With ``norm_eps`` it is ConvNeXt's block, whose depthwise convolution comes first:
    ``d = a_1(W_1 ⊛ x + b_1)``, ``h = a_2(W_2 n + b_2)`` with ``n = (d - mean(d)) / √(var(d) + norm_eps)``, mean and
    variance over the channels of a pixel, and ``y = a_3(W_3 h + b_3) [+ x]``.

    On the CPU in float32 and bfloat16, in inference and in the forward pass of training, the hidden tensors ``h`` and
    ``d``, up to six times as wide as ``x``, never leave the cache. The backward pass computes them again, by PyTorch's
    own operators. In bfloat16 they are sums in float32, of which those that a processor multiplies in pairs of bfloat16
    are rounded before: the largest error is about one percent of the largest value.

    Args:
        x: images, (N, C_in, H, W), any floating dtype of 16 bits or more, NCHW or channels_last.
        weights: [(C_hidden, C_in, 1, 1),] (C_hidden, 1, kH, kW), [(C_squeezed, C_hidden, 1, 1),
            (C_hidden, C_squeezed, 1, 1),] (C_out, C_hidden, 1, 1), of the dtype of ``x``: two to five. With
            ``norm_eps`` three: (C_in, 1, kH, kW), (C_hidden, C_in, 1, 1), (C_out, C_hidden, 1, 1).
        biases: as many as weights, each (C,) or None. BatchNorm is folded into both beforehand; so is LayerNorm's
            weight into those of the layer behind it, and layer scale into the last.
        stride: of the depthwise convolution; one number, or (height, width), as the next two.
        padding: zeros around its input ``h``, in pixels.
        dilation: distance of its taps, in pixels.
        activation: "none" (or None), "relu", "relu6", "hardswish", "gelu" (exact) or "silu": one for all layers but
            the last, which then has none (a linear bottleneck), or one per layer. Of squeeze-and-excitation's two
            layers the second has "sigmoid" or "hardsigmoid"; where one name is given, they have "relu" and "sigmoid".
            With ``norm_eps`` one name is for the layer behind the norm.
        residual: whether to add ``x``, where the result has its shape.
        norm_eps: what LayerNorm, without a weight and bias of its own, adds to the variance; None: no norm.

    Returns:
        (N, C_out, H', W') with ``H' = floor((H + 2 padding - dilation (kH - 1) - 1) / stride) + 1``,
        in the memory format of ``x``.

    Raises:
        ValueError: a shape, dtype or activation does not fit; the message says what was expected and got.
        TypeError: an argument is not a tensor.

    Source:
        Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018,
        arXiv 1801.04381, section 3.3. Hu, Shen, Albanie, Sun, Wu: Squeeze-and-Excitation Networks, 2017,
        arXiv 1709.01507, section 3. Liu, Mao, Wu, Feichtenhofer, Darrell, Xie: A ConvNet for the 2020s, 2022,
        arXiv 2201.03545, section 2.6.

    Example:
        >>> x = torch.randn(2, 24, 56, 56)
        >>> weights = torch.randn(144, 24, 1, 1), torch.randn(144, 1, 3, 3), torch.randn(24, 144, 1, 1)
        >>> nin.inverted_bottleneck(x, weights, (None, None, None), padding=1, residual=True).shape
        torch.Size([2, 24, 56, 56])
    """
    try:
        weights, biases = list(weights), list(biases)
    except TypeError as error:
        raise no_list(weights=weights, biases=biases) from error
    if not 2 <= len(weights) <= 5 or len(biases) != len(weights):
        raise ValueError(f"weights and biases must be two to five each, got {len(weights)} and {len(biases)}")
    geometry = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    if norm_eps is not None:
        norm_eps = _epsilon(norm_eps, len(weights))
    activations = _activations(activation, len(weights), normalizes=norm_eps is not None)
    if not isinstance(residual, bool):
        raise ValueError(f"residual must be True or False, got {residual!r}")
    arguments = BottleneckArguments(weights, biases, *geometry, activations, residual, norm_eps)
    if is_jit_traced():  # its graph has no word for the operator's list of optional biases
        return conv2d_layers(x, arguments)
    tensors = (x, *weights, *biases)
    plain, key = is_plain(tensors), None
    if plain and not want_gradients(tensors):
        key = cpu_bottleneck.call_key(x, arguments)
        if key is not None and (y := call_cache.repeat(key, x, arguments.chain)) is not None:
            return y
    _check_tensors(x, arguments)
    if plain or not torch.compiler.is_compiling():
        take_back_constants(weights)  # here, as autocast and transforms give the kernels other tensors
    if key is not None:
        with torch._C._AutoDispatchBelowAutograd():
            return cpu_bottleneck.inverted_bottleneck(x, arguments, key)
    if plain and not schema.reaches_kernels(x, tensors):
        if any(map(is_wrapped, tensors)):  # of a transform that has ended, or of PyTorch's older vmap
            return conv2d_layers(x, arguments)
    elif not plain and not torch.compiler.is_compiling() and overrides_dispatch(tensors):
        return conv2d_layers(x, arguments)
    result: Tensor = torch.ops.nin.inverted_bottleneck.default(x, *arguments)
    return result


def _epsilon(norm_eps: float, count: int) -> float:
    """Return what is added to the variance, of a block with ``count`` weights."""
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, int | float) or not 0 <= norm_eps < math.inf:
        raise ValueError(f"norm_eps must be None or a number of at least 0, got {norm_eps!r}")
    if count != 3:
        raise ValueError(f"weights must be three with norm_eps (depthwise, 1×1 up, 1×1 down), got {count}")
    return float(norm_eps)


def _activations(activation: str | Sequence[str | None] | None, count: int, *, normalizes: bool) -> list[str]:
    if normalizes and (activation is None or isinstance(activation, str)):
        names: list[str | None] = ["none", activation, "none"]
    elif activation is None or isinstance(activation, str):
        excitation: list[str | None] = ["relu", "sigmoid"] if count >= 4 else []
        names = [*[activation] * (count - 1 - len(excitation)), *excitation, "none"]
    elif isinstance(activation, list | tuple):
        names = list(activation)
    else:
        raise ValueError(f"activation must be a name, or one for each of the {count} layers, got {activation!r}")
    if len(names) != count:
        raise ValueError(f"activation must be one name or one for each of the {count} layers, got {len(names)}")
    known = ["none" if name is None else name for name in names]
    for i, name in enumerate(known):
        gates = count >= 4 and i == count - 2
        choice = GATES if gates else BOTTLENECK_ACTIVATIONS
        if not isinstance(name, str) or name not in choice:
            place = " of the second layer of squeeze-and-excitation" if gates else ""
            raise ValueError(f"activation{place} must be one of {', '.join(choice)}, got {name!r}")
    return known


def _check_tensors(x: Tensor, arguments: BottleneckArguments) -> None:
    """Raise unless the shapes, dtypes and devices match."""
    weights, biases, count = arguments.weights, arguments.biases, len(arguments.weights)
    check_images(x)
    channels = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_like(f"weight {i}", weight, x)
        shape = tuple(weight.shape)
        if i == arguments.depthwise():
            fits, wanted = len(shape) == 4 and shape[:2] == (channels, 1), f"({channels}, 1, kH, kW)"
        else:
            scaled = weights[arguments.depthwise()].shape[0] if arguments.squeezes() and i == count - 2 else None
            fits = len(shape) == 4 and shape[1:] == (channels, 1, 1) and scaled in (None, shape[0])
            wanted = f"({scaled or 'C_out'}, {channels}, 1, 1)"
        if not fits or 0 in shape:
            before = "the input has" if i == 0 else "the layer before gives"
            raise ValueError(f"weight {i} must have shape {wanted}, got {shape}: {before} {channels} channels")
        channels = shape[0]
        if bias is not None:
            check_like(f"bias {i}", bias, x)
            if bias.shape != (channels,):
                raise ValueError(f"bias {i} must have shape ({channels},), got {tuple(bias.shape)}")
    check_reach(x, weights[arguments.depthwise()].shape[2:], arguments.padding, arguments.dilation)
    if arguments.residual and (shape := arguments.output_shape(x)) != tuple(x.shape):
        raise ValueError(f"residual needs a result of the shape of x, got {shape} and {tuple(x.shape)}")
