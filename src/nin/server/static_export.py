"""A copy of the page on a disk: with test images of a run looked into beforehand, for any web host or none."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from nin import data
from nin.errors import UserError
from nin.ops.reference import activate
from nin.profiling import bottleneck
from nin.runtime.files import write_atomically
from nin.runtime.progress import ProgressCallback
from nin.server import activations, schemas
from nin.server.app import predictions
from nin.server.batcher import classify
from nin.server.js_bundle import bundle
from nin.server.layer_graph import walk
from nin.server.middleware import Limits
from nin.server.routes import dead_channels, sample_images
from nin.server.sample_images import NOT_HERE
from nin.server.service import ServedRun, Service
from nin.server.static_files import read_page

# Of the files with what the layers make of the images; at least one image is written.
MOST_BYTES = 32 * 2**20

# r at which the bottleneck is timed: the page's first, and its curve (page/bottleneck.js).
MEASURED = (16, 48, 64, 96, 144, 192, 224, 256)

# What the page may load where it lies: its own files. A browser adds no header to a file.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; base-uri 'none'"


def write_copy(
    run: Path, folder: Path, *, beside: Path | None = None, on_progress: ProgressCallback | None = None
) -> Path:
    """Write the page into a folder, with some of a run's test images, so that it needs no server.

    Args:
        run: the folder that `nin.train` made; its test images must lie on this machine.
        folder: to write into: made where it is missing; another copy in it is replaced.
        beside: another run of the same classes to look at beside it.
        on_progress: called with what is being done, the number done, and the number of all.

    Returns:
        The path of the page, ``folder/index.html``.

    Raises:
        UserError: a run folder or its test images cannot be read, or the folder holds something else.
        OSError: the folder cannot be written.
    """
    _check_free(folder)
    service = Service([path for path in (run, beside) if path is not None], Limits(), "cpu")
    try:
        _wait_for_images(service)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for old in (folder / "data").glob("*.js"):
            old.unlink()
        for name, content in _page_files():
            write_atomically(folder / name, content)
        parts = _parts(service)
        for done, (name, make) in enumerate(parts.items(), start=1):
            write_atomically(folder / "data" / f"{name}.js", _script(name, make()))
            if on_progress is not None:
                on_progress("Writing the page", done, len(parts))
    finally:
        service.close()
    return folder / "index.html"


def _check_free(folder: Path) -> None:
    """Stop where the folder holds something that is no copy of the page."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} must be a folder, got a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "data" / "page.js").is_file():
        raise UserError(
            f"{folder} must be empty, missing, or hold an earlier copy of the page: it holds something else"
        )


def _wait_for_images(service: Service) -> None:
    """Stop where the runs' test images are not here."""
    for run in service.runs:
        run.samples.thread.join()
        if run.samples.state != "ready":
            reason = run.samples.reason.removeprefix(NOT_HERE)
            raise UserError(f"a copy of the page needs the test images of {run.description.run}: {reason}")


def _page_files() -> Iterator[tuple[str, str | bytes]]:
    """Yield name and content of the page's own files."""
    files = {address.strip("/") or "index.html": content for address, (_, content) in read_page().items()}
    script = '<script type="module" src="main.js"></script>'
    html = files["index.html"].decode()
    if html.count(script) != 1:
        raise ValueError(f"index.html must hold {script} once")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield "index.html", html.replace(script, f'{policy}\n<script defer src="page.js"></script>')
    yield "page.js", bundle("main.js", lambda name: files[name].decode(), {"server.js": "saved.js"})
    for name in ("style.css", "figures.css", "icon.svg"):
        yield name, files[name]


def _script(name: str, content: Any) -> str:
    """Return a script that puts a file's content where the page looks for it."""
    return f"(globalThis.ninSaved ??= {{}})[{json.dumps(name)}] = {json.dumps(content)};\n"


def _parts(service: Service) -> dict[str, Callable[[], Any]]:
    """Return what makes the content of each file, by its name."""
    images = _count_images(service)
    parts: dict[str, Callable[[], Any]] = {"page": lambda: _page(service, images)}
    for number, run in enumerate(service.runs):
        for index, layer in enumerate(run.description.layers):
            if layer.kind == "convolution":
                parts[f"run-{number}-layer-{index}"] = lambda run=run, index=index: _layer(run, index)  # type: ignore[misc]
        for image in range(images):
            parts[f"run-{number}-image-{image}"] = lambda run=run, image=image: _image(run, _input(run, image, service))  # type: ignore[misc]
    return parts


def _count_images(service: Service) -> int:
    """Return how many images fit."""
    values = 0
    for run in service.runs:
        x = _input(run, 0, service)
        with torch.inference_mode():
            values += sum(output.numel() for _, output in activations.outputs(walk(run.network), x))
    shown = len(service.run().samples.shown)
    return min(shown, max(1, MOST_BYTES // (values * 4 * 4 // 3)))  # float32 in base64


def _input(run: ServedRun, image: int, service: Service) -> torch.Tensor:
    """Return a network's input for one of the first run's sample images."""
    return run.classifier.inputs(_pixels(run, [image], service))


def _pixels(run: ServedRun, images: list[int], service: Service) -> torch.Tensor:
    p = run.classifier.info.preprocessing
    shown = service.run().samples.shown
    return torch.stack([data.decode(shown[i].png, size=p.size, channels=p.channels) for i in images])


def _page(service: Service, images: int) -> dict[str, Any]:
    """Return what the page shows at once."""
    samples = sample_images(service.run())
    found = {
        "health": schemas.Health.of(len(service.runs)),
        "models": [run.description for run in service.runs],
        "samples": samples.model_copy(update={"samples": samples.samples[:images]}),
        "dead": [dead_channels(run) for run in service.runs],
        "bottleneck": {str(r): dataclasses.asdict(bottleneck.measure(r)) for r in MEASURED},
        "predictions": [
            predictions(run.classifier, classify(run.classifier, _pixels(run, list(range(images)), service)), maps=True)
            for run in service.runs
        ],
        "assets": {name: _asset(name) for name in ("flower.jpg", "digits.json")},
    }
    return _plain(found)


def _asset(name: str) -> dict[str, str]:
    media_type, content = read_page()[f"/{name}"]
    return {"type": media_type, "content": base64.b64encode(content).decode()}


def _layer(run: ServedRun, index: int) -> dict[str, Any]:
    """Return the weights and the spectrum of a convolution; no spectrum where there are too many channels."""
    try:
        spectrum = schemas.Spectrum.of(run.spectrum(index))
    except LookupError:
        spectrum = None
    return _plain({"weights": schemas.Weights.of(*activations.weights(run.network, index)), "spectrum": spectrum})


@torch.inference_mode()
def _image(run: ServedRun, x: torch.Tensor) -> dict[str, Any]:
    """Return each layer's sums, before its activation, by its place; those of joined branches are in the branches."""
    steps = walk(run.network)
    kept: dict[str, Any] = {}

    def keep(index: int, sums: torch.Tensor) -> torch.Tensor:
        if steps[index].layer.kind != "joining":
            kept[str(index)] = schemas.Numbers.of(sums[0].float().cpu()).model_dump()
        return activate(sums, steps[index].layer.activation)

    for _ in activations.outputs([activations.without_activation(step) for step in steps], x, keep):
        pass
    return kept


def _plain(value: Any) -> Any:
    """Return answers as plain data, all the way down."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
