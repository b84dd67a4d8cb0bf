"""Layers of 1×1 convolutions: Conv1x1, MLPConv, Bottleneck, InvertedBottleneck, Inception, GlobalAveragePooling."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nin.errors import UserError
from nin.ops import ACTIVATIONS, check_activation, conv1x1, inverted_bottleneck, mlpconv
from nin.ops.checks import Pair, pair
from nin.ops.reference import BOTTLENECK_ACTIVATIONS, GATES, activate

NORMALISATIONS = (None, "weight_standardisation")

# Gain that keeps the variance through an activation of a standard normal input: 1 / std(activation(z)).
# Source: Brock, De, Smith, Simonyan: High-Performance Large-Scale Image Recognition Without Normalization, 2021.
VARIANCE_GAIN = {"none": 1.0, "relu": 1.7139, "gelu": 1.7015, "silu": 1.7872}

# PyTorch's modules of the operator's activations; nn.GELU only without the approximation by a tanh.
ACTIVATION_NAMES: dict[type, str] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}


class _OperatorLayer(nn.Module):
    """A layer that calls the operator, which ``torch.jit.script`` cannot compile."""

    def __prepare_scriptable__(self) -> nn.Module:
        instead = ", or put the layer's to_sequential() in its place" if hasattr(self, "to_sequential") else ""
        raise UserError(
            f"torch.jit.script cannot compile nin.{type(self).__name__}: use torch.jit.trace or torch.export{instead}"
        )


class Conv1x1(_OperatorLayer):
    """A 1×1 convolution with an activation: a fully connected layer at every pixel.

    See `nin.conv1x1` for the equation.

    Args:
        in_channels: C_in, at least 1.
        out_channels: C_out, at least 1.
        stride: one number, or (height, width).
        bias: whether to add a bias to each output channel.
        activation: "none" (or None), "relu", "gelu" or "silu".

    Example:
        >>> nin.Conv1x1(192, 32)(torch.randn(1, 192, 28, 28)).shape
        torch.Size([1, 32, 28, 28])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: Pair = 1,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        _check_positive(in_channels=in_channels, out_channels=out_channels)
        check_activation(activation or "none")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.activation = stride, activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        _initialise(self.weight, activation or "none")

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for ``x`` of shape (N, C_in, H, W)."""
        return conv1x1(x, self.weight, self.bias, stride=self.stride, activation=self.activation)

    def to_sequential(self) -> nn.Sequential:
        """Return the same layer in plain PyTorch, with shared parameters: ``nn.Conv2d``, then the activation."""
        conv = nn.utils.skip_init(
            nn.Conv2d, self.in_channels, self.out_channels, 1, stride=self.stride, bias=self.bias is not None
        )
        conv.weight, conv.bias = self.weight, self.bias
        return nn.Sequential(conv, *_activation_modules(self.activation or "none")).train(self.training)

    def extra_repr(self) -> str:
        """Return the options that ``print`` shows."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, activation={self.activation!r}"


