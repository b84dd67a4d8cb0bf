"""`nin predict`: classify images; a table, JSON, CSV or Parquet files, and heatmaps."""

from __future__ import annotations

import glob
import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nin
from nin import folders, names
from nin.cli.check import show_findings
from nin.cli.console import ProgressBar, messages, print_json, print_table, say_if_unfinished
from nin.display.numbers import format_number_of, format_percent
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
    overwrite: bool = False,
    maps: Path | None = None,
    trust: bool = False,
    calibrated: bool = False,
) -> None:
    """Classify images with a trained network.

    An image that cannot be read is named on standard error and left out, or has a problem in its row of the file; all
    others get their answers. The exit status is 1 where it was given by its own name and not found in a folder, and 2
    where no image can be read.

    Args:
        run: The folder that `nin train` made.
        images: Image files; a folder stands for all images in it. Or one folder, pattern or URL of WebDataset shards.
        top: How many classes to show for each image.
        device: Where to compute: cpu, cuda, cuda:1, mps, or auto for a GPU where there is one.
        json: Print the predictions as JSON on standard output.
        csv: Write the predictions, with the probability of every class, into this file, however many there are.
        parquet: The same as a Parquet file.
        resume: Go on with the file where an interrupted command stopped; a finished one is left as it is.
        overwrite: Replace a file of that name, whose rows are then lost, and maps.
        maps: Write into this folder, for each image, where in it the evidence for its class lies: exactly, or where the
            network's head does not allow that, as Grad-CAM approximates it.
        trust: Import the module that the run says its network is made by, where that is somebody's own code.
        calibrated: Give probabilities by the temperature that a training with --validation fitted: of the answers that
            are 80 % sure, about 80 % are right. The answers stay the same.
    """
    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    if csv is not None and parquet is not None:
        raise UserError("give --csv or --parquet, not both")
    if resume and overwrite:
        raise UserError("give --resume or --overwrite, not both: one goes on with a file, the other replaces it")
    if resume and csv is None and parquet is None:
        raise UserError("--resume goes on with a file: give --csv FILE or --parquet FILE")
    if parquet is not None and parquet.suffix != ".parquet":
        raise UserError(f"{parquet}: the name of a Parquet file must end in .parquet")
    table = csv or parquet
    if table is not None:
        folders.check_new_file(table, overwrite=overwrite or resume)
    folders.check_is_run(run)
    images = [path for pattern in images for path in expand(pattern)]
    if not any(path.exists() or names.is_pattern(str(path)) for path in images):
        raise UserError(missing_text(images[0]))
    if maps is not None:
        check_maps_folder(maps, overwrite=overwrite)
    classifier = nin.load(run, device=device, calibrated=calibrated, trust=trust)
    if maps is not None and classifier.no_maps_reason:
        check_approximate_maps(classifier.no_maps_reason)
    say_if_unfinished(run, classifier.info)
    classifier.compile()
    is_sharded = len(images) == 1 and nin.data.is_shards(images[0])
    if is_sharded and (table is None or maps is not None or json):
        raise UserError("predictions of shards are written into a file: give --csv FILE or --parquet FILE alone")
    problems: list[str] = []
    source = nin.data.open_shards(images[0]) if is_sharded else nin.data.PathList(image_paths(images, problems))
    for problem in problems:
        messages.print(f"left out {problem}")
    named, unreadable = {str(path) for path in images}, set(problems)
    if table is not None:
        unreadable |= named & write_predictions(classifier, source, table, resume=resume)
    if isinstance(source, nin.data.PathList) and (table is None or maps is not None or json):
        paths, predictions = predict_paths(classifier, source, silent=table is not None)
        unreadable |= named & (set(source) - {str(path) for path in paths})
        if json:
            print_json([prediction_dict(*pair, top) for pair in zip(paths, predictions, strict=True)])
        else:
            show_predictions(paths, predictions, top)
        if maps is not None:
            write_maps(classifier, paths, predictions, maps)
            messages.print(f"{format_number_of(len(paths), 'map')} in the folder {maps}")
    # torchrun would take the status for a process that died
    if unreadable and torchrun.world_size() == 1:
        sys.exit(1)


def expand(path: Path) -> list[Path]:
    """Return the paths that match a pattern in quotes, such as "*.jpg"; the path itself where there are none."""
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))] or [path]


def image_paths(paths: Sequence[Path], problems: list[str]) -> Iterator[str]:
    """Yield the image files among the paths, and those in the folders among them; missing ones, too.

    Args:
        paths: of files and folders.
        problems: gets a line for each folder without an image, and for what is neither file nor folder.

    Raises:
        UserError: none of the paths leads to an image.
    """
    found = False
    for path in paths:
        if path.is_dir():
            findings: list[nin.data.Finding] = []
            inside = sorted(nin.data.find_images(path, findings=findings))
            if not inside:
                problems.append(f"{path} holds no image ({nin.data.FORMAT_EXAMPLES})")
            show_findings(findings)
            found = found or bool(inside)
            yield from inside
        elif path.exists() and not path.is_file():
            problems.append(f"{path} is neither a file nor a folder")
        else:
            found = found or path.exists()
            yield str(path)
    if not found:
        raise UserError(problems[0] if problems else missing_text(paths[0]))


