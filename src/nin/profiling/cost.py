"""What a network costs: parameters, multiply-accumulates and activation bytes, layer by layer."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nin.layers import Conv1x1, MLPConv
from nin.ops.schema import chain_macs
from nin.profiling.roofline import Measured, measure
from nin.runtime.formatting import format_bytes, format_percent
from nin.runtime.tables import html_table, text_table


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One convolution or fully connected layer, or another module that multiplies, such as attention.

    Attributes:
        name: its path in the model, as in ``state_dict``.
        kind: "conv", "linear", or for other modules the operation that multiplies most, such as "bmm".
        kernel_size: (height, width); (1, 1) for a fully connected layer, (0, 0) for other modules.
        in_channels: values that it looks at, at one place; 0 for other modules.
        out_channels: values that it gives, at one place; 0 for other modules.
        output_shape: (N, C, H, W), or what a fully connected layer gives.
        parameters: weights and biases.
        macs: multiply-accumulates; one is two floating-point operations. Biases are not counted.
        activation_bytes: of its result in float32.
        module: the module that computes it: its own name, or that of the `MLPConv` which runs it with others.
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
    module: str = ""

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
        uncounted: how many modules of which kind ran, have parameters and are not in ``layers``, such as
            "53 BatchNorm2d", and operations of other packages without a formula, such as
            "1 torchvision::deform_conv2d"; their arithmetic is not counted.
        measured: how long it and its layers took, if that was asked for.
    """

    input_shape: tuple[int, ...]
    layers: tuple[LayerCost, ...]
    parameters: int
    uncounted: tuple[str, ...]
    measured: Measured | None = None

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
        rows: list[tuple[str, ...]] = [
            ("layer", "kernel", "channels", "output", "parameters", "MACs", "MACs %", "activation")
        ]
        rows += [
            (
                layer.name or "(the network itself)",
                _kernel_text(layer),
                f"{layer.in_channels} → {layer.out_channels}" if layer.out_channels else "",
                "×".join(map(str, layer.output_shape[1:])),
                f"{layer.parameters:,}",
                f"{layer.macs:,}",
                f"{100 * layer.macs / max(1, self.macs):.1f}",
                format_bytes(layer.activation_bytes),
            )
            for layer in self.layers
        ]
        total = ("total", f"1×1: {format_percent(self.share_1x1, 0)}", "", "", f"{self.parameters:,}", f"{self.macs:,}")
        rows.append((*total, "100.0", format_bytes(self.activation_bytes)))
        if self.measured is not None:
            rows = [row + times for row, times in zip(rows, self._time_cells(self.measured), strict=True)]
        return rows

    def _time_cells(self, measured: Measured) -> list[tuple[str, str]]:
        """Return the columns of the times; layers that run as one have their time at the first of them."""
        times = {layer.module: layer for layer in measured.layers}
        cells = [("ms", "at least")]
        for layer in self.layers:
            taken = times.pop(layer.module, None)
            if taken is None:
                cells.append(("in above", ""))
            else:
                bound = "" if taken.bound_ms is None else f"{taken.bound_ms:.3f} {taken.bound_by}"
                cells.append((f"{taken.timing.median_ms:.3f}", bound))
        return [*cells, (f"{measured.total.median_ms:.3f}", "")]

    def __str__(self) -> str:
        """Return the table as text."""
        uncounted = f"\nnot counted: {', '.join(self.uncounted)}" if self.uncounted else ""
        return text_table(self.rows(), left=4) + uncounted

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def cost(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    measured: bool = False,
    on_progress: Callable[[int, int], object] | None = None,
) -> Cost:
    """Count what a model costs for one input, without computing anything unless it is to be measured.

    A convolution makes ``N · C_out · H' · W' · (C_in / groups) · kH · kW`` multiply-accumulates (MACs); one MAC is
    two floating-point operations. Biases, activations, pooling and normalisation are not counted, as is usual.
    Matrix products outside of layers, such as those of attention, are counted by the formulas of
    ``torch.utils.flop_counter``, so the total is half of what that one counts.

    Args:
        model: any network that takes images. One that cannot run without values (it looks at them, or makes
            tensors on a device of its own) is copied and computed once.
        input_shape: (N, C, H, W); with N = 1 the figures are those of one image.
        measured: whether to time it too, whole and layer by layer, on the CPU in evaluation, in about four seconds.
        on_progress: called with the measured runs that are done and their number.

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
    try:
        # Meta tensors have shapes and no values: a network of any size is counted in milliseconds and no memory.
        counting = _count(_copy_shapes(model).eval(), torch.empty(shape, dtype=dtype, device="meta"))
    except (RuntimeError, TypeError):  # item() and numpy() of a meta tensor, one of two devices
        counting = _count(copy.deepcopy(model).eval().to("cpu"), torch.zeros(shape, dtype=dtype))
    times = None
    if measured:
        macs: Counter[str] = Counter()
        for layer in counting.layers:
            macs[layer.module] += layer.macs
        x = torch.rand(shape).to(dtype)
        times = measure(copy.deepcopy(model).eval().to("cpu"), x, macs, on_progress)
    return Cost(shape, tuple(counting.layers), parameters, tuple(counting.uncounted()), times)


def _copy_shapes(model: nn.Module) -> nn.Module:
    """Return a copy on the meta device; the values are not copied even for a moment, and tied weights stay tied."""
    twins: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    twins |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, twins)


def _count(model: nn.Module, x: Tensor) -> _Counting:
    counting = _Counting(model)
    # The short cut of nn.MultiheadAttention is one operation without a formula.
    short_cut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counting:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(short_cut)
    return counting


class _Counting(TorchDispatchMode):
    """Counts every operation that has a formula, for the module that runs it.

    Args:
        model: gets hooks that stay; it is a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: list[LayerCost] = []
        self.running: list[Counter[str]] = [Counter()]  # of each module that is being run, the innermost last
        self.unknown: Counter[str] = Counter()
        self.ran: dict[str, nn.Module] = {}
        self.names = {module: name for name, module in model.named_modules()}
        for module in model.modules():
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            operation = func._schema.name.rpartition("::")[2]
            self.running[-1][operation] += formula(*args, **kwargs, out_val=result) // 2
        elif func.namespace not in ("aten", "prim", "prims"):
            self.unknown[func._schema.name] += 1
        return result

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(Counter())

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        operations, name = self.running.pop(), self.names[module]
        self.ran[name] = module
        if isinstance(module, nn.Conv2d | nn.Linear | Conv1x1 | MLPConv):
            self.layers.extend(_layer_costs(name, module, tuple(output.shape)))
        elif operations.total() > 0:
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            most = operations.most_common(1)[0][0]
            self.layers.append(_cost(name, most, (0, 0), 0, 0, shape, module, operations.total()))

    def uncounted(self) -> list[str]:
        """Return what ran and is in no layer."""
        counted = {name for layer in self.layers for name in (layer.name, layer.module)}
        kinds = Counter(
            type(module).__name__
            for name, module in self.ran.items()
            if name not in counted and next(module.parameters(recurse=False), None) is not None
        )
        return [f"{count} {kind}" for kind, count in sorted((kinds + self.unknown).items())]


def _layer_costs(name: str, module: nn.Module, output: tuple[int, ...]) -> Iterable[LayerCost]:
    if isinstance(module, nn.Linear):
        places = torch.Size(output[:-1]).numel()
        macs = places * module.in_features * module.out_features
        yield _cost(name, "linear", (1, 1), module.in_features, module.out_features, output, module, macs)
    elif isinstance(module, MLPConv):
        for i, child in enumerate(module.convs):
            conv = cast(nn.Conv2d, child)
            for layer in _layer_costs(f"{name}.convs.{i}", conv, (output[0], conv.out_channels, *output[2:])):
                yield dataclasses.replace(layer, module=name)
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
    float32_bytes = 4 * torch.Size(output).numel() if output else 0
    return LayerCost(name, kind, kernel, in_channels, out_channels, output, parameters, macs, float32_bytes, name)


def _kernel_text(layer: LayerCost) -> str:
    if layer.kind == "conv":
        return "×".join(map(str, layer.kernel_size))
    return "dense" if layer.kind == "linear" else layer.kind
