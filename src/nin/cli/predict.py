"""`nin predict`: classify images; a table, JSON, CSV or Parquet files, and heatmaps."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nin
from nin.cli.check import show_findings
from nin.cli.console import ProgressBar, messages, print_json, print_table
from nin.display.numbers import format_percent
from nin.errors import UserError
from nin.runtime import torchrun
from nin.runtime.files import write_atomically

if TYPE_CHECKING:
    from nin.data import PathList, ShardSet
    from nin.inference.classifier import Classifier, Prediction


def predict(
    run: Path,
    images: list[Path],
    /,
    *,
    top: int = 3,
    device: str = "cpu",
    json: bool = False,
    csv: Path | None = None,
    parquet: Path | None = None,
    resume: bool = False,
    maps: Path | None = None,
) -> None:
    """Classify images with a trained network.

    Args:
        run: The folder that `nin train` made.
        images: Image files; a folder stands for all images in it. Or one folder, pattern or URL of WebDataset shards.
        top: How many classes to show for each image.
        device: Where to compute: cpu, cuda, cuda:1, mps.
        json: Print the predictions as JSON on standard output.
        csv: Write the predictions, with the probability of every class, into this file, however many there are.
        parquet: The same as a Parquet file.
        resume: Go on with the file where an interrupted command stopped.
        maps: Write into this folder, for each image, where in it the evidence for its class lies.
    """
    if csv is not None and parquet is not None:
        raise UserError("give --csv or --parquet, not both")
    if resume and csv is None and parquet is None:
        raise UserError("--resume goes on with a file: give --csv FILE or --parquet FILE")
    if parquet is not None and parquet.suffix != ".parquet":
        raise UserError(f"{parquet}: the name of a Parquet file must end in .parquet")
    classifier = nin.load(run, device=device)
    is_sharded = len(images) == 1 and nin.data.is_shards(images[0])
    source = nin.data.open_shards(images[0]) if is_sharded else nin.data.PathList(image_paths(images))
    table = csv or parquet
    if table is not None:
        write_predictions(classifier, source, table, resume=resume)
        if maps is None and not json:
            return
    if isinstance(source, nin.data.ShardSet):
        raise UserError("predictions of shards are written into a file: give --csv FILE or --parquet FILE")
    paths, predictions = predict_paths(classifier, source, required={str(path) for path in images})
    if maps is not None:
        write_maps(classifier, paths, predictions, maps)
    if json:
        print_json([prediction_dict(*pair, top) for pair in zip(paths, predictions, strict=True)])
    else:
        show_predictions(paths, predictions, top)


def image_paths(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the image files among the paths, and those in the folders among them.

    Raises:
        UserError: a path is missing, or a folder holds no image.
    """
    for path in paths:
        if path.is_dir():
            findings: list[nin.data.Finding] = []
            inside = sorted(nin.data.find_images(path, findings=findings))
            if not inside:
                raise UserError(f"{path} holds no image ({nin.data.FORMAT_EXAMPLES})")
            show_findings(findings)
            yield from inside
        elif path.exists():
            yield str(path)
        else:
            raise UserError(f"{path} does not exist")


def write_predictions(classifier: Classifier, source: ShardSet | PathList, table: Path, *, resume: bool) -> None:
    """Write the predictions into a CSV or Parquet file; under torchrun, each process writes its part."""
    from nin.inference import batch_predict

    partition, started = batch_predict.Partition(torchrun.rank(), torchrun.world_size()), time.monotonic()
    with ProgressBar("Predicting", len(source)) as bar:
        counts = batch_predict.predict_to_file(
            classifier, source, table, resume=resume, partition=partition, on_progress=bar.update
        )
    if partition.rank:
        return
    new, seconds = counts.total - counts.resumed, time.monotonic() - started
    messages.print(f"{len(source):,} images in {table}, {new:,} of them now, {new / seconds:,.0f} per second")
    if counts.unreadable:
        messages.print(f"{counts.unreadable:,} cannot be read: their rows have a problem instead of a label")


def predict_paths(
    classifier: Classifier, source: PathList, *, required: set[str]
) -> tuple[list[Path], list[Prediction]]:
    """Return the paths of the readable images, and their predictions.

    Args:
        classifier: of the run.
        source: the paths of the images.
        required: the paths that must be readable; others are left out with a message.

    Raises:
        UserError: an image of ``required`` cannot be read.
    """
    from nin.inference.classifier import INFERENCE_BATCH_SIZE

    p = classifier.info.preprocessing
    paths: list[Path] = []
    predictions: list[Prediction] = []
    with ProgressBar("Predicting", len(source)) as bar:
        for start in range(0, len(source), INFERENCE_BATCH_SIZE):
            batch = []
            for path in source[start : start + INFERENCE_BATCH_SIZE]:
                try:
                    batch.append(nin.data.decode(path, size=p.size, channels=p.channels, value_range=p.value_range))
                    paths.append(Path(path))
                except UserError as error:
                    if path in required:
                        raise
                    messages.print(f"left out {error}")
            predictions += classifier.predict(batch)
            bar.update(start + len(batch), len(source))
    return paths, predictions


def top_classes(p: Prediction, top: int) -> list[tuple[str, float]]:
    """Return the most probable classes with their probabilities."""
    return sorted(zip(p.classes, p.probabilities, strict=True), key=lambda pair: -pair[1])[:top]


def prediction_dict(path: Path, p: Prediction, top: int) -> dict[str, Any]:
    """Return one prediction for JSON."""
    ranked = [{"class": name, "confidence": value} for name, value in top_classes(p, top)]
    return {"image": str(path), "label": p.label, "confidence": p.confidence, "top": ranked}


def show_predictions(paths: Sequence[Path], predictions: Sequence[Prediction], top: int) -> None:
    """Print the predictions as a table."""
    rows = [("image", "class", "confidence", "then")]
    for path, p in zip(paths, predictions, strict=True):
        others = ", ".join(f"{name} {format_percent(value)}" for name, value in top_classes(p, top)[1:])
        rows.append((str(path), p.label, format_percent(p.confidence), others))
    print_table(rows)


def write_maps(classifier: Classifier, paths: Sequence[Path], predictions: Sequence[Prediction], folder: Path) -> None:
    """Write one picture per image: the class activation map of its class, over the image."""
    from PIL.PngImagePlugin import PngInfo

    from nin import report

    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = classifier.info.preprocessing
    size = preprocessing.size
    comment = PngInfo()
    comment.add_text("Comment", nin.data.MAP_COMMENT)
    for number, (path, p) in enumerate(zip(paths, predictions, strict=True)):
        values = classifier.confidence_maps(path)[0, classifier.classes.index(p.label)]
        pixels = nin.data.decode(
            path, size=size, channels=preprocessing.channels, value_range=preprocessing.value_range
        )
        limit = report.symmetric_limit(values)
        picture = report.overlay(pixels, values, limit=limit, size=max(256, size))
        content = io.BytesIO()
        # marked, so that a training does not take it for an image where the folder lies among the images
        picture.save(content, format="PNG", pnginfo=comment)
        # numbered, as two folders may hold files of one name
        write_atomically(folder / f"{number:04d}-{path.stem}.png", content.getvalue())
