"""What a layer looks at and gives: means and covariances of patches in float64, collected by hooks in one pass."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nin.errors import UserError
from nin.models.layer_shape import LayerShape, inputs_of, shape_of
from nin.runtime import distributed

# A patch of more values gets no covariance: 4608 (512 channels, 3×3) takes 170 MB in float64.
LARGEST_PATCH = 4608

# Places of each image that are looked at; they are the same for all images, and all where there are fewer.
# Neighbouring places say much the same: of 500 images these are 32,000 samples for at most 4,608 values.
PLACES_PER_IMAGE = 64


class Moments:
    """Sums from which the means and covariances of patches x and results y come; they add up.

    Args:
        groups: independent blocks of channels; 1 for most layers.
        inputs: values of x in one group.
        outputs: values of y in one group.
        device: where to add up.
        products: which sums of products to keep: "xx", "yx", "yy".
    """

    def __init__(
        self, groups: int, inputs: int, outputs: int, *, device: torch.device, products: tuple[str, ...]
    ) -> None:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(groups, *size, dtype=torch.float64, device=device)

        sizes = {"x": inputs, "y": outputs}
        self.products = products
        self.sums = {"count": zeros(), "x": zeros(inputs), "y": zeros(outputs)}
        self.sums |= {name: zeros(sizes[name[0]], sizes[name[1]]) for name in products}

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples: x (groups, inputs, M) and y (groups, outputs, M)."""
        values, sums = {"x": x.double(), "y": y.double()}, self.sums
        sums["count"] += x.shape[2]
        for name, value in values.items():
            sums[name] += value.sum(2)
        for name in self.products:
            for g in range(len(x)):  # a single product is twice as fast as a batch of one
                sums[name][g] += values[name[0]][g] @ values[name[1]][g].mT

    def reduce(self) -> None:
        """Add up over all processes of a job."""
        if distributed.is_initialized():
            for value in self.sums.values():
                dist.all_reduce(value)

    @property
    def full(self) -> bool:
        """Whether the covariance of x is known."""
        return "xx" in self.products

    @property
    def count(self) -> int:
        """Samples added."""
        return int(self.sums["count"][0])

    def mean(self, name: str) -> Tensor:
        """Return the mean of x (groups, inputs) or y (groups, outputs)."""
        return self.sums[name] / self.sums["count"][:, None]

    def covariance(self, name: str) -> Tensor:
        """Return Cov(x) ("xx"), Cov(y, x) ("yx") or Cov(y) ("yy"), each with the groups first."""
        a, b = self.mean(name[0]), self.mean(name[1])
        return self.sums[name] / self.sums["count"][:, None, None] - a[:, :, None] * b[:, None, :]


def observed_places(shape: LayerShape) -> Tensor:
    """Return the places of the output that are looked at: int64 indices into height · width."""
    if shape.places <= PLACES_PER_IMAGE:
        return torch.arange(shape.places)
    generator = torch.Generator().manual_seed(shape.places)
    return torch.randperm(shape.places, generator=generator)[:PLACES_PER_IMAGE].sort().values


