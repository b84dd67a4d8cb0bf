"""Count the parameters, multiply-accumulates (MACs) and activation bytes of a network, layer by layer."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from nin.display.numbers import format_bytes, format_percent
from nin.display.tables import html_table, text_table
from nin.layers import Conv1x1, MLPConv, StandardisedConv2d
from nin.ops.schema import chain_macs
from nin.profiling.roofline import ModelTiming, time_model
from nin.runtime.model_copy import copy_model


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One convolution or fully connected layer, or another module that multiplies, such as attention.

    Attributes:
        name: its path in the model, as in ``state_dict``.
        kind: "conv", "linear", or for other modules the operation that multiplies most, such as "bmm".
        kernel_size: (height, width); (1, 1) for a fully connected layer, (0, 0) for other modules.
        in_channels: of its input, the features of a fully connected layer; 0 for other modules.
        out_channels: of its output, as ``in_channels``.
        output_shape: (N, C, H, W), or the shape that a fully connected layer returns.
        parameters: weights and biases.
        macs: multiply-accumulates; one is two floating-point operations. Biases are not counted.
        activation_bytes: of its result in float32.
        module: path of the module that computes it: its own, or that of the `MLPConv` which runs it with others.
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
        """Whether it is a 1×1 convolution or a fully connected layer."""
        return self.kernel_size == (1, 1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one forward pass; prints as a table.

    Attributes:
        input_shape: (N, C, H, W).
        layers: one for each call, in order.
        parameters: of the whole model, those outside ``layers`` too.
        uncounted: number and class of the modules that ran, have parameters and are not in ``layers``, such as
            "53 BatchNorm2d", and operators of other packages without a FLOP formula, such as
            "1 torchvision::deform_conv2d"; their arithmetic is not counted.
        measured: the times of the model and its layers, if they were asked for.
    """

    input_shape: tuple[int, ...]
    layers: tuple[LayerCost, ...]
    parameters: int
    uncounted: tuple[str, ...]
    measured: ModelTiming | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all layers' results in float32."""
        return sum(layer.activation_bytes for layer in self.layers)

    @property
    def fraction_1x1(self) -> float:
        """Fraction of the multiply-accumulates that is in 1×1 layers."""
        return sum(layer.macs for layer in self.layers if layer.is_1x1) / max(1, self.macs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, the totals with it."""
        # "share_1x1" is the name in files and in the output of `nin cost --json` since 0.1
        totals = {"macs": self.macs, "activation_bytes": self.activation_bytes, "share_1x1": self.fraction_1x1}
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
        total = (
            "total",
            f"1×1: {format_percent(self.fraction_1x1, 0)}",
            "",
            "",
            f"{self.parameters:,}",
            f"{self.macs:,}",
        )
        rows.append((*total, "100.0", format_bytes(self.activation_bytes)))
        if self.measured is not None:
            rows = [row + times for row, times in zip(rows, self._time_cells(self.measured), strict=True)]
        return rows

    def _time_cells(self, measured: ModelTiming) -> list[tuple[str, str]]:
        """Return the columns of the times; layers that run as one operator have their time at the first of them."""
        times = {layer.module: layer for layer in measured.layers}
        cells = [("ms", "at least")]
        for layer in self.layers:
            time = times.pop(layer.module, None)
            if time is None:
                cells.append(("in above", ""))
            else:
                bound = "" if time.bound_ms is None else f"{time.bound_ms:.3f} {time.bound_by}"
                cells.append((f"{time.timing.median_ms:.3f}", bound))
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
    whole: nn.Module | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> Cost:
    """Count the cost of one forward pass, on the meta device: nothing is computed unless it is to be timed.

    Standardised weights are folded before, as `nin.load` folds them: figures and times are those of the network that
    answers.

    A convolution makes ``N · C_out · H' · W' · (C_in / groups) · kH · kW`` multiply-accumulates (MACs); one MAC is
    two floating-point operations. Biases, activations, pooling and normalisation are not counted, as is usual.
    FLOPs are those of ``torch.utils.flop_counter``, so that matrix products outside of layers, such as those of
    attention, are counted too.

    Args:
        model: any network that takes images. One that cannot run on the meta device (it looks at values, or makes
            tensors on a device of its own) is copied and computed once.
        input_shape: (N, C, H, W); with N = 1 the figures are those of one image.
        measured: whether to time it too, whole and layer by layer, on the CPU in evaluation mode, in about four
            seconds.
        whole: what computes the same as the model, such as the network of `nin.fuse`, to be timed as a whole in its
            place; its layers are those of the model.
        on_progress: called with (timed runs done, timed runs in all).

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
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        # Meta tensors have shapes and no values: a network of any size is counted in milliseconds and no memory.
        counter = _count(_as_it_answers(_copy_to_meta(model)), torch.empty(shape, dtype=dtype, device="meta"))
    except (RuntimeError, TypeError):  # item() and numpy() of a meta tensor, one of two devices
        counter = _count(_as_it_answers(copy_model(model)).to("cpu"), torch.zeros(shape, dtype=dtype))
    timing = None
    if measured:
        macs: Counter[str] = Counter()
        for layer in counter.layers:
            macs[layer.module] += layer.macs
        x = torch.rand(shape).to(dtype)
        timing = time_model(_as_it_answers(copy_model(model)).to("cpu"), x, macs, on_progress, whole)
    return Cost(shape, tuple(counter.layers), count_parameters(model), tuple(counter.uncounted()), timing)


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights and biases of a network as it answers: gains of standardised filters are folded.

    Example:
        >>> from nin.profiling.cost import count_parameters
        >>> convolution = nin.models.nin_cifar(normalisation="weight_standardisation")
        >>> count_parameters(convolution) == count_parameters(convolution.fold())
        True
    """
    gains = sum(module.gain.numel() for module in model.modules() if isinstance(module, StandardisedConv2d))
    return sum(p.numel() for p in model.parameters()) - gains


def _as_it_answers(model: nn.Module) -> nn.Module:
    """Return the network in evaluation mode with its standardised weights folded, in place."""
    for module in model.modules():
        if isinstance(module, MLPConv):
            module.fold()
    return model.eval()


def _copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a copy on the meta device; the values are not copied even for a moment, and tied weights stay tied."""
    copies: dict[int, Tensor] = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    copies |= {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy_model(model, copies)


def _count(model: nn.Module, x: Tensor) -> "_LayerCounter":
    """Run the model in a `_LayerCounter`, and return it."""
    counter = _LayerCounter(model)
    # nn.MultiheadAttention's fast path is one operator without a formula
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counter.flops, counter.foreign_operators:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter


class _ForeignOperators(TorchDispatchMode):
    """Counts the calls of other packages' operators that have no FLOP formula; FlopCounterMode does not name them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims") and func._overloadpacket not in flop_registry:
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class _LayerCounter:
    """Makes a `LayerCost` of every call of a layer, in order, with the FLOPs that FlopCounterMode counts meanwhile.

    FlopCounterMode has the counts of each module too, but those of all its calls and all its submodules in one sum,
    under names of its own, and without the shape of the result: hence the hooks.

    Args:
        model: gets hooks that stay; it is a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.flops, self.foreign_operators = FlopCounterMode(display=False), _ForeignOperators()
        self.layers: list[LayerCost] = []
        self.called: dict[str, nn.Module] = {}
        self.names = {module: name for name, module in model.named_modules()}
        # FLOPs by operator: of the modules that have returned, and for each running module, the innermost last, those
        # that belonged to none of them when it began
        self.assigned: Counter[Any] = Counter()
        self.at_start: list[Counter[Any]] = []
        # with a hook, these would run by themselves
        fused = {conv for module in model.modules() if isinstance(module, MLPConv) for conv in module.convs}
        for module in self.names.keys() - fused:
            module.register_forward_pre_hook(self._before_forward)
            module.register_forward_hook(self._after_forward)

    def _unassigned(self) -> Counter[Any]:
        return Counter(self.flops.flop_counts["Global"]) - self.assigned

    def _before_forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and inputs[0].is_floating_point():
            # newer versions of PyTorch refuse it themselves, 2.10 only off the meta device
            raise TypeError(f"{type(module).__name__} takes whole numbers, got {inputs[0].dtype}")
        self.at_start.append(self._unassigned())

    def _after_forward(self, module: nn.Module, _: Any, output: Any) -> None:
        flops, name = self._unassigned() - self.at_start.pop(), self.names[module]
        self.assigned += flops
        self.called[name] = module
        macs, shape = flops.total() // 2, tuple(output.shape) if isinstance(output, Tensor) else ()
        if isinstance(module, MLPConv):  # its convolutions run as one operator, so the counter has only their sum
            for i, conv in enumerate(module.convs):
                weight_shape = tuple(cast(Tensor, conv.weight).shape)
                conv_shape = (shape[0], weight_shape[0], *shape[2:])
                conv_macs = chain_macs(conv_shape, [weight_shape])
                self.layers.append(_layer_cost(f"{name}.convs.{i}", conv, conv_shape, conv_macs, module=name))
        elif isinstance(module, nn.Conv2d | nn.Linear | Conv1x1):
            self.layers.append(_layer_cost(name, module, shape, macs))
        elif macs > 0:
            operator = flops.most_common(1)[0][0].__name__
            self.layers.append(_layer_cost(name, module, shape, macs, kind=operator))

    def uncounted(self) -> list[str]:
        """Return the number and the name of what was called and is in no layer; see `Cost.uncounted`."""
        counted = {name for layer in self.layers for name in (layer.name, layer.module)}
        kinds = Counter(
            type(module).__name__
            for name, module in self.called.items()
            if name not in counted and next(module.parameters(recurse=False), None) is not None
        )
        return [f"{count} {kind}" for kind, count in sorted((kinds + self.foreign_operators.calls).items())]


def _layer_cost(
    name: str, layer: nn.Module, shape: tuple[int, ...], macs: int, *, kind: str = "", module: str | None = None
) -> LayerCost:
    """Return the cost of one call of a layer, whose result has that shape; ``module`` is its own name if not given."""
    kernel_size, in_channels, out_channels = (0, 0), 0, 0
    if isinstance(layer, nn.Linear):
        kind, kernel_size = "linear", (1, 1)
        in_channels, out_channels = layer.in_features, layer.out_features
    elif isinstance(layer, nn.Conv2d | Conv1x1):
        kind, kernel_size = "conv", (int(layer.weight.shape[2]), int(layer.weight.shape[3]))
        in_channels, out_channels = layer.in_channels, layer.out_channels
    return LayerCost(
        name,
        kind,
        kernel_size,
        in_channels,
        out_channels,
        output_shape=shape,
        parameters=sum(p.numel() for p in layer.parameters(recurse=False)),
        macs=macs,
        activation_bytes=4 * math.prod(shape) if shape else 0,
        module=name if module is None else module,
    )


def _kernel_text(layer: LayerCost) -> str:
    if layer.kind == "conv":
        return "×".join(map(str, layer.kernel_size))
    return "dense" if layer.kind == "linear" else layer.kind
