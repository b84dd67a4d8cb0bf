"""Export of the page as static files, with the activations of a run on test images: for a web host or a disk."""

import base64
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic_core import to_jsonable_python

from nin import data, folders
from nin.errors import UserError
from nin.profiling import bottleneck_timing
from nin.runtime.files import write_atomically
from nin.runtime.progress import ProgressCallback
from nin.server import schemas
from nin.server.activations import all_layer_sums, layer_outputs, layer_weights, layers
from nin.server.batcher import classify
from nin.server.js_bundle import bundle
from nin.server.layer_graph import layer_nodes
from nin.server.layers import Layer
from nin.server.middleware import Limits
from nin.server.pca import MAX_CHANNELS
from nin.server.routes import find_dead_channels, prediction_dicts, sample_images
from nin.server.sample_images import NOT_HERE, Sample
from nin.server.service import ServedRun, Service
from nin.server.static_files import read_page

# Of the weights, principal components and activations together; some images are written in any case.
MAX_BYTES, MIN_IMAGES = 32 * 2**20, 3

# Numbers are whole ones of 16 bits, as shares of the largest of their array; the sixth of base64's bytes is lost.
LARGEST_SHARE, BYTES_EACH = 32_767, 2 * 4 / 3

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
    folders.check_page(folder)
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
    """Return as many of the first run's samples as have activations that fit into MAX_BYTES beside the weights."""
    shown, fixed, of_image = service.loaded().samples.shown, 0, 0
    for run in service.runs:
        nodes = layer_nodes(run.network)
        for node in nodes:
            if node.layer.kind == "convolution" and node.weight is not None:
                fixed += node.weight.numel()
                fixed += node.layer.channels**2 if node.layer.channels <= MAX_CHANNELS else 0
        outputs = run.classifier.inputs(_pixels(run, shown[:1]))
        with torch.inference_mode():
            of_image += sum(y.numel() for index, y in layer_outputs(nodes, outputs) if _is_written(nodes[index].layer))
    return shown[: max(MIN_IMAGES, int((MAX_BYTES / BYTES_EACH - fixed) // of_image))]


def _is_written(layer: Layer) -> bool:
    """Return whether a layer's sums are in the files: the page computes what concatenates, and 1×1 convolutions."""
    is_1x1 = layer.kind == "convolution" and (layer.kernel_size, layer.stride, layer.padding) == (1, 1, 0)
    return layer.kind != "joining" and not is_1x1


def _compact(tensor: torch.Tensor) -> dict[str, Any]:
    """Return an array for the page in half the bytes, right to 1/65,534 of its largest value."""
    values = tensor.float().cpu()
    largest = float(values.abs().max())
    if not 0 < largest < math.inf:
        return schemas.Numbers.of(values).model_dump()
    scale = largest / LARGEST_SHARE
    shares = np.rint(values.numpy() / scale).astype("<i2")
    encoded = base64.b64encode(shares.tobytes()).decode()
    return {"shape": list(values.shape), "scale": scale, "values": encoded}


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
        "predictions": [_predictions(run, samples) for run in service.runs],
        "assets": {name: _asset(name) for name in ("flower.jpg", "digits.json")},
    }
    return to_jsonable_python(content)


def _predictions(run: ServedRun, samples: list[Sample]) -> list[dict[str, object]]:
    """Return the predictions with their maps, of which the page shows three decimals."""

    def rounded(values: Any) -> Any:
        if isinstance(values, list):
            return [rounded(value) for value in values]
        return None if values is None else round(values, 4)

    found = prediction_dicts(run.classifier, classify(run.classifier, _pixels(run, samples)), with_maps=True)
    return [{**each, "maps": rounded(each["maps"])} for each in found]


def _asset(name: str) -> dict[str, str]:
    media_type, content = read_page()[f"/{name}"]
    return {"type": media_type, "content": base64.b64encode(content).decode()}


def _layer_data(run: ServedRun, index: int) -> Any:
    """Return weights and principal components of a convolution; only weights where it has too many channels."""
    weight, bias = layer_weights(run.network, index)
    weights = {"weight": _compact(weight), "bias": None if bias is None else schemas.Numbers.of(bias).model_dump()}
    try:
        components = run.principal_components(index)
    except LookupError:
        return {"weights": weights, "spectrum": None}
    spectrum = {**schemas.Spectrum.of(components).model_dump(), "directions": _compact(components.directions)}
    return {"weights": weights, "spectrum": spectrum}


def _image_data(run: ServedRun, sample: Sample) -> dict[str, Any]:
    """Return the pre-activations of the layers that are written, by their index."""
    found = zip(
        layers(run.network), all_layer_sums(run.network, run.classifier.inputs(_pixels(run, [sample]))), strict=True
    )
    return {str(index): _compact(sums[0]) for index, (layer, sums) in enumerate(found) if _is_written(layer)}
