"""Running calibration batches: how a batch is passed to the model, and hooks that record its layers' calls."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.errors import UserError, is_out_of_memory
from nin.models.factory import describe_other_input
from nin.models.layer_spec import LayerSpec
from nin.runtime import distributed

# Pixels of images that go through a network together: eight photos of 224×224. A backward pass keeps the results of all
# layers, 80 MB of each such photo in EfficientNet-Lite0.
PIXELS_AT_A_TIME = 8 * 224 * 224


def model_inputs(batches: list[Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield the (args, kwargs) of the model for each batch.

    Raises:
        UserError: a batch is no tensor, no tuple or list that begins with one, and no dict of keyword arguments.
    """
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


def find_refused_batch(name: str, model: nn.Module, batches: list[Any]) -> UserError | None:
    """Return what is wrong with the first batch that a model does not take, None where it takes all.

    Of tensors one image of each shape and dtype is tried; of keyword arguments the first batch, whole.

    Args:
        name: of the batches, for the message.
        model: that takes them.
        batches: that it is to be called with.
    """
    tried: set[object] = set()
    for number, (args, kwargs) in enumerate(model_inputs(batches), 1):
        x = args[0] if args else None
        kind = "keyword arguments" if x is None else (x.dtype, x.shape[1:])
        what = f"{name}: batch {number}{'' if x is None else _describe(x)}"
        if x is not None and not x.numel():
            return UserError(f"{what} holds no image: {_what_is_taken(model)}")
        if kind in tried:
            continue
        tried.add(kind)
        if x is not None and x.dim() and _call_error(model, (x[:1],), {}) is None:
            continue
        if (error := _call_error(model, args, kwargs)) is not None:  # some networks take batches of one size only
            reason = " ".join(str(error).split())[:160].rstrip(".")
            refused = UserError(f"{what} is not taken by the network: {_what_is_taken(model)} ({reason})")
            refused.__cause__ = error
            return refused
    return None


def _call_error(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:  # somebody's own network may raise anything
        if is_out_of_memory(error):
            raise
        return error
    return None


def _describe(x: Tensor) -> str:
    return f" of shape {tuple(x.shape)} in {str(x.dtype).removeprefix('torch.')}"


def _what_is_taken(model: nn.Module) -> str:
    """Return what a model takes, by its first layer."""
    first = next((module for module in model.modules() if module._parameters), None)
    if other := describe_other_input(model):
        return f"it takes {other}"
    if not isinstance(first, nn.Conv2d):
        return "see what its forward takes"
    dtype = str(first.weight.dtype).removeprefix("torch.")
    return f"its first layer takes (N, {first.in_channels}, H, W) in {dtype} on {first.weight.device}"


def in_parts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield a batch of large images as several of at most `PIXELS_AT_A_TIME`, any other as it is."""
    if kwargs or args[0].dim() != 4 or not args[0].numel():
        yield args, kwargs
        return
    pixels = args[0].shape[2] * args[0].shape[3]
    for part in args[0].split(max(1, PIXELS_AT_A_TIME // pixels)):
        yield (part,), kwargs


def first_batches(batches: list[Any], images: int) -> list[Any]:
    """Return the first batches of this process that with those of the others hold about so many images."""
    taken: list[Any] = []
    count = 0
    for batch in batches:
        if count * distributed.world_size() >= images:
            break
        taken.append(batch)
        first = batch[0] if isinstance(batch, tuple | list) else batch
        # a dict of keyword arguments does not say how many images it holds: take eight of them
        count += len(first) if isinstance(first, Tensor) else images // 8
    return taken


def float_tensors(values: Any) -> list[Tensor]:
    """Return the floating-point tensors of a model's output, whatever nests them."""
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


@contextlib.contextmanager
def record_calls(
    layers: dict[str, nn.Module], record: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``record(name, module, input, output)`` after each forward of a layer, by hooks."""

    def hook(name: str) -> Callable[..., None]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            record(name, module, args[0] if args else kwargs["input"], output)

        return call

    with contextlib.ExitStack() as handles:
        for name, module in layers.items():
            # removes itself as a context manager
            handles.enter_context(module.register_forward_hook(hook(name), with_kwargs=True))
        yield


def measure_layer_specs(model: nn.Module, layers: dict[str, nn.Module], batches: list[Any]) -> dict[str, LayerSpec]:
    """Run one batch and return the geometry of the layers that it calls, in the order of the calls."""
    found: dict[str, LayerSpec] = {}

    def record(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if name in found:
            found[name] = dataclasses.replace(found[name], calls=found[name].calls + 1)
            return
        if isinstance(module, nn.Linear):
            # the first dimension is the batch
            count = max(1, x[..., 0].numel() // (x.shape[0] if x.dim() > 1 else 1))
            sizes = (count, 1), (count, 1)
        else:
            sizes = (x.shape[-2], x.shape[-1]), (y.shape[-2], y.shape[-1])
        found[name] = dataclasses.replace(LayerSpec.of_module(name, module), input_size=sizes[0], output_size=sizes[1])

    with record_calls(layers, record), torch.no_grad():
        args, kwargs = next(in_parts(*next(model_inputs(batches))))
        model(*args, **kwargs)
    return found
