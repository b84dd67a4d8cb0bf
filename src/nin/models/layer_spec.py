"""Geometry of a convolution or fully connected layer: its sizes, costs, factorisations, and a new layer of it."""

import dataclasses
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The geometry of one convolution or fully connected layer.

    The cache of layer latencies is keyed by these values in this order: a new one goes to the end.

    Attributes:
        name: its path in the model.
        kind: "conv" or "linear".
        in_channels: of its input.
        out_channels: of its output.
        kernel_size: (height, width); (1, 1) for a fully connected layer, as are the next two.
        stride: (vertical, horizontal), in pixels.
        dilation: (vertical, horizontal), in pixels.
        padding: (vertical, horizontal), in pixels, or "same".
        groups: independent blocks of channels.
        padding_mode: as PyTorch names it.
        bias: whether it adds a number to each output channel.
        input_size: (height, width) of its input; (positions, 1) for a fully connected layer.
        output_size: the same of its output.
        calls: times that one forward of the model calls it.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = True
    input_size: tuple[int, int] = (1, 1)
    output_size: tuple[int, int] = (1, 1)
    calls: int = 1

    @classmethod
    def of_module(cls, name: str, module: nn.Module) -> "LayerSpec":
        """Return the geometry of a layer; the sizes of its input and output are not known from it alone."""
        if isinstance(module, nn.Linear):
            return cls(name, "linear", module.in_features, module.out_features, bias=module.bias is not None)
        assert isinstance(module, nn.Conv2d)
        return cls(
            name,
            "conv",
            module.in_channels,
            module.out_channels,
            _pair(module.kernel_size),
            _pair(module.stride),
            _pair(module.dilation),
            module.padding if isinstance(module.padding, str) else _pair(module.padding),
            module.groups,
            module.padding_mode,
            module.bias is not None,
        )

    def make_layer(self, like: Tensor) -> nn.Module:
        """Return a new layer of this geometry, on the device and in the dtype of ``like``."""
        options: dict[str, Any] = {"bias": self.bias, "device": like.device, "dtype": like.dtype}
        if self.kind == "linear":
            return nn.Linear(self.in_channels, self.out_channels, **options)
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,  # type: ignore[arg-type]
            **options,
        )

    @property
    def own_padding(self) -> tuple[int, int, int, int]:
        """Pixels (left, right, top, bottom) that the layer's forward pads beside ``padding``.

        They are those that its output needs to be as large as it was seen: timm's Conv2dSame pads by the size of its
        input, as TensorFlow does, with the smaller half before.
        """
        amounts: list[int] = []
        for axis in (1, 0):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            needed = (self.output_size[axis] - 1) * self.stride[axis] + reach - self.input_size[axis]
            known = needed if self.padding == "same" else 0 if isinstance(self.padding, str) else 2 * self.padding[axis]
            missing = max(0, needed - known)
            amounts += [missing // 2, missing - missing // 2]
        return amounts[0], amounts[1], amounts[2], amounts[3]

    @property
    def taps(self) -> int:
        """Elements of the kernel, kH · kW."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def positions(self) -> int:
        """Pixels of the output."""
        return self.output_size[0] * self.output_size[1]

    @property
    def patch(self) -> int:
        """Input values of one group for one output value: C_in / groups · kH · kW."""
        return self.in_channels // self.groups * self.taps

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.calls * self.positions * self.out_channels * self.patch

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.out_channels * (self.patch + self.bias)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel comes from one input channel."""
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def factorised_layers(
    spec: LayerSpec, form: str, rank_in: int | None, rank_out: int | None, *, inputs: int, outputs: int
) -> tuple[LayerSpec, ...]:
    """Return the chain of layers that takes the place of one, first to last.

    Args:
        spec: the original layer.
        form: "keep"; "output": k×k to ``rank_out`` channels, then 1×1; "input": 1×1 to ``rank_in``, then k×k;
            "tucker": 1×1 to ``rank_in``, k×k to ``rank_out``, 1×1. Ranks are per group.
        rank_in: output channels of the first 1×1, or None.
        rank_out: output channels of the k×k, or None.
        inputs: input channels that are left after pruning.
        outputs: output channels that are left after pruning.
    """
    if form == "keep":
        groups = inputs if spec.is_depthwise else spec.groups
        # the mean of the input channels that are gone goes into a bias
        bias = spec.bias or (inputs != spec.in_channels and not spec.is_depthwise)
        return (dataclasses.replace(spec, in_channels=inputs, out_channels=outputs, groups=groups, bias=bias),)

    def pointwise(inputs: int, outputs: int, size: tuple[int, int], *, bias: bool) -> LayerSpec:
        new = LayerSpec(spec.name, spec.kind, inputs, outputs, groups=spec.groups, bias=bias, calls=spec.calls)
        return dataclasses.replace(new, input_size=size, output_size=size)

    reduced = inputs if rank_in is None else rank_in * spec.groups
    middle = outputs if rank_out is None else rank_out * spec.groups
    chain = [dataclasses.replace(spec, in_channels=reduced, out_channels=middle, bias=rank_out is None)]
    if rank_in is not None:
        chain.insert(0, pointwise(inputs, reduced, spec.input_size, bias=False))
    if rank_out is not None:
        chain.append(pointwise(middle, outputs, spec.output_size, bias=True))
    return tuple(chain)
