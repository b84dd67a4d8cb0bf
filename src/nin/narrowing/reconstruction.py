"""From a plan to weights: layer by layer, from what comes in now to what the original network gives."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nin.models.layer_shape import LayerShape, inputs_of, set_module
from nin.models.plan import LayerPlan, Plan, Thinning
from nin.models.surgery import build_layer, select_channels, select_outputs
from nin.narrowing.dependency_graph import Shortcut
from nin.narrowing.low_rank import InputForm, balance, eliminate, fit, input_directions, output_form, root
from nin.narrowing.moments import (
    Moments,
    check_finite,
    make_moments,
    observed_places,
    patches,
    reduce_all,
    results,
    watch,
)

# A channel that BatchNorm scales below this share of the largest scale cannot mend what the shortcut lacks.
LEAST_SCALE = 0.02


@dataclasses.dataclass(frozen=True)
class Material:
    """What the refinement works from.

    Attributes:
        original: the network, expanded, in evaluation mode.
        plan: what to do.
        shapes: of its layers.
        sensitivities: G of each layer.
        shortcuts: what is added to layers' results.
        batches: images.
    """

    original: nn.Module
    plan: Plan
    shapes: dict[str, LayerShape]
    sensitivities: dict[str, Tensor]
    shortcuts: dict[str, Shortcut]
    batches: list[Any]


def refine(
    material: Material, *, passes: int, on_progress: Callable[[int, int], None] | None = None
) -> tuple[nn.Module, dict[str, float]]:
    """Build the narrowed network.

    The layers are done in the order of their calls. Each is fitted by least squares from what the part before it,
    already narrowed, gives, to what the original gives at that place (and, where a shortcut is added behind it, to
    what is missing there), so that errors do not add up.

    Args:
        material: the network and the plan.
        passes: times that the images are run through both networks, at most; layers that share a pass do not see
            each other's errors.
        on_progress: called with the passes done and all passes.

    Returns:
        The new network, and the share of each fitted layer's variance that is missed; layers whose patches are too
        wide for a covariance are not among them.

    Source:
        Zhang, Zou, He, Sun: Accelerating very deep convolutional networks, 2015, arXiv 1505.06798, section 3.3
        (asymmetric); He, Zhang, Sun: Channel pruning, 2017, arXiv 1707.06168, section 3.3 (shortcuts).
    """
    narrowed = copy.deepcopy(material.original)
    thinned = {t.consumer: t for t in material.plan.thinned}
    work = [layer for layer in material.plan.layers if layer.form != "keep" or layer.name in thinned]
    size = max(1, -(-len(work) // max(1, passes)))
    groups = [work[i : i + size] for i in range(0, len(work), size)]
    errors: dict[str, float] = {}
    for done, group in enumerate(groups):
        moments = collect(material, narrowed, [layer.name for layer in group])
        for layer in group:
            missed = _replace(material, narrowed, layer, thinned.get(layer.name), moments[layer.name])
            if missed is not None:
                errors[layer.name] = missed
        if on_progress:
            on_progress(done + 1, len(groups))
    return narrowed, errors


class _AllSeenError(Exception):
    """Ends a run of the network: what comes after the last layer of interest is not needed."""


def collect(material: Material, narrowed: nn.Module, names: list[str]) -> dict[str, Moments]:
    """Run the images through both networks; x is what layers see in the narrowed one, y what they should give."""
    shapes = {name: material.shapes[name] for name in names}
    moments = {name: make_moments(shapes[name], narrowed.get_submodule(name), "xx", "yx", "yy") for name in names}
    for args, kwargs in inputs_of(material.batches):
        wanted = _run(material, material.original, names, args, kwargs, side="y")
        seen = _run(material, narrowed, names, args, kwargs, side="x")
        for name in names:
            target = wanted[name, "layer"]
            scale = _shortcut_scale(material, name)
            if scale is not None and (name, "shortcut") in seen:
                missing = wanted[name, "shortcut"] - seen[name, "shortcut"]
                if missing.shape == target.shape:
                    target = target + missing * scale[None, :, None]
            moments[name].add(seen[name, "layer"], target)
    reduce_all(moments)
    return moments


def _run(
    material: Material, model: nn.Module, names: list[str], args: Any, kwargs: Any, *, side: str
) -> dict[tuple[str, str], Tensor]:
    """Run one batch and return each layer's patches or results, and what is added behind it."""
    caught: dict[tuple[str, str], list[Tensor]] = {}
    missing = sum(material.shapes[name].calls for name in names)
    handles = []

    def record(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        nonlocal missing
        shape, places = material.shapes[name], observed_places(material.shapes[name])
        check_finite(name, x, y)
        value = patches(x, shape, places) if side == "x" else results(y, shape, places)
        caught.setdefault((name, "layer"), []).append(value)
        missing -= 1
        if missing == 0 and not waiting:
            raise _AllSeenError

    waiting: set[str] = set()
    for name in names:
        shortcut = material.shortcuts.get(name)
        if shortcut is not None and _shortcut_scale(material, name) is not None:
            hook = _shortcut_hook(material, name, shortcut, caught, waiting)
            module = model.get_submodule(shortcut.source)
            if shortcut.side == "output":
                waiting.add(name)
                handles.append(module.register_forward_hook(lambda m, a, y, hook=hook: hook(y)))
            else:
                handles.append(module.register_forward_pre_hook(lambda m, a, hook=hook: hook(a[0] if a else None)))
    try:
        with watch({name: model.get_submodule(name) for name in names}, record), torch.no_grad():
            model(*args, **kwargs)
    except _AllSeenError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {key: torch.cat(values, dim=2) for key, values in caught.items()}


def _shortcut_hook(
    material: Material,
    name: str,
    shortcut: Shortcut,
    caught: dict[tuple[str, str], list[Tensor]],
    waiting: set[str],
) -> Callable[[Any], None]:
    """Return what notes the other summand at the places that are looked at."""
    shape = material.shapes[name]
    places = observed_places(shape)

    def note(value: Any) -> None:
        waiting.discard(name)
        if isinstance(value, Tensor) and value.dim() == 4 and tuple(value.shape[-2:]) == shape.output_size:
            caught.setdefault((name, "shortcut"), []).append(results(value, shape, places))

    return note


def _shortcut_scale(material: Material, name: str) -> Tensor | None:
    """Return by how much each channel of a layer must move to move the sum behind its BatchNorm by 1."""
    shortcut = material.shortcuts.get(name)
    if shortcut is None or material.shapes[name].groups > 1 or material.shapes[name].calls > 1:
        return None
    if shortcut.norm is None:
        return next(material.original.parameters()).new_ones(material.shapes[name].out_channels)
    norm = material.original.get_submodule(shortcut.norm)
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None or norm.running_mean is None:
        return None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    usable = scale.abs() > LEAST_SCALE * scale.abs().max()
    return torch.where(usable, 1 / scale, torch.zeros_like(scale))


def _replace(
    material: Material, narrowed: nn.Module, layer: LayerPlan, thinning: Thinning | None, moments: Moments
) -> float | None:
    """Put the fitted layer into the network; returns the share of its variance that it misses, where it is known."""
    shape, old = material.shapes[layer.name], narrowed.get_submodule(layer.name)
    weight = old.get_parameter("weight").detach().double().flatten(1).view(shape.groups, -1, shape.patch)
    roots = [root(g.to(weight.device)) for g in material.sensitivities[layer.name]]
    mean_x, mean_y = moments.mean("x"), moments.mean("y")
    values_seen: Tensor | slice = slice(None)
    if moments.full:
        xx, yx = moments.covariance("xx"), moments.covariance("yx")
        fitted = torch.stack([fit(weight[g], xx[g], yx[g]) for g in range(shape.groups)])
        yy = fitted @ xx @ fitted.mT
    else:
        xx, fitted, yy = None, weight, moments.covariance("yy")
    if thinning is not None:
        assert xx is not None
        path = eliminate(fitted[0], xx[0], shape.taps, roots[0][0], least=thinning.channels)
        kept = path.kept(thinning.channels, thinning.before).to(weight.device)
        values_seen = (kept[:, None] * shape.taps + torch.arange(shape.taps, device=kept.device)).flatten()
        cut = xx[0][values_seen][:, values_seen]
        fitted = fit(weight[0][:, values_seen], cut, yx[0][:, values_seen])[None]
        xx, mean_x = cut[None], mean_x[:, values_seen]
        yy = fitted @ xx @ fitted.mT
        _thin(narrowed, thinning, kept)
    # channels that a later layer does without are taken away when that layer is done
    new = build_layer(dataclasses.replace(layer, outputs=shape.out_channels), old)
    chain = list(new) if isinstance(new, nn.Sequential) else [new]
    made = [_solve(layer, fitted[g], None if xx is None else xx[g], yy[g], roots[g]) for g in range(shape.groups)]
    _fill(chain, [list(parts) for parts in zip(*(m[0] for m in made), strict=True)])
    effective = torch.stack([m[1] for m in made])
    bias = (mean_y - (effective @ mean_x[:, :, None])[:, :, 0]).flatten()
    last_bias = chain[-1]._parameters["bias"]
    if last_bias is not None:
        with torch.no_grad():
            last_bias.copy_(bias)
    set_module(narrowed, layer.name, new)
    return None if xx is None else _missed(moments, effective, xx, values_seen, roots)


def _missed(
    moments: Moments,
    effective: Tensor,
    xx: Tensor,
    seen: Tensor | slice,
    roots: list[tuple[Tensor, Tensor]],
) -> float:
    """Return the weighted share of the wanted variance that is missed: tr(G Cov(y - ŷ)) / tr(G Cov(y))."""
    yy, yx = moments.covariance("yy"), moments.covariance("yx")[:, :, seen]
    both = yx @ effective.mT
    rest = yy - both - both.mT + effective @ xx @ effective.mT
    missed = sum(float((r[0] @ e @ r[0]).trace()) for r, e in zip(roots, rest, strict=True))
    whole = sum(float((r[0] @ y @ r[0]).trace()) for r, y in zip(roots, yy, strict=True))
    return max(0.0, missed / whole) if whole else 0.0


def _solve(
    layer: LayerPlan, weight: Tensor, xx: Tensor | None, yy: Tensor, roots: tuple[Tensor, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return the matrices of the chain, first to last, and their product on a patch."""
    if layer.form == "keep":
        return [weight], weight
    if layer.form == "output":
        assert layer.rank_out is not None
        spectrum = output_form(yy, roots)
        u, v = spectrum.bases(layer.rank_out, roots[0])
        return balance([v @ weight, u]), u @ v @ weight
    assert xx is not None
    assert layer.rank_in is not None
    taps = weight.shape[1] // layer.inputs
    behind = InputForm(weight, xx, taps, input_directions(weight, xx, taps, roots[0]))
    projection, core = behind.layers(layer.rank_in)
    matrices, final = [projection, core], core
    if layer.rank_out is not None:
        u, v = output_form(behind.fitted(layer.rank_in), roots).bases(layer.rank_out, roots[0])
        matrices, final = [projection, v @ core, u], u @ v @ core
    effective = torch.einsum("ort,ri->oit", final.view(-1, layer.rank_in, taps), projection).flatten(1)
    return balance(matrices), effective


@torch.no_grad()
def _fill(chain: list[nn.Module], matrices: list[list[Tensor]]) -> None:
    """Copy matrices, one per group, into the weights of a chain of layers."""
    for module, parts in zip(chain, matrices, strict=True):
        weight = module.get_parameter("weight")
        weight.copy_(torch.cat(parts).view(weight.shape))


def _thin(narrowed: nn.Module, thinning: Thinning, kept: Tensor) -> None:
    """Take the other channels away from the producer and from what is between."""
    producer = narrowed.get_submodule(thinning.producer)
    set_module(narrowed, thinning.producer, select_outputs(producer, kept))
    for name in thinning.between:
        set_module(narrowed, name, select_channels(narrowed.get_submodule(name), kept))