def missing_text(path: Path) -> str:
    """Return the message for a path, or a pattern, that leads to no file."""
    return f"no file matches {path}" if glob.has_magic(str(path)) else f"{path} does not exist"


def check_maps_folder(folder: Path, *, overwrite: bool) -> None:
    """Check that pictures may be written into a folder.

    Raises:
        UserError: it is a file, nothing can be written there, or it holds pictures that are not to be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give --maps the folder to make")
    folders.check_can_make(folder)
    if folder.is_dir() and any(folder.glob("[0-9][0-9][0-9][0-9]-*.png")) and not overwrite:
        raise UserError(f"{folder} holds maps already: give another name, or --overwrite to replace those of a name")


def check_approximate_maps(reason: str) -> None:
    """Check that maps can be approximated, before the images are classified.

    Raises:
        UserError: the package for it is missing; the message says why there are no exact maps.
    """
    from nin.inference.grad_cam import import_grad_cam

    try:
        import_grad_cam()
    except UserError as error:
        raise UserError(f"--maps: there are no exact maps ({reason}); {error}, or leave --maps away") from error


def write_predictions(classifier: Classifier, source: ShardSet | PathList, table: Path, *, resume: bool) -> set[str]:
    """Write the predictions into a CSV or Parquet file; return the names of the images that cannot be read.

    Under torchrun, each process writes its part.
    """
    from nin.inference import batch_predict

    partition, started = batch_predict.Partition(torchrun.rank(), torchrun.world_size()), time.monotonic()
    unreadable: set[str] = set()
    with ProgressBar("Predicting", len(source)) as bar:
        counts = batch_predict.predict_to_file(
            classifier,
            source,
            table,
            resume=resume,
            partition=partition,
            on_progress=bar.update,
            on_unreadable=unreadable.add,
        )
    if partition.rank:
        return unreadable
    new, seconds = counts.total - counts.resumed, time.monotonic() - started
    if resume and not new:
        messages.print(f"{table} is finished: it has {format_number_of(len(source), 'image')}, and is left as it is")
        return unreadable
    before = f", {counts.resumed:,} of them from before" if counts.resumed else ""
    messages.print(f"{format_number_of(len(source), 'image')} in {table}{before}, {new / seconds:,.0f} per second")
    if counts.unreadable:
        messages.print(f"{counts.unreadable:,} cannot be read: their rows have a problem instead of a label")
    return unreadable


def predict_paths(
    classifier: Classifier, source: PathList, *, silent: bool = False
) -> tuple[list[Path], list[Prediction]]:
    """Return the paths of the readable images, and their predictions.

    Args:
        classifier: of the run.
        source: the paths of the images.
        silent: do not name those that cannot be read.

    Raises:
        UserError: none can be read.
    """
    from nin.data.decoder import DecodeError
    from nin.inference.classifier import INFERENCE_BATCH_SIZE

    p = classifier.info.preprocessing
    paths: list[Path] = []
    predictions: list[Prediction] = []
    with ProgressBar("Predicting", len(source)) as bar:
        for start in range(0, len(source), INFERENCE_BATCH_SIZE):
            batch = []
            for path in source[start : start + INFERENCE_BATCH_SIZE]:
                try:
                    batch.append(nin.data.decode(path, **p.decoding))
                    paths.append(Path(path))
                except DecodeError as error:
                    if len(source) == 1:
                        raise
                    if not silent:
                        messages.print(f"left out {error}")
            predictions += classifier.predict(batch)
            bar.update(min(start + INFERENCE_BATCH_SIZE, len(source)), len(source))
    if not paths:
        raise UserError(f"none of {format_number_of(len(source), 'image')} can be read")
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
    print_table(rows, middle=1)


def write_maps(classifier: Classifier, paths: Sequence[Path], predictions: Sequence[Prediction], folder: Path) -> None:
    """Write one picture per image: the image, and over it in grey the map of its class, with a scale."""
    from PIL.PngImagePlugin import PngInfo

    from nin import report

    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = classifier.info.preprocessing
    size = preprocessing.size
    comment = PngInfo()
    comment.add_text("Comment", nin.data.MAP_COMMENT)
    if classifier.no_maps_reason:
        messages.print(
            f"The maps are approximations by Grad-CAM, as there are no exact ones: {classifier.no_maps_reason}"
        )
    with ProgressBar("Drawing maps", len(paths)) as bar:
        for number, (path, p) in enumerate(zip(paths, predictions, strict=True)):
            pixels = nin.data.decode(path, **preprocessing.decoding)
            if classifier.no_maps_reason:
                values, kind = classifier.approximate_maps(path, [p.label])[0], "-gradcam"
            else:
                values, kind = classifier.confidence_maps(path)[0, classifier.classes.index(p.label)], ""
            panel = report.MapPanel(f"{p.label} {format_percent(p.confidence)}", values)
            picture = report.draw_image_grid([report.ImageRow(path.name, pixels, [panel])], size=max(256, size))
            content = io.BytesIO()
            # marked, so that a training does not take it for an image where the folder lies among the images
            picture.save(content, format="PNG", pnginfo=comment)
            # numbered, as two folders may hold files of one name
            write_atomically(folder / f"{number:04d}-{path.stem}{kind}.png", content.getvalue())
            bar.update(number + 1, len(paths))
