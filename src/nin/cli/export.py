"""`nin export`: write a trained network as ONNX, a torch.export program or OpenVINO."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nin import folders
from nin.cli.console import ProgressBar, messages, print_json, results, say_if_unfinished
from nin.errors import UserError
from nin.names import EXPORT_SUFFIXES

if TYPE_CHECKING:
    from nin.exporters import ExportResult

# How a file of each format is loaded and called, in Python.
USES = {
    "onnx": "onnxruntime.InferenceSession({path!r}).run(['scores'], {{{name!r}: x}})",
    "pt2": "torch.export.load({path!r}).module()(x)",
    "openvino": "openvino.Core().compile_model({path!r}, 'CPU')(x)",
}

RESIZES = {
    "crop": "the centre square of the photo",
    "squash": "the whole photo, squashed to a square",
    "letterbox": "the whole photo, with grey bars to a square",
}


def export(
    run: Path,
    /,
    *,
    format: Literal["onnx", "pt2", "openvino"] = "onnx",
    out: Path | None = None,
    preprocessing: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    json: bool = False,
) -> None:
    """Write a trained network into a file that runs where nin is not installed, and check it.

    Args:
        run: The folder that `nin train` or `nin narrow` made.
        format: onnx; pt2, for torch.export.load; or openvino.
        out: The file to write; model.onnx, model.pt2 or model.xml in the run folder if not given.
        preprocessing: Put the normalisation inside: the file then takes pixels (N, H, W, C), uint8.
        overwrite: Replace a file of that name.
        trust: Import the module that the run says its network is made by, where that is somebody's own code.
        json: Print what was written as JSON on standard output.
    """
    folders.check_is_run(run)
    usual = f"model{EXPORT_SUFFIXES[format]}"
    path = out or run / usual
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the file to write, such as {path / usual}")
    of_suffix = {suffix: name for name, suffix in EXPORT_SUFFIXES.items()}.get(path.suffix, format)
    if of_suffix != format:
        raise UserError(
            f"{path} is the name of a file of the format {of_suffix}, not {format}: give --format {of_suffix}, or "
            "another name"
        )
    for file in (path, path.with_suffix(".bin")) if format == "openvino" else (path,):
        folders.check_new_file(file, overwrite=overwrite)
    from nin import checkpoint, exporters, models

    say_if_unfinished(run, checkpoint.load_info(run))
    with models.trust() if trust else contextlib.nullcontext(), ProgressBar("Loading the network") as bar:
        exported = exporters.export(
            run,
            path,
            format=format,
            preprocessing=preprocessing,
            # its stages differ too much in length to tell the time that is left
            on_progress=lambda text, done, total: bar.update(0, 0, f"{text}, stage {done + 1} of {total}"),
        )
    if json:
        print_json({**dataclasses.asdict(exported), "path": str(exported.path)})
        return
    results.print(str(exported))
    messages.print("\n".join(describe(exported)))


def describe(exported: ExportResult) -> list[str]:
    """Return lines that say what the file takes and gives, and what to do with it."""
    x, classes, p = (exported.metadata[key] for key in ("input", "classes", "preprocessing"))
    kind = "0 to 255" if p["inside"] else f"(pixels / 255 − {_numbers(p['mean'])}) / {_numbers(p['std'])}"
    shown = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
    use = USES[exported.format].format(path=str(exported.path), name=x["name"])
    return [
        f"  takes {x['name']}, {_shape(x['shape'])}, {x['dtype']}: {'grey' if p['channels'] == 1 else 'RGB'}, {kind}; "
        f"{RESIZES[p['resize']['mode']]}, {p['size']}×{p['size']} pixels",
        f"  gives scores, {_shape(['batch', len(classes)])}, float32, before the softmax: {shown}",
        f"Use it:  {use}",
        "From a photo to the probabilities of nin predict, in twenty lines: docs/export.md; what it takes is in the "
        "file's metadata too.",
    ]


def _shape(sizes: list[Any]) -> str:
    return f"({', '.join(map(str, sizes))})"


def _numbers(values: list[float]) -> str:
    text = ", ".join(f"{value:.4g}" for value in values)
    return f"({text})" if len(values) > 1 else text
