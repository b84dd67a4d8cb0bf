"""`nin cost`: count and time what a network costs, layer by layer."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from cyclopts import Parameter

import nin
from nin import folders, names
from nin.cli.console import ProgressBar, fit_columns, messages, print_json, print_table, results, say_left_out
from nin.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from nin.profiling.cost import Cost

# Columns in the order in which a narrow terminal leaves them out.
LESS_NEEDED = ("activation", "MACs %", "output", "channels", "at least", "kernel")

# More classes, channels or pixels a side than any network has.
LARGEST = 1_000_000


def cost(
    model: str,
    /,
    *,
    classes: int | None = None,
    size: int | None = None,
    channels: int | None = None,
    trust: bool = False,
    count_only: Annotated[bool, Parameter(negative=None)] = False,
    json: bool = False,
) -> None:
    """Count parameters, multiply-accumulates (MACs) and activation bytes of a network, layer by layer, and time them.

    Args:
        model: nin_cifar, nin_imagenet, nin_digits, googlenet, or a run folder; or timm:NAME, torchvision:NAME,
            package.module:factory.
        classes: Number of classes. The network's usual one if not given.
        size: Height and width of the image, in pixels. What the network is meant for if not given.
        channels: 1 for grey images, 3 for colour.
        trust: Import the module that a run folder says its network is made by, where that is somebody's own code.
        count_only: Count, without running the network: no milliseconds, and no memory for the weights' results.
        json: Print the figures as JSON on standard output.
    """
    for name, value in (("classes", classes), ("size", size), ("channels", channels)):
        if value is not None and not 1 <= value <= LARGEST:
            raise UserError(f"{name} must be at least 1 and at most {LARGEST:,}, got {value}")
    if os.sep in model and ":" not in model:
        folders.check_is_run(Path(model))
    elif not Path(model).is_dir():
        names.check_network(model, also="a run folder, ")  # before PyTorch is imported, which takes seconds
    with nin.models.trust() if trust else contextlib.nullcontext():
        network, (usual_channels, height, width) = find_network(model, classes, channels)
        # a narrowed run is of plain layers, which `nin predict` fuses
        is_run = model not in nin.models.MODELS and Path(model).is_dir()
        whole = cast("nn.Module", nin.load(model).fastest) if is_run and not count_only else None
    shape = (1, channels or usual_channels, size or height, size or width)
    # Counted first: it takes milliseconds, and its errors say that the size does not fit.
    counted = count(model, network, shape)
    if not count_only:
        with ProgressBar("Timing the layers") as bar:
            counted = nin.cost(network, shape, measured=True, whole=whole, on_progress=bar.update)
    if json:
        print_json(counted.to_dict())
    else:
        show_cost(model, counted)


def find_network(model: str, classes: int | None, channels: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return nin's, a run folder's or another package's network, and the (C, H, W) that it is meant for.

    Raises:
        UserError: there is none of that name, or a run folder is to have other classes or channels than its own.
    """
    from nin import checkpoint, models
    from nin.models.factory import check_name, create_external_model

    if model in models.MODELS:
        given = {"num_classes": classes, "in_channels": channels}
        network = models.MODELS[model](**{name: value for name, value in given.items() if value is not None})
        pixels = models.IMAGE_SIZES[model]
        return network, (1 if model == "nin_digits" else 3, pixels, pixels)
    if Path(model).is_dir():
        if classes is not None or channels is not None:
            raise UserError(f"--classes and --channels go with the name of a network: {model} knows its own")
        network, info = checkpoint.load_model(Path(model))
        p = info.preprocessing
        return network, (p.channels, p.size, p.size)
    check_name(model, also="a run folder, ")
    external = create_external_model(model, classes=classes, channels=channels)
    return external.model.eval(), (external.channels, external.height, external.width)


def count(model: str, network: nn.Module, shape: tuple[int, ...]) -> Cost:
    """Return the cost without times.

    Raises:
        UserError: the network does not take images of that shape.
    """
    from nin.models.factory import explain_refused_images

    images = "×".join(map(str, shape[1:]))
    with explain_refused_images(network, model, images, given="nin counts networks of one batch of images"):
        return nin.cost(network, shape)


def show_cost(model: str, counted: Cost) -> None:
    """Print the cost as a table, and what is not in it."""
    shape = "×".join(map(str, counted.input_shape))
    title = f"{model}, input {shape}; 1 MAC = 2 floating-point operations"
    rows, left_out = fit_columns(counted.rows(), LESS_NEEDED)
    left = sum(name not in left_out for name in ("layer", "kernel", "channels", "output"))
    print_table(rows, left=left, title=title, total=True)
    say_left_out(left_out)
    if counted.uncounted:
        messages.print(f"not counted: {', '.join(counted.uncounted)}")
    if counted.measured is not None:
        results.print(str(counted.measured))
