"""`nin demo`: train on digits, report, predict, and time a bottleneck beside the convolution that it replaces."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import nin
from nin import folders
from nin.cli.console import messages, print_json, print_table
from nin.cli.predict import prediction_dict, show_predictions
from nin.cli.train import load_data, show_result, train_with_progress, write_report
from nin.config import TrainConfig
from nin.display.numbers import format_number_of

SAMPLES, SAMPLES_FOLDER, MAPS_FOLDER = 6, "samples", "maps"

# that the bottleneck leaves
BOTTLENECK_CHANNELS = 64


def demo(
    *,
    out: Path = Path("runs/demo"),
    json: bool = False,
    config: Annotated[TrainConfig | None, Parameter(parse=False)] = None,
    bottleneck_batch_size: Annotated[int, Parameter(parse=False)] = 16,
) -> None:
    """Do the main job on images that come along: train, test, look, predict, and time a bottleneck.

    Args:
        out: The run folder to make; one that an earlier demo made is replaced.
        json: Print the result as JSON on standard output.
        config: The recipe, for tests; the default one if not given.
        bottleneck_batch_size: Images in a call of the bottleneck, for tests.
    """
    remove_earlier_demo(out)
    config = config or TrainConfig()
    print_heading("1. Train a Network in Network on 1,346 handwritten digits (8×8 pixels, from scikit-learn)")
    images = load_data("digits", seed=config.seed)
    result = train_with_progress(images, config, out=out, command=command(out), resume=folders.has_begun(out))
    if not json:
        show_result(result)
    print_heading("2. Write what it learned into a report")
    report = write_report(out, images)
    print_heading("3. Predict images that it has not seen")
    paths = write_samples(images, out / SAMPLES_FOLDER)
    predictions = nin.load(out).predict(paths)
    if not json:
        show_predictions(paths, predictions, 2)
    print_heading(
        "4. Shrink channels with a 1×1 convolution: 256 → 64 → 4×4 → 256 beside 256 → 4×4 → 256, on 28×28 pixels"
    )
    rows = compare_bottleneck(bottleneck_batch_size)
    if json:
        samples = [prediction_dict(*pair, 2) for pair in zip(paths, predictions, strict=True)]
        print_json({"run": str(out), **result.info.result, "predictions": samples, "bottleneck": rows})
    else:
        show_bottleneck(rows, bottleneck_batch_size)
    print_next_steps(out, report)


def command(out: Path) -> str:
    """Return what a person typed to make the demo: `make demo` says so, as it calls this program."""
    return os.environ.get("NIN_TYPED") or f"nin demo --out {shlex.quote(str(out))}"


def print_next_steps(out: Path, report: Path) -> None:
    """Print which files the demo wrote, and commands to try."""
    from nin import checkpoint

    messages.print(
        f"\nWhat is where\n"
        f"  {report}  open it in a browser: accuracy, mistakes, and where the network looks\n"
        f"  {out / checkpoint.MODEL_FILE}  the weights; {checkpoint.CONFIG_FILE} beside it says what they are\n"
        f"  {out / SAMPLES_FOLDER}  the images of step 3\n"
        f"What to try next\n"
        f"  nin train FOLDER --out RUN    your own images, one folder for each class\n"
        f"  nin predict {out} {out / SAMPLES_FOLDER} --maps {out / MAPS_FOLDER}\n"
        f"  nin cost nin_cifar            parameters, multiplications and milliseconds, layer by layer\n"
        f"The program nin is in .venv/bin: source .venv/bin/activate puts it on the path."
    )


def remove_earlier_demo(out: Path) -> None:
    """Remove the folder of an earlier demo, if nothing else is in it.

    The names of its samples tell it from other runs. A demo that was interrupted before them is resumed.
    """
    from nin import checkpoint

    names, samples = {*checkpoint.FILES, SAMPLES_FOLDER, MAPS_FOLDER}, out / SAMPLES_FOLDER
    is_demo = samples.is_dir() and all("-is-a-" in path.name for path in samples.iterdir())
    if is_demo and all(path.name in names for path in out.iterdir()):
        shutil.rmtree(out)


def print_heading(text: str) -> None:
    """Print the heading of a part of the demo."""
    messages.print(f"\n{text}", style="bold")


def write_samples(images: nin.data.Data, folder: Path) -> list[Path]:
    """Write some test images as PNG files, named by their class, and return their paths."""
    import torch

    from nin.data.arrays import to_pillow

    folder.mkdir()
    chosen = torch.linspace(0, len(images.test) - 1, SAMPLES).long()
    paths = []
    for pixels, index in zip(images.test.fetch(chosen), chosen.tolist(), strict=True):
        paths.append(folder / f"{index:03d}-is-a-{images.classes[int(images.test.labels[index])]}.png")
        to_pillow(pixels[0]).save(paths[-1])
    return paths


def compare_bottleneck(batch_size: int) -> list[dict[str, Any]]:
    """Return MACs, parameters and measured milliseconds of the 4×4 convolution alone and behind a bottleneck."""
    from nin.profiling import bottleneck_timing

    measured = bottleneck_timing.measure(BOTTLENECK_CHANNELS, images=batch_size)
    narrow, wide = bottleneck_timing.build_networks(BOTTLENECK_CHANNELS)
    rows = []
    for form, network, timing in (
        ("256 → 4×4 → 256", wide, measured.wide),
        (f"256 → 1×1 → {BOTTLENECK_CHANNELS} → 4×4 → 256", narrow, measured.narrow),
    ):
        counted = nin.cost(network, (1, *measured.shape[1:]))
        figures = {"median_ms": timing.median_ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms}
        rows.append({"form": form, "macs": counted.macs, "parameters": counted.parameters, **figures})
    return rows


def show_bottleneck(rows: list[dict[str, Any]], batch_size: int) -> None:
    """Print the comparison as a table; its last row has the ratios."""
    import torch

    cells = [("form", "MACs per image", "parameters", "milliseconds (20th to 80th percentile)")]
    for row in rows:
        spread = f"{row['median_ms']:.1f} ({row['low_ms']:.1f} to {row['high_ms']:.1f})"
        cells.append((row["form"], f"{row['macs']:,}", f"{row['parameters']:,}", spread))
    wide, narrow = rows
    macs, parameters, ms = (f"{wide[key] / narrow[key]:.1f}× less" for key in ("macs", "parameters", "median_ms"))
    cells.append(("the bottleneck", macs, parameters, ms))
    title = f"batch {batch_size}, float32, {format_number_of(torch.get_num_threads(), 'thread')}"
    print_table(cells, left=1, title=title, total=True)