class StandardisedConv2d(nn.Conv2d):
    """A convolution with scaled weight standardisation and a learned gain per output channel.

    ``Ŵ = gain · c · (W - mean(W)) / sqrt(var(W) · fan_in + ε)``, mean and variance over each filter, ``c`` the
    variance gain of the activation that follows. It acts on the weights only, so a chain of convolutions remains one
    operator in training, which BatchNorm between the layers would prevent; `fold` returns a plain convolution.

    Args:
        activation: the activation that follows; it determines ``c``.

    The other arguments are those of ``torch.nn.Conv2d``.

    Source:
        Brock, De, Smith: Characterizing signal propagation to close the performance gap in unnormalized ResNets,
        2021, arXiv 2101.08692, section 4.1 (scaled weight standardisation).
    """

    EPSILON = 1e-4

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Pair, *, activation: str = "relu", **options: object
    ) -> None:
        check_activation(activation)
        super().__init__(in_channels, out_channels, kernel_size, **options)  # type: ignore[arg-type]
        if self.weight[0].numel() < 2:
            raise ValueError(
                "weight standardisation needs at least 2 weights in a filter, got 1: it would leave nothing of it"
            )
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.variance_gain = VARIANCE_GAIN[activation]
        # The output is invariant to the norm of a filter, but the effective learning rate is inversely proportional to
        # its square, so filters start with norm 1.
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight[0].numel()))

    def standardised_weight(self) -> Tensor:
        """Return Ŵ, of the shape of ``weight``."""
        fan_in = self.weight[0].numel()
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        scale = torch.rsqrt(variance * fan_in + self.EPSILON) * (self.gain * self.variance_gain).view(-1, 1, 1, 1)
        return (self.weight - mean) * scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` with the standardised weight."""
        return self._conv_forward(x, self.standardised_weight(), self.bias)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """Return a plain convolution with the same result."""
        weight, sizes = self.standardised_weight(), (self.in_channels, self.out_channels, self.kernel_size)
        geometry = self.stride, self.padding, self.dilation, self.groups, self.bias is not None, self.padding_mode
        conv = nn.utils.skip_init(nn.Conv2d, *sizes, *geometry, device=weight.device, dtype=weight.dtype)
        conv.weight.copy_(weight)
        if self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)


class MLPConv(_OperatorLayer):
    """Network in Network's layer: a k×k convolution, then 1×1 convolutions, an activation after each.

    See `nin.mlpconv` for the equation. The convolutions in ``convs`` hold the parameters; they run as one operator.

    Args:
        in_channels: C_in.
        channels: the width of each layer, at least one: the first is the k×k convolution's.
        kernel_size: k of the first convolution; one number, or (height, width), as the next three.
        stride: of the first convolution.
        padding: zeros around the image, in pixels.
        dilation: distance of the first convolution's taps, in pixels.
        bias: whether each layer has a bias for each output channel.
        activation: one name for all layers, or one per layer (see `nin.mlpconv`).
        normalisation: None, or "weight_standardisation" (see `StandardisedConv2d`): one for all layers, or one
            per layer.

    Raises:
        ValueError: a width is not positive, a name is unknown, or a sequence is not as long as ``channels``.

    Source:
        Lin, Chen, Yan: Network in Network, 2013, arXiv 1312.4400, section 3.1.

    Example:
        >>> nin.MLPConv(3, (192, 160, 96), kernel_size=5, padding=2)(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 96, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        *,
        kernel_size: Pair = 1,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        bias: bool = True,
        activation: str | Sequence[str | None] | None = "relu",
        normalisation: str | Sequence[str | None] | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        if len(widths) < 2:
            raise ValueError("channels must hold at least one width, got none")
        _check_positive(**{f"channels[{i - 1}]" if i else "in_channels": w for i, w in enumerate(widths)})
        self.activations = [a or "none" for a in _per_layer("activation", activation, len(channels))]
        for name in self.activations:
            check_activation(name)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.convs = nn.ModuleList()
        for i, norm in enumerate(_per_layer("normalisation", normalisation, len(channels))):
            geometry = {"stride": stride, "padding": padding, "dilation": dilation} if i == 0 else {}
            size, name = kernel_size if i == 0 else 1, self.activations[i]
            self.convs.append(_make_conv(widths[i], widths[i + 1], size, name, norm, {**geometry, "bias": bias}))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, channels[-1], H', W') for ``x`` of shape (N, C_in, H, W)."""
        return self._run(x, len(self.convs))

    def hidden(self, x: Tensor) -> Tensor:
        """Return the input of the last 1×1 layer, (N, channels[-2], H', W')."""
        return self._run(x, len(self.convs) - 1)

    def _run(self, x: Tensor, count: int) -> Tensor:
        """Run the first ``count`` layers as one operator; one by one if a hook or another module stands in between."""
        # not through nn.ModuleList and nn.Module's attributes, which take 5 µs of a call
        convs = cast(list[nn.Conv2d], list(self.convs._modules.values())[:count])
        if not all(map(_is_plain_conv, convs)):
            for conv, activation in zip(convs, self.activations, strict=False):
                x = ACTIVATIONS[activation](conv(x))
            return x
        weights = [
            c.standardised_weight() if isinstance(c, StandardisedConv2d) else _tensor(c, "weight") for c in convs
        ]
        first = convs[0]
        geometry = {"stride": first.stride, "padding": first.padding, "dilation": first.dilation}
        return mlpconv(x, weights, [_tensor(c, "bias") for c in convs], activation=self.activations[:count], **geometry)  # type: ignore[arg-type]

    @torch.no_grad()
    def fold(self) -> "MLPConv":
        """Replace standardised convolutions by plain ones with the same output, in place, and return the layer."""
        for i, conv in enumerate(self.convs):
            if isinstance(conv, StandardisedConv2d):
                self.convs[i] = conv.fold()
        return self

    def to_sequential(self) -> nn.Sequential:
        """Return the same layer in plain PyTorch: ``nn.Conv2d`` and activations, with standardised convolutions folded.

        The other convolutions are shared with this layer, not copied.
        """
        modules: list[nn.Module] = []
        for conv, activation in zip(self.convs, self.activations, strict=True):
            modules.append(conv.fold() if isinstance(conv, StandardisedConv2d) else conv)
            modules += _activation_modules(activation)
        return nn.Sequential(*modules).train(self.training)

    def extra_repr(self) -> str:
        """Return the options that ``print`` shows."""
        return f"activations={self.activations}"


class Bottleneck(nn.Sequential):
    """A k×k convolution on few channels: 1×1 to reduce, k×k, and optionally 1×1 to expand.

    ``256 → 1×1 → 64 → 4×4 → 256`` does the job of ``256 → 4×4 → 256`` with 3.8 times fewer multiplications.

    Args:
        in_channels: C_in.
        mid_channels: output channels of the reducing 1×1 convolution.
        out_channels: C_out.
        kernel_size: k; the image keeps its size (an even k pads one pixel more at the bottom and right).
        expand: put a second 1×1 convolution after the k×k (ResNet's bottleneck): the k×k then maps
            ``mid_channels`` to ``mid_channels``.
        activation: after each convolution.

    Source:
        Szegedy et al.: Going Deeper with Convolutions, 2014, arXiv 1409.4842, section 4; He et al.: Deep Residual
        Learning, 2015, arXiv 1512.03385, figure 5 (``expand=True``).

    Example:
        >>> nin.Bottleneck(256, 64, 256, kernel_size=4)(torch.randn(1, 256, 28, 28)).shape
        torch.Size([1, 256, 28, 28])
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        expand: bool = False,
        activation: str | None = "relu",
    ) -> None:
        _check_positive(in_channels=in_channels, mid_channels=mid_channels, out_channels=out_channels)
        _check_positive(kernel_size=kernel_size)
        wide = (mid_channels, out_channels) if expand else (out_channels,)
        layers: list[nn.Module] = [Conv1x1(in_channels, mid_channels, activation=activation)]
        padding, odd = divmod(kernel_size - 1, 2)
        if odd:  # a convolution pads both sides alike
            layers.append(nn.ZeroPad2d((padding, padding + 1) * 2))
            padding = 0
        layers.append(MLPConv(mid_channels, wide, kernel_size=kernel_size, padding=padding, activation=activation))
        super().__init__(*layers)


class InvertedBottleneck(_OperatorLayer):
    """MobileNetV2's block: 1×1 to more channels, depthwise k×k, 1×1 back to few, and the input added where it fits.

    See `nin.inverted_bottleneck` for the equation. The convolutions in ``convs`` hold the parameters; without
    normalisation they run as one operator, whose hidden tensors never leave the CPU's cache. With BatchNorm they run
    one by one, as its statistics are of whole batches; for inference, `fold` merges it into the convolutions.

    Args:
        in_channels: C_in.
        hidden_channels: between the 1×1 layers, six times as many in MobileNetV2; None: no first 1×1 layer (a depthwise
            separable convolution).
        out_channels: C_out.
        squeeze_channels: between the two layers of squeeze-and-excitation, which scale the depthwise convolution's
            channels (MobileNetV3, EfficientNet); None: without.
        kernel_size: k of the depthwise convolution; one number, or (height, width), as the next two.
        stride: of the depthwise convolution.
        dilation: distance of its taps, in pixels. It is padded such that stride 1 and an odd k keep the image's size.
        activation: of all layers but the last, which has none (see `nin.inverted_bottleneck`); None: "none".
        squeeze_activations: of the two layers of squeeze-and-excitation; the second is "sigmoid" or "hardsigmoid".
        normalisation: None, or "batch_norm" after each convolution but those two, which then has no bias.

    Raises:
        ValueError: a width is not positive, or a name is unknown.

    Source:
        Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018,
        arXiv 1801.04381, table 1. With squeeze-and-excitation: Howard et al.: Searching for MobileNetV3, 2019,
        arXiv 1905.02244, section 5.3.

    Example:
        >>> nin.InvertedBottleneck(24, 144, 24)(torch.randn(1, 24, 56, 56)).shape
        torch.Size([1, 24, 56, 56])
        >>> nin.InvertedBottleneck(24, 144, 32, stride=2)(torch.randn(1, 24, 56, 56)).shape
        torch.Size([1, 32, 28, 28])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | None,
        out_channels: int,
        *,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        dilation: Pair = 1,
        activation: str | None = "relu6",
        squeeze_channels: int | None = None,
        squeeze_activations: tuple[str, str] = ("relu", "sigmoid"),
        normalisation: str | None = None,
    ) -> None:
        super().__init__()
        wide = in_channels if hidden_channels is None else hidden_channels
        _check_positive(in_channels=in_channels, hidden_channels=wide, out_channels=out_channels)
        activation = "none" if activation is None else activation
        if not isinstance(activation, str) or activation not in BOTTLENECK_ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(BOTTLENECK_ACTIVATIONS)}, got {activation!r}")
        if squeeze_channels is not None:
            _check_positive(squeeze_channels=squeeze_channels)
            _check_squeeze_activations(squeeze_activations)
        if normalisation not in (None, "batch_norm"):
            raise ValueError(f"normalisation must be None or 'batch_norm', got {normalisation!r}")
        size, step = pair("kernel_size", kernel_size, 1), pair("dilation", dilation, 1)
        padding = step[0] * (size[0] - 1) // 2, step[1] * (size[1] - 1) // 2
        strides = pair("stride", stride, 1)
        bias = normalisation is None
        up = [] if hidden_channels is None else [nn.Conv2d(in_channels, wide, 1, bias=bias)]
        depthwise = nn.Conv2d(wide, wide, size, strides, padding, step, groups=wide, bias=bias)
        down = nn.Conv2d(wide, out_channels, 1, bias=bias)
        self.squeezed = None if squeeze_channels is None else len(up) + 1  # the place of squeeze-and-excitation's first
        squeeze = []
        if squeeze_channels is not None:
            squeeze = [nn.Conv2d(wide, squeeze_channels, 1), nn.Conv2d(squeeze_channels, wide, 1)]
        self.convs = nn.ModuleList([*up, depthwise, *squeeze, down])
        self.activations = [activation] * (len(up) + 1) + [*squeeze_activations[: len(squeeze)], "none"]
        norms = [nn.Identity() if c in squeeze else nn.BatchNorm2d(c.out_channels) for c in self._layers()]
        self.norms = None if bias else nn.ModuleList(norms)
        keeps_size = all(d * (k - 1) % 2 == 0 for k, d in zip(size, step, strict=True))
        self.residual = in_channels == out_channels and strides == (1, 1) and keeps_size
        for conv, name in zip(self._layers(), self.activations, strict=True):
            _initialise(conv.weight, name)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def _layers(self) -> list[nn.Conv2d]:
        return cast(list[nn.Conv2d], list(self.convs._modules.values()))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for ``x`` of shape (N, C_in, H, W)."""
        convs = self._layers()
        if self.norms is None and all(_is_plain_conv(conv, groups=conv.groups) for conv in convs):
            depthwise = convs[-2 if self.squeezed is None else self.squeezed - 1]
            geometry = {"stride": depthwise.stride, "padding": depthwise.padding, "dilation": depthwise.dilation}
            weights, biases = ([_tensor(conv, name) for conv in convs] for name in ("weight", "bias"))
            options = {"activation": self.activations, "residual": self.residual, **geometry}
            return inverted_bottleneck(x, weights, biases, **options)  # type: ignore[arg-type]
        y = scaled = x
        for i, conv in enumerate(convs):
            if i == self.squeezed:
                scaled, y = y, y.mean((2, 3), keepdim=True)
            y = conv(y)
            y = y if self.norms is None else self.norms[i](y)
            y = activate(y, self.activations[i])
            if self.squeezed is not None and i == self.squeezed + 1:
                y = scaled * y
        return y + x if self.residual else y

    @torch.no_grad()
    def fold(self) -> "InvertedBottleneck":
        """Merge BatchNorm, with the statistics of now, into the convolutions, in place, and return the layer."""
        if self.norms is not None:
            for i, (conv, norm) in enumerate(zip(self._layers(), self.norms, strict=True)):
                if not isinstance(norm, nn.BatchNorm2d):
                    continue
                self.convs[i] = fuse_conv_bn_eval(conv.eval(), norm.eval()).train(self.training)
            self.norms = None
        return self

    def extra_repr(self) -> str:
        """Return the options that ``print`` shows."""
        return f"activations={self.activations}, residual={self.residual}"


def _check_squeeze_activations(names: tuple[str, str]) -> None:
    """Raise unless the two layers of squeeze-and-excitation can have these activations."""
    two = isinstance(names, list | tuple) and len(names) == 2 and all(isinstance(name, str) for name in names)
    if not two or names[0] not in BOTTLENECK_ACTIVATIONS or names[1] not in GATES:
        first, second = ", ".join(BOTTLENECK_ACTIVATIONS), " or ".join(GATES)
        raise ValueError(f"squeeze_activations must be one of {first}, and {second}, got {names!r}")


class Inception(nn.Module):
    """Four parallel branches whose outputs are concatenated: 1×1; 1×1 → 3×3; 1×1 → 5×5; max pooling → 1×1.

    Args:
        in_channels: C_in.
        ones: channels of the 1×1 branch.
        reduce_threes: channels of the 1×1 before the 3×3.
        threes: channels of the 3×3 branch.
        reduce_fives: channels of the 1×1 before the 5×5.
        fives: channels of the 5×5 branch.
        pools: channels of the 1×1 after the 3×3 max pooling.
        activation: after each convolution.

    Source:
        Szegedy et al.: Going Deeper with Convolutions, 2014, arXiv 1409.4842, figure 2(b) and table 1.

    Example:
        >>> nin.Inception(192, 64, 96, 128, 16, 32, 32)(torch.randn(1, 192, 28, 28)).shape
        torch.Size([1, 256, 28, 28])
    """

    def __init__(
        self,
        in_channels: int,
        ones: int,
        reduce_threes: int,
        threes: int,
        reduce_fives: int,
        fives: int,
        pools: int,
        *,
        activation: str | None = "relu",
    ) -> None:
        super().__init__()
        self.ones = Conv1x1(in_channels, ones, activation=activation)
        self.threes = Bottleneck(in_channels, reduce_threes, threes, kernel_size=3, activation=activation)
        self.fives = Bottleneck(in_channels, reduce_fives, fives, kernel_size=5, activation=activation)
        self.pools = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), Conv1x1(in_channels, pools, activation=activation))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, ones + threes + fives + pools, H, W) for ``x`` of shape (N, C_in, H, W)."""
        return torch.cat([self.ones(x), self.threes(x), self.fives(x), self.pools(x)], dim=1)


class GlobalAveragePooling(nn.Module):
    """Network in Network's head: the score of a class is the mean of its feature map.

    ``score[n, c] = mean over i, j of maps[n, c, i, j]``. It has no parameters, and the maps are confidence maps: they
    show where in the image the evidence for each class is.

    Source:
        Lin, Chen, Yan: Network in Network, 2013, arXiv 1312.4400, section 3.2.

    Example:
        >>> nin.GlobalAveragePooling()(torch.ones(2, 10, 7, 7)).shape
        torch.Size([2, 10])
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Return scores (N, C) for ``maps`` of shape (N, C, H, W)."""
        return F.adaptive_avg_pool2d(maps, 1).flatten(1)


def _is_plain_conv(conv: nn.Module, groups: int = 1) -> bool:
    """Return whether nothing but a convolution's weights decides what it computes: no hook, no code of its own."""
    return (
        isinstance(conv, nn.Conv2d)
        # of the class, as the compiler cannot see through a bound method's __func__
        and type(conv).forward in (nn.Conv2d.forward, StandardisedConv2d.forward)
        and "forward" not in vars(conv)
        and conv.groups == groups
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not (conv._forward_pre_hooks or conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks)
    )


def _tensor(module: nn.Module, name: str) -> Any:
    """Return a parameter, or whatever has its name: what pruned and parametrised modules compute it to."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _make_conv(
    in_channels: int, out_channels: int, size: Pair, activation: str, norm: str | None, options: dict[str, object]
) -> nn.Conv2d:
    if norm == "weight_standardisation":
        conv: nn.Conv2d = StandardisedConv2d(in_channels, out_channels, size, activation=activation, **options)
    elif norm is None:
        conv = nn.Conv2d(in_channels, out_channels, size, **options)  # type: ignore[arg-type]
        _initialise(conv.weight, activation)
    else:
        raise ValueError(f"normalisation must be one of {NORMALISATIONS}, got {norm!r}")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _initialise(weight: Tensor, activation: str) -> None:
    """Draw the weights from a normal distribution that keeps the variance of the activations from layer to layer.

    ``std = sqrt(2 / fan_in)`` before ReLU (GELU and SiLU are close to it), ``sqrt(1 / fan_in)`` before no activation.

    Source:
        He, Zhang, Ren, Sun: Delving Deep into Rectifiers, 2015, arXiv 1502.01852, equation 10.
    """
    nn.init.normal_(weight, std=math.sqrt((1 if activation == "none" else 2) / weight[0].numel()))


def _activation_modules(name: str) -> list[nn.Module]:
    """Return the activation of that name as modules; none for "none"."""
    return [module() for module, known in ACTIVATION_NAMES.items() if known == name]


def _per_layer(name: str, value: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    values = [value] * count if value is None or isinstance(value, str) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} must be one value or one for each of the {count} layers, got {len(values)}")
    return values


def _check_positive(**channels: int) -> None:
    for name, value in channels.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
