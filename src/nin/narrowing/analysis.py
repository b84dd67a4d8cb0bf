"""Analysis of a network before narrowing: its dependency graph, and the loss of every choice for every layer."""

import dataclasses
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.display.numbers import format_number_of
from nin.errors import UserError
from nin.models.layer_spec import LayerSpec
from nin.models.surgery import is_same_padded_depthwise
from nin.narrowing.calibration import first_batches, measure_layer_specs
from nin.narrowing.channel_flow import ChannelGroup
from nin.narrowing.dependency_graph import DependencyGraph, build_dependency_graph
from nin.narrowing.eligible_layers import find_eligible_layers
from nin.narrowing.moments import Moments, collect_moments
from nin.narrowing.search_space import SearchSpace, factorisation_candidates, width_candidates
from nin.narrowing.sensitivity import measure_sensitivities
from nin.narrowing.shortcuts import shortcut_weights
from nin.runtime import distributed
from nin.runtime.files import write_atomically
from nin.runtime.fingerprint import fingerprint
from nin.runtime.progress import ProgressCallback, ignore_progress

# Images of all processes together that gradients are computed on; a backward pass takes twice as long as a forward.
SENSITIVITY_IMAGES = 512

# Raised when the analysis of the same network and images changes, or how it is written: a cache of another format is
# not read.
CACHE_FORMAT = 5


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What is known of a network.

    Attributes:
        specs: of all convolutions and fully connected layers that are called, in the order of the calls.
        reasons: why layers cannot be narrowed, by name.
        graph: which channels can be pruned together, and what is added to layers' outputs.
        search_space: the choices for each layer, and their losses.
        sensitivities: the Fisher information G of each layer that can be narrowed.
        shortcut_weights: by which the losses of layers before a residual addition are multiplied in the search space.
    """

    specs: dict[str, LayerSpec]
    reasons: dict[str, str]
    graph: DependencyGraph
    search_space: SearchSpace
    sensitivities: dict[str, Tensor]
    shortcut_weights: dict[str, float]

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the report."""
        problem = self.graph.problem
        return (f"Channels are not left out between layers: {problem}.",) if problem else ()


def analyse(
    model: nn.Module,
    batches: list[Any],
    *,
    skip: tuple[str, ...],
    cache: Path | None,
    on_progress: ProgressCallback = ignore_progress,
) -> Analysis:
    """Analyse a network.

    Args:
        model: of plain layers, in evaluation mode.
        batches: calibration images.
        skip: patterns of layers to leave alone.
        cache: a file that keeps the results, for another budget.
        on_progress: called with what is being done, the number done, and the number of all.

    Raises:
        UserError: there is nothing to narrow, a pattern matches nothing, or a value is not finite.
    """
    layers, reasons = find_eligible_layers(model, skip)
    weighted: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    specs = measure_layer_specs(model, weighted, batches)
    for name in layers:
        if name not in specs:
            reasons[name] = "never called"
        elif specs[name].is_depthwise:
            reasons[name] = "depthwise: each channel is looked at alone"
    eligible = {name: specs[name] for name in specs if name in layers and name not in reasons}
    if not eligible:
        raise UserError(f"the model must have a convolution or fully connected layer to narrow, {_summary(reasons)}")
    graph = build_dependency_graph(model, {n for n in specs if n in layers}, _same_padded(model, specs, reasons))
    key = f"format {CACHE_FORMAT}: {' '.join(distributed.all_gather_text(fingerprint_analysis(model, batches, skip)))}"
    known = _read_cache(cache, key)
    if "" in distributed.all_gather_text("found" if known else ""):  # a process without the file: all begin again
        known = None
    space, sensitivities = known or (SearchSpace({}, {}), {})
    # a group whose consumers are not all finished begins again
    groups = tuple(g for g in graph.groups if any((g.producer, name) not in space.widths for name in g.consumers))
    unfinished = {name for group in groups for name in group.consumers}
    missing = {n: spec for n, spec in eligible.items() if n not in space.factorisations or n in unfinished}
    if missing:
        try:
            _analyse_layers(model, missing, groups, batches, space, sensitivities, on_progress)
        finally:  # after an interruption the finished layers are read from the cache
            if cache is not None and space.factorisations and distributed.is_main_process():
                _write_cache(cache, key, space, sensitivities)
    for name in eligible:
        if not bool(sensitivities[name].any()):
            reasons[name] = "the model's result does not depend on it"
    # cheap, and cut with the group
    gated = {name for group in graph.groups for name in (*group.readers, *group.gates)}
    factorisations = {n: value for n, value in space.factorisations.items() if n not in reasons and n not in gated}
    widths = {pair: value for pair, value in space.widths.items() if pair[1] not in reasons}
    weights = shortcut_weights(model, graph, specs, batches, sensitivities)
    space = SearchSpace(factorisations, widths).weighted(weights)
    return Analysis(specs, reasons, graph, space, sensitivities, weights)


