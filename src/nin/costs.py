"""What a network costs: parameters, multiply-accumulates and activation bytes, layer by layer."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nin.layers import Conv1x1, MLPConv
from nin.ops.schema import chain_macs
from nin.tables import html_table


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One convolution or fully connected layer.

    Attributes:
        name: its path in the model, as in ``state_dict``.
        kind: "conv" or "linear".
        kernel_size: (height, width); (1, 1) for a fully connected layer.
        in_channels: values that it looks at, at one place.
        out_channels: values that it gives, at one place.
        output_shape: (N, C, H, W), or what a fully connected layer gives.
        parameters: weights and biases.
        macs: multiply-accumulates; one is two floating-point operations. Biases are not counted.
        activation_bytes: of its result in float32.
    """

    name: str
    kind: str
    kernel_size: tuple[int, int]
    in_channels: int
    out_channels: int
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    activation_bytes: int

    @property
    def is_1x1(self) -> bool:
        """Whether it looks at one place only: a 1×1 convolution, or a fully connected layer."""
        return self.kernel_size == (1, 1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs for one input; prints as a table.

    Attributes:
        input_shape: (N, C, H, W).
        layers: in the order in which they run.
        parameters: of the whole model, those outside ``layers`` too.
        uncounted: how many modules of which kind have parameters and are not in ``layers``, such as
            "53 BatchNorm2d"; their arithmetic is not counted.
    """

    input_shape: tuple[int, ...]
    layers: tuple[LayerCost, ...]
    parameters: int
    uncounted: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all layers' results in float32."""
        return sum(layer.activation_bytes for layer in self.layers)

    @property
    def share_1x1(self) -> float:
        """Share of the multiply-accumulates that 1×1 layers make."""
        return sum(layer.macs for layer in self.layers if layer.is_1x1) / max(1, self.macs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, the totals with it."""
        totals = {"macs": self.macs, "activation_bytes": self.activation_bytes, "share_1x1": self.share_1x1}
        return {**dataclasses.asdict(self), **totals}

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's cells, a header first and the totals last."""
        rows = [("layer", "kernel", "channels", "output", "parameters", "MACs", "MACs %", "activation")]
        rows += [
            (
                layer.name,
                "×".join(map(str, layer.kernel_size)) if layer.kind == "conv" else "dense",
                f"{layer.in_channels} → {layer.out_channels}",
                "×".join(map(str, layer.output_shape[1:])),
                f"{layer.parameters:,}",
                f"{layer.macs:,}",
                f"{100 * layer.macs / max(1, self.macs):.1f}",
                format_bytes(layer.activation_bytes),
            )
            for layer in self.layers
        ]
        total = ("total", f"1×1: {100 * self.share_1x1:.0f} %", "", "", f"{self.parameters:,}", f"{self.macs:,}")
        return [*rows, (*total, "100.0", format_bytes(self.activation_bytes))]

    def __str__(self) -> str:
        """Return the table as text."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def cost(model: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Count what a model costs for one input, without computing anything.

    A convolution makes ``N · C_out · H' · W' · (C_in / groups) · kH · kW`` multiply-accumulates (MACs); one MAC is
    two floating-point operations. Biases, activations, pooling and normalisation are not counted, as is usual.

    Args:
        model: any network of convolutions and fully connected layers.
        input_shape: (N, C, H, W); with N = 1 the figures are those of one image.

    Returns:
        The layers in the order in which they run, and the totals.

    Raises:
        ValueError: the shape has not four sizes of at least 1.

    Example:
        >>> nin.cost(nin.models.nin_cifar(), (1, 3, 32, 32)).macs
        222486528
    """
    shape = tuple(int(size) for size in input_shape)
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"input_shape must be (N, C, H, W), each at least 1, got {shape}")
    parameters = sum(p.numel() for p in model.parameters())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # Meta tensors have shapes and no values: a network of any size is counted in milliseconds and no memory.
    model = copy.deepcopy(model).eval().to("meta")
    names = {module: name for name, module in model.named_modules()}
    layers: list[LayerCost] = []

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        layers.extend(_layer_costs(names[module], module, tuple(output.shape)))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | Conv1x1 | MLPConv):
            module.register_forward_hook(record)
    with torch.no_grad():
        model(torch.empty(shape, dtype=dtype, device="meta"))
    return Cost(shape, tuple(layers), parameters, tuple(_uncounted(model, layers)))


def _layer_costs(name: str, module: nn.Module, output: tuple[int, ...]) -> Iterable[LayerCost]:
    if isinstance(module, nn.Linear):
        places = torch.Size(output[:-1]).numel()
        macs = places * module.in_features * module.out_features
        yield _cost(name, "linear", (1, 1), module.in_features, module.out_features, output, module, macs)
    elif isinstance(module, MLPConv):
        for i, child in enumerate(module.convs):
            conv = cast(nn.Conv2d, child)
            yield from _layer_costs(f"{name}.convs.{i}", conv, (output[0], conv.out_channels, *output[2:]))
    elif isinstance(module, nn.Conv2d | Conv1x1):
        kernel = (int(module.weight.shape[2]), int(module.weight.shape[3]))
        macs = chain_macs(output, [tuple(module.weight.shape)])
        yield _cost(name, "conv", kernel, module.in_channels, module.out_channels, output, module, macs)


def _cost(
    name: str,
    kind: str,
    kernel: tuple[int, int],
    in_channels: int,
    out_channels: int,
    output: tuple[int, ...],
    module: nn.Module,
    macs: int,
) -> LayerCost:
    parameters = sum(p.numel() for p in module.parameters(recurse=False))
    float32_bytes = 4 * torch.Size(output).numel()
    return LayerCost(name, kind, kernel, in_channels, out_channels, output, parameters, macs, float32_bytes)


def _uncounted(model: nn.Module, layers: list[LayerCost]) -> list[str]:
    counted = {layer.name for layer in layers}
    kinds = Counter(
        type(module).__name__
        for name, module in model.named_modules()
        if name not in counted and next(module.parameters(recurse=False), None) is not None
    )
    return [f"{count} {kind}" for kind, count in sorted(kinds.items())]


def format_bytes(count: float) -> str:
    """Return a number of bytes as people read it: 1.5 MB for 1,500,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
