"""`nin export`: write a trained network as ONNX, a torch.export program or OpenVINO."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Literal

from nin.cli.console import ProgressBar, messages, print_json, results, say_if_unfinished
from nin.errors import UserError


def export(
    run: Path,
    /,
    *,
    format: Literal["onnx", "pt2", "openvino"] = "onnx",
    out: Path | None = None,
    preprocessing: bool = False,
    trust: bool = False,
    json: bool = False,
) -> None:
    """Write a trained network into a file that runs where nin is not installed, and check it.

    Args:
        run: The folder that `nin train` or `nin narrow` made.
        format: onnx; pt2, for torch.export.load; or openvino.
        out: The file to write; model.onnx, model.pt2 or model.xml in the run folder if not given.
        preprocessing: Put the normalisation inside: the file then takes pixels (N, H, W, C), uint8.
        trust: Import the module that the run says its network is made by, where that is somebody's own code.
        json: Print what was written as JSON on standard output.
    """
    from nin import checkpoint, exporters, models

    say_if_unfinished(run, checkpoint.load_info(run))
    path = out or run / f"model{exporters.SUFFIXES[format]}"
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: give the file to write, such as {path / f'model{exporters.SUFFIXES[format]}'}"
        )
    with models.trust() if trust else contextlib.nullcontext(), ProgressBar("Loading the network") as bar:
        exported = exporters.export(run, path, format=format, preprocessing=preprocessing, on_progress=bar.on_progress)
    if json:
        print_json({**dataclasses.asdict(exported), "path": str(exported.path)})
        return
    results.print(str(exported))
    for key, value in exported.metadata.items():
        messages.print(f"  {key}: {value}")
