"""Export of the page as static files, with the activations of a run on test images: for a web host or a disk."""

import base64
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python

from nin import data
from nin.errors import UserError
from nin.ops import ACTIVATIONS
from nin.profiling import bottleneck_timing
from nin.runtime.files import write_atomically
from nin.runtime.progress import ProgressCallback
from nin.server import schemas
from nin.server.activations import layer_outputs, layer_weights, without_activation
from nin.server.batcher import classify
from nin.server.js_bundle import bundle
from nin.server.layer_graph import layer_nodes
from nin.server.middleware import Limits
from nin.server.routes import find_dead_channels, prediction_dicts, sample_images
from nin.server.sample_images import NOT_HERE, Sample
from nin.server.service import ServedRun, Service
from nin.server.static_files import read_page

# Of the files with the activations; at least one image is written.
MAX_BYTES = 32 * 2**20

# r at which the bottleneck is timed: the page's first, and its curve (page/bottleneck.js).
MEASURED_WIDTHS = (16, 48, 64, 96, 144, 192, 224, 256)

# In the page itself, as files come without headers: it may load its own files alone.
FILE_CSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; base-uri 'none'"


def export_page(
    run: Path, folder: Path, *, beside: Path | None = None, on_progress: ProgressCallback | None = None
) -> Path:
    """Write the page and its data into a folder, so that it needs no server.

    Args:
        run: the folder that `nin.train` made; its test images must lie on this machine.
        folder: to write into: made where it is missing; an earlier export in it is replaced.
        beside: a second run of the same classes to show beside it.
        on_progress: called with what is being done, the number done, and the number of all.

    Returns:
        The path of the page, ``folder/index.html``.

    Raises:
        UserError: a run folder or its test images cannot be read, or the folder holds something else.
        OSError: the folder cannot be written.
    """
    _check_folder(folder)
    service = Service([path for path in (run, beside) if path is not None], Limits(), "cpu")
    try:
        _wait_for_samples(service)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for old in (folder / "data").glob("*.js"):
            old.unlink()
        for name, content in _page_files():
            write_atomically(folder / name, content)
        contents = _data_files(service)
        for done, (name, make) in enumerate(contents.items(), start=1):
            write_atomically(folder / "data" / f"{name}.js", _script(name, make()))
            if on_progress is not None:
                on_progress("Writing the page", done, len(contents))
    finally:
        service.close()
    return folder / "index.html"


def _check_folder(folder: Path) -> None:
    """Raise where the folder holds something that is no export of the page."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} must be a folder, got a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "data" / "page.js").is_file():
        raise UserError(
            f"{folder} must be empty, missing, or hold an earlier copy of the page: it holds something else"
        )


def _wait_for_samples(service: Service) -> None:
    """Wait until the runs' test images are loaded; raise where they are not on this machine."""
    for run in service.runs:
        run.samples.thread.join()
        if run.samples.state != "ready":
            reason = run.samples.reason.removeprefix(NOT_HERE)
            raise UserError(f"a copy of the page needs the test images of {run.metadata.run}: {reason}")


def _page_files() -> Iterator[tuple[str, str | bytes]]:
    """Yield name and content of the page's own files."""
    files = {address.strip("/") or "index.html": content for address, (_, content) in read_page().items()}
    script = '<script type="module" src="main.js"></script>'
    html = files["index.html"].decode()
    if html.count(script) != 1:
        raise ValueError(f"index.html must hold {script} once")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{FILE_CSP}">'
    yield "index.html", html.replace(script, f'{policy}\n<script defer src="page.js"></script>')
    yield "page.js", bundle("main.js", lambda name: files[name].decode(), {"api-client.js": "api-client-offline.js"})
    for name in ("style.css", "figures.css", "icon.svg"):
        yield name, files[name]


def _script(name: str, content: Any) -> str:
    """Return a script that puts a file's content where the page looks for it."""
    return f"(globalThis.ninSaved ??= {{}})[{json.dumps(name)}] = {json.dumps(content)};\n"


def _data_files(service: Service) -> dict[str, Callable[[], Any]]:
    """Return functions that compute the content of each data file, by its name."""
    samples = _fitting_samples(service)
    contents: dict[str, Callable[[], Any]] = {"page": functools.partial(_page_data, service, samples)}
    for number, run in enumerate(service.runs):
        for index, layer in enumerate(run.metadata.layers):
            if layer.kind == "convolution":
                contents[f"run-{number}-layer-{index}"] = functools.partial(_layer_data, run, index)
        for image, sample in enumerate(samples):
            contents[f"run-{number}-image-{image}"] = functools.partial(_image_data, run, sample)
    return contents


def _fitting_samples(service: Service) -> list[Sample]:
    """Return as many of the first run's samples as have activations that fit into MAX_BYTES."""
    shown, values = service.loaded().samples.shown, 0
    for run in service.runs:
        x = run.classifier.inputs(_pixels(run, shown[:1]))
        with torch.inference_mode():
            values += sum(output.numel() for _, output in layer_outputs(layer_nodes(run.network), x))
    return shown[: max(1, MAX_BYTES // (values * 4 * 4 // 3))]  # float32 in base64


def _pixels(run: ServedRun, samples: list[Sample]) -> torch.Tensor:
    p = run.classifier.info.preprocessing
    return torch.stack([data.decode(sample.png, size=None, channels=p.channels) for sample in samples])


def _page_data(service: Service, samples: list[Sample]) -> Any:
    """Return what the page shows at once."""
    images = sample_images(service.loaded())
    content = {
        "health": schemas.Health.of(len(service.runs)),
        "models": [run.metadata for run in service.runs],
        "samples": images.model_copy(update={"samples": images.samples[: len(samples)]}),
        "dead": [find_dead_channels(run) for run in service.runs],
        "bottleneck": {str(r): bottleneck_timing.measure(r) for r in MEASURED_WIDTHS},
        "predictions": [
            prediction_dicts(run.classifier, classify(run.classifier, _pixels(run, samples)), with_maps=True)
            for run in service.runs
        ],
        "assets": {name: _asset(name) for name in ("flower.jpg", "digits.json")},
    }
    return to_jsonable_python(content)


def _asset(name: str) -> dict[str, str]:
    media_type, content = read_page()[f"/{name}"]
    return {"type": media_type, "content": base64.b64encode(content).decode()}


def _layer_data(run: ServedRun, index: int) -> Any:
    """Return weights and principal components of a convolution; only weights where it has too many channels."""
    try:
        spectrum = schemas.Spectrum.of(run.principal_components(index))
    except LookupError:
        spectrum = None
    return to_jsonable_python({"weights": schemas.Weights.of(*layer_weights(run.network, index)), "spectrum": spectrum})


@torch.inference_mode()
def _image_data(run: ServedRun, sample: Sample) -> dict[str, Any]:
    """Return each layer's pre-activations by its index; those of concatenated branches are in the branches."""
    nodes = layer_nodes(run.network)
    kept: dict[str, Any] = {}

    def keep(index: int, sums: torch.Tensor) -> torch.Tensor:
        if nodes[index].layer.kind != "joining":
            kept[str(index)] = schemas.Numbers.of(sums[0].float().cpu()).model_dump()
        return ACTIVATIONS[nodes[index].layer.activation](sums)

    x = run.classifier.inputs(_pixels(run, [sample]))
    for _ in layer_outputs([without_activation(node) for node in nodes], x, keep):
        pass
    return kept
