"""Looking at a network before narrowing it: its layers, who feeds whom, and what each choice would lose."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nin.errors import UserError
from nin.models.layer_shape import LayerShape, find_layers
from nin.narrowing.candidates import Candidates, Form, find_forms, find_widths
from nin.narrowing.dependency_graph import Edge, Shortcut, Wiring, trace
from nin.narrowing.moments import Moments, measure_shapes, observe
from nin.narrowing.sensitivity import measure_sensitivity
from nin.runtime import distributed
from nin.runtime.files import write_atomically
from nin.runtime.fingerprint import fingerprint

# Gradients are taken on at most this many batches' worth of images.
SENSITIVITY_IMAGES = 512

# Raised when what is found of the same network and images changes, or how it is written: a cache of another number is
# found again.
CACHE_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Study:
    """What is known of a network.

    Attributes:
        shapes: of all convolutions and fully connected layers that are called, in the order of the calls.
        reasons: why layers are left alone, by name.
        edges: between which layers channels can be left out.
        shortcuts: what is added to layers' results.
        candidates: what could be done, and what it would lose.
        sensitivities: G of each layer that can be narrowed.
        notes: sentences for the report.
    """

    shapes: dict[str, LayerShape]
    reasons: dict[str, str]
    edges: tuple[Edge, ...]
    shortcuts: dict[str, Shortcut]
    candidates: Candidates
    sensitivities: dict[str, Tensor]
    notes: tuple[str, ...]


def study(
    model: nn.Module,
    batches: list[Any],
    *,
    skip: tuple[str, ...],
    cache: Path | None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Study:
    """Look at a network.

    Args:
        model: expanded, in evaluation mode.
        batches: images.
        skip: patterns of layers to leave alone.
        cache: a file that keeps what was found, for another budget.
        on_progress: called with what is being done, the number done, and the number of all.

    Raises:
        UserError: there is nothing to narrow, a pattern matches nothing, or a value is not finite.
    """
    layers, reasons = find_layers(model, skip)
    everything: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    shapes = measure_shapes(model, everything, batches)
    for name in layers:
        if name not in shapes:
            reasons[name] = "never called"
        elif shapes[name].is_depthwise:
            reasons[name] = "depthwise: each channel is looked at alone"
    able = {name: shapes[name] for name in shapes if name in layers and name not in reasons}
    if not able:
        raise UserError(f"the model must have a convolution or fully connected layer to narrow, {_summary(reasons)}")
    wiring = trace(model, {name for name in shapes if name in layers})
    key = f"format {CACHE_FORMAT}: {' '.join(distributed.all_gather_text(fingerprint_subject(model, batches, skip)))}"
    known = _read_cache(cache, key)
    if "" in distributed.all_gather_text("found" if known else ""):  # a process without the file: all begin again
        known = None
    found = known or _Findings({}, {}, {})
    missing = {name: shape for name, shape in able.items() if name not in found.forms}
    if missing:
        try:
            _measure(model, missing, wiring.edges, batches, found, on_progress)
        finally:  # what is known already need not be found again after an interruption
            if cache is not None and found.forms and distributed.rank() == 0:
                _write_cache(cache, key, found)
    candidates, sensitivities = Candidates(found.forms, found.widths), found.sensitivities
    for name in able:
        if not bool(sensitivities[name].any()):
            reasons[name] = "the model's result does not depend on it"
    candidates = _without(candidates, reasons)
    return Study(shapes, reasons, wiring.edges, wiring.shortcuts, candidates, sensitivities, _notes(wiring))


def _summary(reasons: dict[str, str]) -> str:
    if not reasons:
        return "got one without any"
    name = next(iter(reasons))
    return f"got {len(reasons)} that cannot be ({name}: {reasons[name]})"


def _notes(wiring: Wiring) -> tuple[str, ...]:
    return (f"Channels are not left out between layers: {wiring.problem}.",) if wiring.problem else ()


@dataclasses.dataclass
class _Findings:
    """What the images tell; it grows layer by layer, and a layer with forms is finished."""

    forms: dict[str, tuple[Form, ...]]
    widths: dict[tuple[str, str], dict[int, float]]
    sensitivities: dict[str, Tensor]


def _measure(
    model: nn.Module,
    layers: dict[str, LayerShape],
    edges: tuple[Edge, ...],
    batches: list[Any],
    found: _Findings,
    on_progress: Callable[[str, int, int], None] | None,
) -> None:
    """Run the images through the network, forwards and backwards, and work out what could be done to each layer."""

    def tell(what: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(what, done, total) if on_progress else None

    moments = observe(model, layers, batches, tell("Looking at the layers"))
    _warn_of_few_samples(layers, moments)
    sensitivities = measure_sensitivity(model, layers, _few(batches))
    for done, (name, shape) in enumerate(layers.items()):
        weight = model.get_submodule(name).get_parameter("weight").detach().flatten(1)
        seen, matters = moments.pop(name), sensitivities[name]
        for edge in edges:
            if edge.consumer == name:
                found.widths[edge.producer, name] = find_widths(edge, shape, weight, seen, matters)
        found.sensitivities[name] = matters
        found.forms[name] = find_forms(shape, weight, seen, matters)
        tell("Weighing the choices")(done + 1, len(layers))


def _warn_of_few_samples(able: dict[str, LayerShape], moments: dict[str, Moments]) -> None:
    few = [name for name, shape in able.items() if moments[name].count < shape.patch]
    if few and distributed.rank() == 0:
        name = min(few, key=lambda n: moments[n].count / able[n].patch)
        warnings.warn(
            f"{len(few)} layers see fewer samples than values: {name} {moments[name].count} samples of "
            f"{able[name].patch} values; the fit is regularised, give more images for a better one",
            UserWarning,
            stacklevel=5,
        )


def _few(batches: list[Any]) -> list[Any]:
    """Return the first batches, up to this process's part of the images that gradients are taken on."""
    taken: list[Any] = []
    images = 0
    for batch in batches:
        if images * distributed.world_size() >= SENSITIVITY_IMAGES:
            break
        taken.append(batch)
        first = batch[0] if isinstance(batch, tuple | list) else batch
        images += len(first) if isinstance(first, Tensor) else SENSITIVITY_IMAGES // 8
    return taken


def _without(candidates: Candidates, reasons: dict[str, str]) -> Candidates:
    """Return the choices without those of layers that are left alone."""
    forms = {name: value for name, value in candidates.forms.items() if name not in reasons}
    widths = {edge: value for edge, value in candidates.widths.items() if edge[1] not in reasons}
    return Candidates(forms, widths)


def fingerprint_subject(model: nn.Module, batches: list[Any], skip: tuple[str, ...]) -> str:
    """Return a hash of the network's weights, the images and the patterns of layers to skip."""
    parts: list[str | Tensor] = [json.dumps(skip)]
    for value in [*model.state_dict().values(), *torch.utils._pytree.tree_leaves(batches)]:
        if isinstance(value, Tensor):
            parts += [str((value.dtype, tuple(value.shape))), value]
    return fingerprint(parts)


def _read_cache(path: Path | None, key: str) -> _Findings | None:
    """Return what was found before of the same network and images, or None."""
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            candidates = Candidates.from_json(metadata["candidates"])
            return _Findings(dict(candidates.forms), dict(candidates.widths), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or no cache of nin: {error}; remove it") from error


def _write_cache(path: Path, key: str, found: _Findings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in found.sensitivities.items()}
    candidates = Candidates(found.forms, found.widths).to_json()
    write_atomically(path, save(tensors, metadata={"key": key, "candidates": candidates}))