def patches(x: Tensor, shape: LayerShape, places: Tensor) -> Tensor:
    """Return what a layer looks at, its padding included.

    Args:
        x: the layer's input: (N, C, H, W) or (C, H, W); (…, C) for a fully connected layer.
        shape: the layer's geometry.
        places: of the output, as `observed_places` gives them.

    Returns:
        (groups, C / groups · kH · kW, N · places).
    """
    if shape.kind == "linear":
        rows = x.reshape(-1, shape.places, x.shape[-1])[:, places]
        return rows.reshape(1, -1, x.shape[-1]).mT
    x = padded(x if x.dim() == 4 else x[None], shape)
    n, c, width = x.shape[0], x.shape[1], x.shape[3]
    row, column = places // shape.output_size[1], places % shape.output_size[1]
    up = torch.arange(shape.kernel_size[0]) * shape.dilation[0]
    along = torch.arange(shape.kernel_size[1]) * shape.dilation[1]
    taps = (up[:, None] * width + along).flatten()  # (k²,)
    starts = row * shape.stride[0] * width + column * shape.stride[1]  # (places,)
    index = (taps[:, None] + starts).flatten().to(x.device)
    values = x.flatten(2).index_select(2, index)  # (N, C, k² · places)
    values = values.view(n, shape.groups, c // shape.groups, len(taps), len(places))
    return values.permute(1, 2, 3, 0, 4).flatten(3).flatten(1, 2)


def padded(x: Tensor, shape: LayerShape) -> Tensor:
    """Return images (N, C, H, W) with the layer's padding around them."""
    if shape.padding == "same":
        total = [d * (k - 1) for d, k in zip(shape.dilation, shape.kernel_size, strict=True)]
        sides = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    elif isinstance(shape.padding, str):  # "valid"
        sides = [0, 0, 0, 0]
    else:
        sides = [shape.padding[1]] * 2 + [shape.padding[0]] * 2
    if not any(sides):
        return x
    return F.pad(x, sides, mode="constant" if shape.padding_mode == "zeros" else shape.padding_mode)


def results(y: Tensor, shape: LayerShape, places: Tensor) -> Tensor:
    """Return what a layer gave at these places: (groups, C_out / groups, N · places)."""
    if shape.kind == "linear":
        return y.reshape(-1, shape.places, y.shape[-1])[:, places].reshape(1, -1, y.shape[-1]).mT
    y = y if y.dim() == 4 else y[None]
    values = y.flatten(2)[:, :, places.to(y.device)]  # (N, C_out, places)
    values = values.view(len(values), shape.groups, values.shape[1] // shape.groups, len(places))
    return values.permute(1, 2, 0, 3).flatten(2)


def measure_shapes(model: nn.Module, layers: dict[str, nn.Module], batches: list[Any]) -> dict[str, LayerShape]:
    """Run one batch and return the geometry of the layers that it calls, in the order of the calls."""
    found: dict[str, LayerShape] = {}

    def record(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if name in found:
            found[name] = dataclasses.replace(found[name], calls=found[name].calls + 1)
            return
        shape = shape_of(name, module)
        if shape.kind == "linear":
            # the first dimension is the batch
            count = max(1, x[..., 0].numel() // (x.shape[0] if x.dim() > 1 else 1))
            sizes = {"input_size": (count, 1), "output_size": (count, 1)}
        else:
            sizes = {"input_size": (x.shape[-2], x.shape[-1]), "output_size": (y.shape[-2], y.shape[-1])}
        found[name] = dataclasses.replace(shape, **sizes)  # type: ignore[arg-type]

    with watch(layers, record), torch.no_grad():
        for args, kwargs in inputs_of(batches[:1]):
            model(*args, **kwargs)
    return found


@contextlib.contextmanager
def watch(layers: dict[str, nn.Module], record: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``record(name, module, input, output)`` after each call of a layer."""

    def hook(name: str) -> Callable[..., None]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            record(name, module, args[0] if args else kwargs["input"], output)

        return call

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: nn.Module,
    shapes: dict[str, LayerShape],
    batches: list[Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Moments]:
    """Run all batches and return the moments of every layer.

    Raises:
        UserError: a layer's input or result is no finite number; it is named.
    """
    layers = {name: model.get_submodule(name) for name in shapes}
    moments = {name: make_moments(shape, layers[name], "xx") for name, shape in shapes.items()}
    places = {name: observed_places(shape) for name, shape in shapes.items()}

    def record(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        check_finite(name, x, y)
        shape = shapes[name]
        moments[name].add(patches(x, shape, places[name]), results(y, shape, places[name]))

    with watch(layers, record), torch.no_grad():
        for done, (args, kwargs) in enumerate(inputs_of(batches)):
            model(*args, **kwargs)
            if on_progress:
                on_progress(done + 1, len(batches))
    reduce_all(moments)
    return moments


def reduce_all(moments: dict[str, Moments]) -> None:
    """Add up the moments of layers over all processes of a job.

    Raises:
        UserError: a layer's are not finite, though its values are; it is named.
    """
    for name, value in moments.items():
        value.reduce()
        if not all(bool(added.isfinite().all()) for added in value.sums.values()):
            raise UserError(f"the covariances of {name} must be finite, got NaN or infinity: its values are too large")


def make_moments(shape: LayerShape, module: nn.Module, *products: str) -> Moments:
    """Return empty moments for a layer; of patches that are too large, those of its result only."""
    device = next(module.parameters()).device
    kept = products if shape.patch <= LARGEST_PATCH else ("yy",)
    return Moments(shape.groups, shape.patch, shape.out_channels // shape.groups, device=device, products=kept)


def check_finite(name: str, x: Tensor, y: Tensor) -> None:
    """Stop where a value is NaN or infinite.

    Raises:
        UserError: it names the layer.
    """
    for what, value in (("input", x), ("result", y)):
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
            raise UserError(f"the {what} of {name} must be finite, got NaN or infinity: check the model and the images")