def _same_padded(model: nn.Module, specs: dict[str, LayerSpec], reasons: dict[str, str]) -> set[str]:
    """Return the depthwise layers of timm's class that may lose channels, though they are left alone otherwise."""
    found = {
        n for n in specs if is_same_padded_depthwise(model.get_submodule(n)) and "forward may differ" in reasons[n]
    }
    weights = Counter(id(module._parameters.get("weight")) for module in model.modules())
    layers = {name: model.get_submodule(name) for name in found}
    return {n for n, m in layers.items() if weights[id(m._parameters["weight"])] == 1 and not m._forward_pre_hooks}


def _summary(reasons: dict[str, str]) -> str:
    if not reasons:
        return "got one without any"
    name = next(iter(reasons))
    return f"got {len(reasons)} that cannot be ({name}: {reasons[name]})"


def _analyse_layers(
    model: nn.Module,
    layers: dict[str, LayerSpec],
    groups: tuple[ChannelGroup, ...],
    batches: list[Any],
    space: SearchSpace,
    sensitivities: dict[str, Tensor],
    on_progress: ProgressCallback,
) -> None:
    """Add the choices and the Fisher information of layers to the search space and the sensitivities, in place.

    They grow layer by layer: a layer with factorisations is finished, and a group with the losses of its consumers.
    """
    moments = collect_moments(model, layers, batches, on_progress)
    _warn_of_few_samples(layers, moments)
    fisher = measure_sensitivities(model, layers, first_batches(batches, SENSITIVITY_IMAGES))
    weights = {n: model.get_submodule(n).get_parameter("weight").detach().flatten(1) for n in layers}
    waiting = list(groups)
    for done, (name, spec) in enumerate(layers.items()):
        sensitivities[name] = fisher[name]
        space.factorisations[name] = factorisation_candidates(spec, weights[name], moments[name], fisher[name])
        seen = {*list(layers)[: done + 1]}
        for group in [group for group in waiting if seen.issuperset(group.consumers)]:
            for consumer, losses in width_candidates(group, layers, weights, moments, fisher).items():
                space.widths[group.producer, consumer] = losses
            waiting.remove(group)
        # frees the covariances, the largest part of the memory
        for finished in seen & moments.keys() - {consumer for group in waiting for consumer in group.consumers}:
            del moments[finished]
        on_progress("Weighing the choices", done + 1, len(layers))


def _warn_of_few_samples(layers: dict[str, LayerSpec], moments: dict[str, Moments]) -> None:
    few = [name for name, spec in layers.items() if moments[name].count < spec.patch]
    if few and distributed.is_main_process():
        name = min(few, key=lambda n: moments[n].count / layers[n].patch)
        warnings.warn(
            f"fewer samples than values in {format_number_of(len(few), 'layer')}: {name} has "
            f"{moments[name].count} samples of {layers[name].patch} values; the fit is regularised, give more images "
            "for a better one",
            UserWarning,
            stacklevel=5,
        )


def fingerprint_analysis(model: nn.Module, batches: list[Any], skip: tuple[str, ...]) -> str:
    """Return a hash of the network's weights, the images and the patterns of layers to skip."""
    parts: list[str | Tensor] = [json.dumps(skip)]
    for value in [*model.state_dict().values(), *pytree.tree_leaves(batches)]:
        if isinstance(value, Tensor):
            parts += [str((value.dtype, tuple(value.shape))), value]
    return fingerprint(parts)


def _read_cache(path: Path | None, key: str) -> tuple[SearchSpace, dict[str, Tensor]] | None:
    """Return what the cache holds of the same network and images, or None.

    Raises:
        UserError: the file is damaged.
    """
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            sensitivities = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return SearchSpace.from_json(metadata["candidates"]), sensitivities
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or no cache of nin: {error}; remove it") from error


def _write_cache(path: Path, key: str, space: SearchSpace, sensitivities: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in sensitivities.items()}
    write_atomically(path, save(tensors, metadata={"key": key, "candidates": space.to_json()}))
