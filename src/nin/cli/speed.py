"""`nin speed`: measure every sensible way to run a network faster, and keep the fastest."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

import nin
from nin import folders, names
from nin.cli.console import (
    ProgressBar,
    catch_stop_signals,
    fit_columns,
    messages,
    print_json,
    print_table,
    results,
    same_command,
    say_left_out,
)
from nin.cli.narrow import parse_numbers
from nin.engines.catalog import ENGINES
from nin.errors import UserError
from nin.speed_search.settings import SpeedSettings
from nin.value_checks import check_mean_std

# Columns in the order in which a narrow terminal leaves them out.
LESS_NEEDED = ("KL", "memory", "files", "accuracy")

DEFAULT_BUDGETS = "0.8,0.65,0.5"


def speed(
    network: str,
    /,
    *,
    data: str,
    lose: float = 1.0,
    batch: tuple[str, ...] = (),
    out: Path | None = None,
    budgets: str = DEFAULT_BUDGETS,
    narrow: Annotated[bool, Parameter(negative="--no-narrow")] = True,
    narrow_by: Literal["macs", "latency"] = "macs",
    finetune: int = 0,
    engine: tuple[str, ...] = (),
    threads: int | None = None,
    test_images: int = 2000,
    weights: Path | None = None,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    data_dir: Path | None = None,
    overwrite: bool = False,
    trust: bool = False,
    json: bool = False,
) -> None:
    """Make a network fast on this machine's CPU: measure every sensible way side by side, and keep the fastest.

    As it is and narrowed; in float32, bfloat16 and int8; in PyTorch, torch.compile, nin's operator, ONNX Runtime and
    OpenVINO, as far as they are installed. Stopped with Ctrl-C, the same command goes on where --out is given.

    Args:
        network: A run folder; or timm:NAME, torchvision:NAME, package.module:function that makes the network.
        data: Images as for `nin train`, or a folder of images without classes. The test images compare the answers;
            int8 is calibrated and layers are fitted on training images only.
        lose: Points of accuracy that may be lost at most; without labels, per cent of the answers that may change.
        batch: Images at a time that are timed; several with commas between them, or given several times. The first one
            decides; 1 if none is given.
        out: The folder to make: the fastest, ready to use, with an example; the page and the figures.
        budgets: Shares that narrowed networks keep, of their multiplications, see --narrow-by; "none" tries none.
        narrow: Try narrowed networks; --no-narrow is the same as --budgets none.
        narrow_by: What the budgets are shares of: macs, the multiplications, with the same plans each time; or latency,
            the time in the engine that is the fastest for the network as it is.
        finetune: Epochs of training of each narrowed network.
        engine: eager, compile, nin, onnxruntime, openvino; several with commas between them, or given several times.
            All if not given.
        threads: Of every engine; the fastest number is looked for if not given.
        test_images: That are looked at, at most.
        weights: With the name of a network: its weights, model.safetensors or a state_dict that torch.save wrote
            (read without running code).
        size: With the name of a network: height and width that images are brought to, in pixels.
        mean: With the name of a network: the channels' mean, such as 0.485,0.456,0.406.
        std: With the name of a network: the channels' standard deviation.
        data_dir: Where the files of mnist to svhn lie.
        overwrite: Remove an earlier search that lies in the folder before this one begins; a folder that holds anything
            else is refused.
        trust: Import the module that a run says its network is made by, where that is somebody's own code.
        json: Print the figures as JSON on standard output.
    """
    shares = parse_numbers("budgets", budgets) if narrow and budgets.strip().lower() != "none" else ()
    means, stds = parse_numbers("mean", mean), parse_numbers("std", std)
    # refused before PyTorch is imported, which takes seconds
    check_mean_std(means, stds)
    names.check_source(data)
    batches = tuple(whole_number("batch", part) for part in split_at_commas(batch) or ("1",))
    engines = split_at_commas(engine) or tuple(ENGINES)
    SpeedSettings(lose, batches, shares, narrow_by, finetune, engines, threads, test_images)
    if Path(network).is_dir() or (os.sep in network and ":" not in network):
        folders.check_is_run(Path(network))
    else:
        names.check_external(network)
        if weights is not None and not weights.is_file():
            raise UserError(f"--weights: {weights} does not exist")
    if out is not None:
        folders.check_search(out, overwrite=overwrite)
    # every figure is written as soon as it is known, so Ctrl-C may come at any time; a fine-tuning saves its state
    received: list[int] = []
    with ProgressBar("Reading the images", percent=True) as bar, contextlib.ExitStack() as stack:
        if finetune:
            received = stack.enter_context(catch_stop_signals())
        else:  # leave nothing behind, neither processes nor the temporary folder
            before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            stack.callback(signal.signal, signal.SIGTERM, before)
        try:
            found = nin.speed(
                network,
                data,
                lose=lose,
                batches=batches,
                budgets=shares,
                narrow_by=narrow_by,
                finetune=finetune,
                engines=engines,
                threads=threads,
                test_images=test_images,
                weights=weights,
                size=size,
                mean=means,
                std=stds,
                data_dir=data_dir,
                out=out,
                overwrite=overwrite,
                trust=trust,
                stop=lambda: bool(received),
                on_progress=bar.on_progress,
            )
        except KeyboardInterrupt:
            if out is None:
                bar.line("Nothing is kept without --out, the folder from which a stopped search goes on.")
            else:
                bar.line(f"What was measured is kept. Go on with: {same_command(without=('--overwrite',))}")
            raise
    if json:
        print_json({"out": None if out is None else str(out), **found.to_dict()})
        return
    rows, left_out = fit_columns(found.table(), LESS_NEEDED)
    print_table(rows, left=3, title=f"{found.network} on {found.images}")
    say_left_out(left_out)
    results.print("\n".join(found.lines()))
    if out is not None and found.chosen is not None:
        messages.print(f"Use it: python {out / 'example.py'} IMAGE…")


def split_at_commas(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the parts of what was given several times, or with commas between them."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def whole_number(name: str, text: str) -> int:
    """Return the whole number that a text is.

    Raises:
        UserError: it is none.
    """
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name} must be whole numbers with commas between them, such as 1,32, got {text!r}") from error
