"""`nin predict`: classes of images in a table, in JSON, in files and as maps."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nin import data
from nin import report as reports
from nin.cli.console import Bar, print_json, results, words
from nin.errors import UserError
from nin.inference import batch_predict
from nin.inference import classifier as prediction
from nin.runtime.files import write_atomically
from nin.runtime.formatting import format_percent


def predict(
    run: Path,
    images: Sequence[Path],
    *,
    top: int,
    device: str,
    as_json: bool,
    table: Path | None,
    resume: bool,
    maps: Path | None,
) -> None:
    """Classify images and show, write or draw the result."""
    classifier = prediction.load(run, device=device)
    source = find_shards(images) or data.PathList(find_images(images))
    if table is not None:
        tabulate(classifier, source, table, resume=resume)
    if table is not None and not as_json and maps is None:
        return
    if isinstance(source, data.ShardSet):
        raise UserError("predictions of shards are written into a file: give --csv FILE or --parquet FILE")
    named = {str(path) for path in images}
    paths: list[Path] = []
    predictions: list[prediction.Prediction] = []
    with Bar("Predicting", len(source)) as bar:
        for start in range(0, len(source), prediction.BATCH):
            readable = keep_readable(classifier, source[start : start + prediction.BATCH], named)
            predictions += classifier.predict([image for _, image in readable])
            paths += [path for path, _ in readable]
            bar.update(start + len(readable), len(source))
    if maps is not None:
        write_maps(classifier, paths, predictions, maps)
    if as_json:
        print_json([prediction_dict(classifier.classes, *pair, top) for pair in zip(paths, predictions, strict=True)])
    else:
        results.print(predictions_table(classifier.classes, paths, predictions, top))


def keep_readable(classifier: prediction.Classifier, paths: Sequence[str], named: set[str]) -> list[tuple[Path, Any]]:
    """Decode images; one that cannot be read is told of and left out, unless somebody asked for just this one."""
    p = classifier.info.preprocessing
    readable = []
    for path in paths:
        try:
            readable.append((Path(path), data.decode(path, size=p.size, channels=p.channels)))
        except UserError as error:
            if path in named:
                raise
            words.print(f"left out {error}")
    return readable


def tabulate(
    classifier: prediction.Classifier, source: data.ShardSet | data.PathList, table: Path, *, resume: bool
) -> None:
    """Write the predictions into a file."""
    share, started = batch_predict.Share.of_environment(), time.monotonic()
    with Bar("Predicting", len(source)) as bar:
        done = batch_predict.tabulate(classifier, source, table, resume=resume, share=share, on_progress=bar.update)
    if share.rank:
        return
    new, seconds = done.images - done.before, time.monotonic() - started
    words.print(f"{len(source):,} images in {table}, {new:,} of them now, {new / seconds:,.0f} per second")
    if done.unreadable:
        words.print(f"{done.unreadable:,} cannot be read: their rows have a problem instead of a label")


def find_shards(paths: Sequence[Path]) -> data.ShardSet | None:
    """Return the shards if that is what is to be classified: one source of them."""
    return data.open_shards(paths[0]) if len(paths) == 1 and data.is_shards(paths[0]) else None


def find_images(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the image files: those named, and those in the folders named.

    Raises:
        UserError: a path is missing, or a folder holds no image.
    """
    for path in paths:
        if path.is_dir():
            inside = sorted(data.find_images(path))
            if not inside:
                raise UserError(
                    f"{path} holds no image: its files must end in {', '.join(sorted(data.IMAGE_EXTENSIONS))}"
                )
            yield from inside
        elif path.exists():
            yield str(path)
        else:
            raise UserError(f"{path} does not exist")


def best(classes: Sequence[str], p: prediction.Prediction, top: int) -> list[tuple[str, float]]:
    """Return the most probable classes with their probabilities."""
    return sorted(zip(classes, p.probabilities, strict=True), key=lambda pair: -pair[1])[:top]


def prediction_dict(classes: Sequence[str], path: Path, p: prediction.Prediction, top: int) -> dict[str, Any]:
    """Return one prediction for JSON."""
    ranked = [{"class": name, "confidence": value} for name, value in best(classes, p, top)]
    return {"image": str(path), "label": p.label, "confidence": p.confidence, "top": ranked}


def predictions_table(
    classes: Sequence[str], paths: Sequence[Path], predictions: Sequence[prediction.Prediction], top: int
) -> Table:
    """Return the predictions for the terminal."""
    table = Table("image", "class", "confidence", "then")
    for path, p in zip(paths, predictions, strict=True):
        others = ", ".join(f"{name} {format_percent(value)}" for name, value in best(classes, p, top)[1:])
        table.add_row(str(path), p.label, format_percent(p.confidence), others)
    return table


def write_maps(
    classifier: prediction.Classifier,
    paths: Sequence[Path],
    predictions: Sequence[prediction.Prediction],
    folder: Path,
) -> None:
    """Write one picture per image: where the evidence for its class lies."""
    folder.mkdir(parents=True, exist_ok=True)
    size = classifier.info.preprocessing.size
    for number, (path, p) in enumerate(zip(paths, predictions, strict=True)):
        values = classifier.confidence_maps(path)[0, classifier.classes.index(p.label)]
        pixels = data.decode(path, size=size, channels=classifier.info.preprocessing.channels)
        picture = reports.overlay(pixels, values, limit=reports.symmetric_limit(values), size=max(256, size))
        content = io.BytesIO()
        picture.save(content, format="PNG")
        # numbered, as two folders may hold files of one name
        write_atomically(folder / f"{number:04d}-{path.stem}.png", content.getvalue())
