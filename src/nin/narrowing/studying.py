"""Looking at a network before narrowing it: its layers, who feeds whom, and what each choice would lose."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nin.errors import UserError
from nin.narrowing.candidates import Candidates, Form, find_forms, find_widths
from nin.narrowing.graph import Edge, Shortcut, Wiring, trace
from nin.narrowing.sensitivity import measure_sensitivity
from nin.narrowing.statistics import Moments, measure_shapes, observe
from nin.narrowing.structure import LayerShape, find_layers

# Gradients are taken on at most this many batches' worth of images.
SENSITIVITY_IMAGES = 512


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
    key = fingerprint(model, batches, skip)
    known = _read_cache(cache, key)
    if known is None:
        known = _measure(model, able, wiring.edges, batches, on_progress)
        if cache is not None:
            _write_cache(cache, key, *known)
    candidates, sensitivities = known
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


def _measure(
    model: nn.Module,
    able: dict[str, LayerShape],
    edges: tuple[Edge, ...],
    batches: list[Any],
    on_progress: Callable[[str, int, int], None] | None,
) -> tuple[Candidates, dict[str, Tensor]]:
    """Run the images through the network, forwards and backwards, and work out the candidates."""

    def tell(what: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(what, done, total) if on_progress else None

    moments = observe(model, able, batches, tell("Looking at the layers"))
    _warn_of_few_samples(able, moments)
    sensitivities = measure_sensitivity(model, able, _few(batches))
    forms: dict[str, tuple[Form, ...]] = {}
    for done, (name, shape) in enumerate(able.items()):
        weight = model.get_submodule(name).get_parameter("weight").detach().flatten(1)
        forms[name] = find_forms(shape, weight, moments[name], sensitivities[name])
        tell("Weighing the forms")(done + 1, len(able))
    widths = {}
    for done, edge in enumerate(edges):
        if edge.consumer in able:
            weight = model.get_submodule(edge.consumer).get_parameter("weight").detach().flatten(1)
            widths[edge.producer, edge.consumer] = find_widths(
                edge, able[edge.consumer], weight, moments[edge.consumer], sensitivities[edge.consumer]
            )
        tell("Weighing the channels")(done + 1, len(edges))
    return Candidates(forms, widths), sensitivities


def _warn_of_few_samples(able: dict[str, LayerShape], moments: dict[str, Moments]) -> None:
    few = [name for name, shape in able.items() if moments[name].count < shape.patch]
    if few:
        name = min(few, key=lambda n: moments[n].count / able[n].patch)
        warnings.warn(
            f"{len(few)} layers see fewer samples than values: {name} {moments[name].count} samples of "
            f"{able[name].patch} values; the fit is regularised, give more images for a better one",
            UserWarning,
            stacklevel=5,
        )


def _few(batches: list[Any]) -> list[Any]:
    """Return the first batches, up to the number of images that gradients are taken on."""
    taken: list[Any] = []
    images = 0
    for batch in batches:
        if images >= SENSITIVITY_IMAGES:
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


def fingerprint(model: nn.Module, batches: list[Any], skip: tuple[str, ...]) -> str:
    """Return a number that changes with the weights, the images and what is skipped."""
    digest = hashlib.sha256(json.dumps(skip).encode())
    tensors = [*model.state_dict().values(), *torch.utils._pytree.tree_leaves(batches)]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_cache(path: Path | None, key: str) -> tuple[Candidates, dict[str, Tensor]] | None:
    """Return what was found before of the same network and images, or None."""
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Candidates.from_json(metadata["candidates"]), tensors
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or no cache of nin: {error}; remove it") from error


def _write_cache(path: Path, key: str, candidates: Candidates, sensitivities: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in sensitivities.items()}
    temporary = path.with_name(f".{path.name}.new")
    save_file(tensors, temporary, metadata={"key": key, "candidates": candidates.to_json()})
    temporary.replace(path)
