"""The layers of any model that can be narrowed, their geometry, and the plain modules that take their places."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nin.errors import UserError
from nin.layers import Conv1x1, MLPConv
from nin.models import NiN


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The geometry of one convolution or fully connected layer, and how large its images are.

    Attributes:
        name: its path in the model.
        kind: "conv" or "linear".
        in_channels: values that it looks at, at one place.
        out_channels: values that it gives, at one place.
        kernel_size: (height, width); (1, 1) for a fully connected layer, as are the next two.
        stride: (vertical, horizontal), in pixels.
        dilation: (vertical, horizontal), in pixels.
        padding: (vertical, horizontal), in pixels, or "same".
        groups: independent blocks of channels.
        padding_mode: as PyTorch names it.
        bias: whether it adds a number to each output channel.
        input_size: (height, width) of its input; (places, 1) for a fully connected layer.
        output_size: the same of its output.
        calls: how often one run of the model calls it.
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

    @property
    def taps(self) -> int:
        """Places of the image that the layer looks at together."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def places(self) -> int:
        """Places of the image that the layer gives values for."""
        return self.output_size[0] * self.output_size[1]

    @property
    def patch(self) -> int:
        """Values that one group looks at together: C_in / groups · kH · kW."""
        return self.in_channels // self.groups * self.taps

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.calls * self.places * self.out_channels * self.patch

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.out_channels * (self.patch + self.bias)

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is looked at alone."""
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels


def shape_of(name: str, module: nn.Module) -> LayerShape:
    """Return the geometry of a layer; the sizes of its images are still unknown."""
    if isinstance(module, nn.Linear):
        return LayerShape(name, "linear", module.in_features, module.out_features, bias=module.bias is not None)
    assert isinstance(module, nn.Conv2d)
    return LayerShape(
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


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def make_layer(shape: LayerShape, like: Tensor) -> nn.Module:
    """Return a new layer of that geometry, on the device and in the dtype of ``like``."""
    options: dict[str, Any] = {"bias": shape.bias, "device": like.device, "dtype": like.dtype}
    if shape.kind == "linear":
        return nn.Linear(shape.in_channels, shape.out_channels, **options)
    return nn.Conv2d(
        shape.in_channels,
        shape.out_channels,
        shape.kernel_size,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
        padding_mode=shape.padding_mode,  # type: ignore[arg-type]
        **options,
    )


def factors(
    shape: LayerShape, form: str, rank_in: int | None, rank_out: int | None, *, inputs: int, outputs: int
) -> tuple[LayerShape, ...]:
    """Return the layers that take the place of one, first to last.

    Args:
        shape: the original layer.
        form: "keep"; "output": k×k to ``rank_out`` channels, then 1×1; "input": 1×1 to ``rank_in``, then k×k;
            "tucker": 1×1 to ``rank_in``, k×k to ``rank_out``, 1×1. Ranks are per group.
        rank_in: channels that the first 1×1 leaves, or None.
        rank_out: channels that the k×k leaves, or None.
        inputs: channels of the narrowed input.
        outputs: channels of the narrowed output.
    """
    if form == "keep":
        groups = inputs if shape.is_depthwise else shape.groups
        bias = shape.bias or (inputs != shape.in_channels and not shape.is_depthwise)
        return (dataclasses.replace(shape, in_channels=inputs, out_channels=outputs, groups=groups, bias=bias),)
    pieces, width = [], inputs
    unit = LayerShape(shape.name, shape.kind, 1, 1, groups=shape.groups, bias=False, calls=shape.calls)
    if form in ("input", "tucker"):
        assert rank_in is not None
        size = {"input_size": shape.input_size, "output_size": shape.input_size}
        pieces.append(dataclasses.replace(unit, in_channels=inputs, out_channels=rank_in * shape.groups, **size))  # type: ignore[arg-type]
        width = rank_in * shape.groups
    last = outputs if rank_out is None else rank_out * shape.groups
    pieces.append(dataclasses.replace(shape, in_channels=width, out_channels=last, bias=rank_out is None))
    if rank_out is not None:
        size = {"input_size": shape.output_size, "output_size": shape.output_size}
        pieces.append(dataclasses.replace(unit, in_channels=last, out_channels=outputs, bias=True, **size))  # type: ignore[arg-type]
    return tuple(pieces)


def expand(model: nn.Module) -> nn.Module:
    """Return a copy in which nin's own layers are plain PyTorch: ``nn.Conv2d`` and activations, one after the other."""
    model = copy.deepcopy(model)
    if isinstance(model, NiN):
        model.fold()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, MLPConv | Conv1x1):
            if not name:
                return module.to_sequential()
            set_module(model, name, module.to_sequential())
    return model


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into the place of the one of that name, everywhere where the model holds it."""
    old = model.get_submodule(name)
    module.train(old.training)
    for alias, found in list(model.named_modules(remove_duplicate=False)):
        if found is old:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, module)


def find_layers(model: nn.Module, skip: tuple[str, ...] = ()) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that can be narrowed, by name, and the others with the reason.

    Args:
        model: with nin's own layers expanded.
        skip: patterns of names to leave alone, such as "layer1.*".

    Raises:
        UserError: a pattern matches no layer.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    names = [name for name, module in model.named_modules() if isinstance(module, _WEIGHTED)]
    skipped = _match(names, skip)
    layers, reasons = {}, {}
    for name in names:
        module = model.get_submodule(name)
        reason = "asked for" if name in skipped else _why_not(module, owners)
        if reason is None:
            layers[name] = module
        else:
            reasons[name] = reason
    return layers, reasons


_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def _why_not(module: nn.Module, owners: dict[int, int]) -> str | None:
    """Return why a layer is left alone, or None."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution"
    if isinstance(module, nn.Conv1d | nn.Conv3d):
        return f"a convolution in {1 if isinstance(module, nn.Conv1d) else 3} dimensions"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"a {type(module).__name__}, whose forward may differ"
    if module._forward_pre_hooks:
        return "something else sets its weight before each call"
    if not isinstance(module.weight, Tensor) or isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "it has no weight yet"
    if module.weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}"
    if owners[id(module.weight)] > 1:
        return "it shares its weight with another layer"
    return None


def _match(names: list[str], patterns: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        matched = {n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")}
        if not matched:
            raise UserError(f"skip must match a layer's name, got {pattern!r}; layers are {_some(names)}")
        found |= matched
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def inputs_of(batches: list[Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield what to call the model with: a tensor, the first of a tuple or list, or a mapping's keyword arguments."""
    for batch in batches:
        if isinstance(batch, Tensor):
            yield (batch,), {}
        elif isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
            yield (batch[0],), {}
        elif isinstance(batch, dict):
            yield (), batch
        else:
            raise UserError(
                f"a batch must be a tensor, a tuple or list that begins with one, or a dict of keyword arguments, "
                f"got {type(batch).__name__}"
            )
