"""``nin demo``: the main job on images that come along, and what a bottleneck saves, measured here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from nin import checkpoint
from nin.cli import commands
from nin.config import TrainConfig
from nin.inference import classifier as prediction
from nin.profiling import bottleneck, cost
from nin.training import CheckpointOptions, has_begun

SAMPLES, SAMPLES_FOLDER, MAPS_FOLDER = 6, "samples", "maps"

# channels that the bottleneck leaves, and images in a call
NARROW, BATCH = 64, 16


def run(out: Path, *, as_json: bool = False, config: TrainConfig | None = None) -> None:
    """Train on digits, test, write the report, predict a few images, and time the notes' bottleneck.

    Args:
        out: the run folder; that of an earlier demo is replaced, one that was interrupted goes on.
        as_json: print the figures as JSON on standard output in place of tables.
        config: the recipe; the default one if None.
    """
    clear(out)
    config = config or TrainConfig()
    step("1. Train a Network in Network on 1,346 handwritten digits (8×8 pixels, from scikit-learn)")
    images = commands.load_data("digits", seed=config.seed)
    keeping = CheckpointOptions(resume=has_begun(out))
    result = commands.train_visibly(images, config, out=out, keeping=keeping, again="the same command")
    if not as_json:
        commands.show_result(result)
    step("2. Write what it learned into a report")
    report = commands.write_report(out, images)
    step("3. Predict images that it has not seen")
    paths = write_samples(images, out / SAMPLES_FOLDER)
    classifier = prediction.load(out)
    predictions = classifier.predict(paths)
    if not as_json:
        commands.results.print(commands.predictions_table(classifier.classes, paths, predictions, 2))
    step("4. Shrink channels with a 1×1 convolution: 256 → 64 → 4×4 → 256 beside 256 → 4×4 → 256, on 28×28 pixels")
    rows = compare_bottleneck()
    if as_json:
        answers = [
            commands.prediction_dict(classifier.classes, *pair, 2) for pair in zip(paths, predictions, strict=True)
        ]
        commands.print_json({"run": str(out), **result.info.result, "predictions": answers, "bottleneck": rows})
    else:
        commands.results.print(bottleneck_table(rows))
    commands.words.print(
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


def clear(out: Path) -> None:
    """Remove what an earlier demo made, where nothing else is in the folder.

    Its samples tell it from other runs. One that was interrupted before them goes on.
    """
    names, samples = {*checkpoint.FILES, SAMPLES_FOLDER, MAPS_FOLDER}, out / SAMPLES_FOLDER
    ours = samples.is_dir() and all("-is-a-" in path.name for path in samples.iterdir())
    if ours and all(path.name in names for path in out.iterdir()):
        shutil.rmtree(out)


def step(text: str) -> None:
    """Print a heading."""
    commands.words.print(f"\n{text}", style="bold")


def write_samples(images: Any, folder: Path) -> list[Path]:
    """Write some test images as PNG files, named by their class, and return their paths."""
    folder.mkdir()
    chosen = torch.linspace(0, len(images.test) - 1, SAMPLES).long()
    paths = []
    for pixels, index in zip(images.test.fetch(chosen), chosen.tolist(), strict=True):
        paths.append(folder / f"{index:03d}-is-a-{images.classes[int(images.test.labels[index])]}.png")
        Image.fromarray(pixels[0].numpy()).save(paths[-1])
    return paths


def compare_bottleneck() -> list[dict[str, Any]]:
    """Return MACs, parameters and measured milliseconds of the two forms of the notes, float32, channels_last."""
    measured = bottleneck.measure(NARROW, images=BATCH)
    narrow, wide = bottleneck.forms(NARROW)
    rows = []
    for form, network, timing in (
        ("256 → 4×4 → 256", wide, measured.wide),
        (f"256 → 1×1 → {NARROW} → 4×4 → 256", narrow, measured.narrow),
    ):
        counted = cost.cost(network, (1, *measured.shape[1:]))
        figures = {"median_ms": timing.median_ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms}
        rows.append({"form": form, "macs": counted.macs, "parameters": counted.parameters, **figures})
    return rows


def bottleneck_table(rows: list[dict[str, Any]]) -> Table:
    """Return the comparison for the terminal, the last line with the ratios."""
    table = Table(title=f"batch {BATCH}, float32, {torch.get_num_threads()} threads")
    table.add_column("form")
    for name in ("MACs per image", "parameters", "milliseconds (20th to 80th percentile)"):
        table.add_column(name, justify="right")
    for row in rows:
        spread = f"{row['median_ms']:.1f} ({row['low_ms']:.1f} to {row['high_ms']:.1f})"
        table.add_row(row["form"], f"{row['macs']:,}", f"{row['parameters']:,}", spread)
    table.add_section()
    wide, narrow = rows
    ratios = [f"{wide[key] / narrow[key]:.1f}× less" for key in ("macs", "parameters", "median_ms")]
    table.add_row("the bottleneck", *ratios)
    return table
