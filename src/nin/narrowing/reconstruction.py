"""Layerwise reconstruction: each layer of the narrowed network is fitted to the original's output at its place."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from nin.models.layer_spec import LayerSpec
from nin.models.narrowing_plan import LayerPlan, Plan
from nin.models.surgery import make_planned_module, replace_module, select_outputs
from nin.narrowing.analysis import Analysis
from nin.narrowing.calibration import in_parts, model_inputs
from nin.narrowing.channel_elimination import ConsumerFit, eliminate_channels, patch_indices
from nin.narrowing.channel_flow import ChannelGroup
from nin.narrowing.linalg import MatrixRoots, least_squares, matrix_roots, shrink, weighted_variance
from nin.narrowing.low_rank import InputProjection, balance_scales, output_factors
from nin.narrowing.moments import Moments, all_reduce_moments
from nin.narrowing.patches import extract_outputs, extract_patches
from nin.narrowing.shortcuts import record_layers, shortcut_scale
from nin.runtime.model_copy import copy_model
from nin.runtime.progress import ProgressCallback, ignore_progress


def reconstruct(
    original: nn.Module,
    plan: Plan,
    analysis: Analysis,
    batches: list[Any],
    *,
    passes: int,
    on_progress: ProgressCallback = ignore_progress,
) -> tuple[nn.Module, dict[str, float]]:
    """Build the narrowed network and fit its weights.

    The layers are fitted in the order of their calls, each by least squares from its input in the network that is
    narrowed so far to its output in the original (and, where a shortcut is added behind it, to the error of the
    shortcut), so that errors do not accumulate.

    Args:
        original: the network, of plain layers, in evaluation mode.
        plan: what to do.
        analysis: of the original.
        batches: calibration images.
        passes: times that the images are run through both networks, at most; layers that share a pass do not see
            each other's errors.
        on_progress: called with what is being done, the passes done and all passes.

    Returns:
        The new network, and the fraction of each fitted layer's variance that is missed; layers whose patches are too
        large for a covariance are not among them.

    Source:
        Zhang, Zou, He, Sun: Accelerating very deep convolutional networks, 2015, arXiv 1505.06798, section 3.3
        (asymmetric); He, Zhang, Sun: Channel pruning, 2017, arXiv 1707.06168, section 3.3 (shortcuts).
    """
    reconstruction = _Reconstruction(original, plan, analysis, batches)
    consumers = {name for group in reconstruction.groups.values() for name in group.consumers}
    changed = [p for p in plan.layers if p.form != "keep" or p.name in consumers]
    size = max(1, -(-len(changed) // max(1, passes)))
    parts = [changed[i : i + size] for i in range(0, len(changed), size)]
    errors: dict[str, float] = {}
    for done, part in enumerate(parts):
        moments = reconstruction.collect([layer.name for layer in part])
        for layer in part:
            error = reconstruction.replace(layer, moments)
            if error is not None:
                errors[layer.name] = error
        on_progress("Fitting the layers", done + 1, len(parts))
    return reconstruction.narrowed, errors


class _Reconstruction:
    """The original network beside the one that is narrowed layer by layer, in place."""

    def __init__(self, original: nn.Module, plan: Plan, analysis: Analysis, batches: list[Any]) -> None:
        self.original, self.analysis, self.batches = original, analysis, batches
        self.narrowed = copy_model(original)
        pruned = {(p.producer, p.consumer): p.channels for p in plan.pruned}
        # what is still to be pruned, and the units that stay
        self.groups = {group.key: group for group in analysis.graph.groups if group.key in pruned}
        self.units = {key: pruned[key] for key in self.groups}
        # which of the original's channels a layer's input and output still have, where some are gone
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def collect(self, names: list[str]) -> dict[str, "_LayerMoments"]:
        """Return the moments of layers, and of those that lose channels with them."""
        pending = [group for group in self.groups.values() if not {*names}.isdisjoint(group.consumers)]
        names = list(dict.fromkeys([*names, *(name for group in pending for name in group.inputs)]))
        specs = {name: self.analysis.specs[name] for name in names}
        moments = {
            name: _LayerMoments(spec, self.narrowed.get_submodule(name), self.inputs.get(name), self.outputs.get(name))
            for name, spec in specs.items()
        }
        graph = self.analysis.graph
        scales = {n: scale for n in names if (scale := shortcut_scale(self.original, graph, specs[n])) is not None}
        for args, kwargs in (part for batch in model_inputs(self.batches) for part in in_parts(*batch)):
            shortcuts = {name: graph.shortcuts[name] for name in scales}
            wanted = record_layers(self.original, specs, shortcuts, args, kwargs, extract_outputs)
            seen = record_layers(self.narrowed, specs, shortcuts, args, kwargs, extract_patches)
            for name in names:
                target = moments[name].of_outputs(wanted[name, "layer"])
                if (name, "shortcut") in seen:
                    other, given = moments[name].of_outputs(wanted[name, "shortcut"]), seen[name, "shortcut"]
                    if other.shape == given.shape == target.shape:
                        scale = moments[name].of_outputs(scales[name][None, :, None])
                        target = target + (other - given) * scale
                moments[name].moments.add(seen[name, "layer"], target)
        all_reduce_moments({name: value.moments for name, value in moments.items()})
        return moments

    def replace(self, layer: LayerPlan, all_moments: dict[str, "_LayerMoments"]) -> float | None:
        """Put the fitted layer into the network; return the fraction of its variance that it misses, where known."""
        name, spec = layer.name, self.analysis.specs[layer.name]
        for key in [key for key, group in self.groups.items() if name in group.consumers]:
            self.prune(self.groups.pop(key), self.units[key], all_moments, but=name)
        fit = self.fit(name, all_moments[name])
        roots = self.roots(name)
        factored = [
            _factorise(layer, fit.weight[g], None if fit.xx is None else fit.xx[g], fit.yy[g], roots[g])
            for g in range(spec.groups)
        ]
        effective = torch.stack([product for _, product in factored])
        # output channels that are pruned later are still there
        layer = dataclasses.replace(layer, outputs=spec.groups * fit.weight.shape[1])
        self.fill(layer, [matrices for matrices, _ in factored], fit.bias(effective))
        return None if fit.xx is None else fit.missed_variance(effective, roots)

    def weight(self, name: str) -> Tensor:
        """Return a layer's weight in the narrowed network: (groups, C_out / groups, C_in / groups · k²), in float64."""
        weight = self.narrowed.get_submodule(name).get_parameter("weight").detach().double()
        return weight.flatten(1).view(self.analysis.specs[name].groups, -1, weight[0].numel())

    def roots(self, name: str) -> list[MatrixRoots]:
        """Return the roots of the Fisher information of the output channels that a layer still has."""
        sensitivity, kept = self.analysis.sensitivities[name], self.outputs.get(name)
        if kept is not None:  # of a layer without groups
            sensitivity = sensitivity[:, kept.to(sensitivity.device)][:, :, kept.to(sensitivity.device)]
        return [matrix_roots(g.to(next(self.narrowed.parameters()).device)) for g in sensitivity]

    def prune(self, group: ChannelGroup, units: int, moments: dict[str, "_LayerMoments"], *, but: str) -> None:
        """Remove the units of a group that add least to the errors of its consumers, and refit these and its readers.

        Args:
            group: of channels.
            units: that stay.
            moments: of the consumers and readers.
            but: a consumer that is fitted by the caller.
        """
        fits = []
        for name in group.consumers:
            fit = self.fit(name, moments[name])
            assert fit.xx is not None
            parts = torch.tensor(group.inputs[name])
            if name in self.inputs:  # some of other groups are gone
                parts = torch.searchsorted(self.inputs[name], parts)
            taps = self.analysis.specs[name].taps
            fits.append(ConsumerFit(fit.weight[0], fit.xx[0], taps, self.roots(name)[0].sqrt, parts))
        weights = [self.analysis.shortcut_weights.get(name, 1.0) for name in group.consumers]
        kept = {*eliminate_channels(fits, least=units, weights=weights).kept(units, group.units).tolist()}
        gone = [unit for unit in range(group.units) if unit not in kept]
        for name, places in group.outputs.items():
            width = _output_channels(self.original.get_submodule(name))
            stays = _remove(self.outputs, name, width, [place for unit in gone for place in places[unit]])
            replace_module(self.narrowed, name, select_outputs(self.narrowed.get_submodule(name), stays))
        for name, places in group.inputs.items():
            spec, weight = self.analysis.specs[name], self.weight(name)
            stays = _remove(self.inputs, name, spec.in_channels, [place for unit in gone for place in places[unit]])
            weight = weight[:, :, patch_indices(stays, spec.taps).to(weight.device)]
            fit = self.fit(name, moments[name], weight)
            fitted = weight if name == but else fit.weight
            inputs, outputs = len(self.inputs[name]), fitted.shape[1]
            self.fill(LayerPlan(name, "keep", None, None, inputs, outputs), [[fitted[0]]], fit.bias(fitted))

    def fit(self, name: str, moments: "_LayerMoments", weight: Tensor | None = None) -> "_Fit":
        """Return the fit of a layer to the channels that it has now, from its weight if no other is given."""
        weight = self.weight(name) if weight is None else weight
        return moments.fit(weight, self.inputs.get(name), self.outputs.get(name))

    @torch.no_grad()
    def fill(self, layer: LayerPlan, groups: list[list[Tensor]], bias: Tensor) -> None:
        """Put a layer, or a chain of layers, of these matrices and this bias into the network."""
        module = make_planned_module(layer, self.original.get_submodule(layer.name))
        chain = list(module) if isinstance(module, nn.Sequential) else [module]
        for link, matrices in zip(chain, zip(*groups, strict=True), strict=True):
            weight = link.get_parameter("weight")
            weight.copy_(torch.cat(matrices).view(weight.shape))
        if isinstance(chain[-1].bias, Tensor):
            chain[-1].bias.copy_(bias)
        replace_module(self.narrowed, layer.name, module)


def _output_channels(module: nn.Module) -> int:
    """Return the output channels of a layer or BatchNorm."""
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features
    assert isinstance(module, nn.Conv2d | nn.Linear)
    return len(module.weight)


def _remove(table: dict[str, Tensor], name: str, width: int, gone: list[int]) -> Tensor:
    """Remove channels of a layer from a table of those that it still has; return the positions of those that stay."""
    had = table.get(name, torch.arange(width))
    stays = torch.isin(had, torch.tensor(gone), invert=True).nonzero()[:, 0]
    table[name] = had[stays]
    return stays


def _positions(had: Tensor | None, has: Tensor | None) -> Tensor | slice:
    """Return where the channels that a layer has are among those that it had; None is all of them."""
    if has is None:
        return slice(None)
    return has if had is None else torch.searchsorted(had, has)


class _LayerMoments:
    """The moments of a layer: x is its input in the narrowed network, y the output that is wanted.

    Args:
        spec: of the original's layer.
        module: the layer.
        inputs: the numbers of the original's channels that its input has, None if it has all.
        outputs: the same of its output.
    """

    def __init__(self, spec: LayerSpec, module: nn.Module, inputs: Tensor | None, outputs: Tensor | None) -> None:
        self.inputs, self.outputs, self.taps = inputs, outputs, spec.taps
        width_in, width_out = spec.in_channels if inputs is None else len(inputs), spec.out_channels
        width_out = width_out if outputs is None else len(outputs)
        spec = dataclasses.replace(spec, in_channels=width_in, out_channels=width_out)
        self.moments = Moments.of_layer(spec, module, "xx", "yx", "yy")

    def of_outputs(self, values: Tensor) -> Tensor:
        """Return the layer's output channels of the original's: (groups, C_out / groups, M)."""
        return values if self.outputs is None else values[:, self.outputs.to(values.device)]

    def fit(self, weight: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> "_Fit":
        """Return the least-squares fit to what the layer has of its channels by now, from this weight of them."""
        moments, device = self.moments, weight.device
        rows, columns = _positions(self.outputs, outputs), _positions(self.inputs, inputs)
        if isinstance(rows, Tensor):
            rows = rows.to(device)
        if isinstance(columns, Tensor):
            columns = patch_indices(columns, self.taps).to(device)
        mean_x, mean_y = moments.mean("x")[:, columns], moments.mean("y")[:, rows]
        wanted = moments.covariance("yy")[:, rows][:, :, rows]
        if not moments.has_patch_covariance:
            return _Fit(weight, None, wanted, mean_x, mean_y)
        seen, yx = moments.covariance("xx")[:, columns][:, :, columns], moments.covariance("yx")[:, rows][:, :, columns]
        shrinkage = moments.shrinkage()
        fits = [least_squares(*values) for values in zip(weight, seen, yx, shrinkage, strict=True)]
        return _Fit(torch.stack(fits), shrink(seen, shrinkage), wanted, mean_x, mean_y, seen, yx)


@dataclasses.dataclass(frozen=True)
class _Fit:
    """A layer fitted by least squares; all have the groups first.

    Attributes:
        weight: (groups, C_out / groups, C_in / groups · k²).
        xx: the covariance of its input, shrunk; None where that is too large.
        wanted: Cov(y) of the output that is wanted.
        mean_x: of its input.
        mean_y: of the output that is wanted.
        seen: the covariance of its input as it is.
        yx: Cov(y, x).
    """

    weight: Tensor
    xx: Tensor | None
    wanted: Tensor
    mean_x: Tensor
    mean_y: Tensor
    seen: Tensor | None = None
    yx: Tensor | None = None

    @property
    def yy(self) -> Tensor:
        """The covariance of its output."""
        return self.wanted if self.xx is None else self.weight @ self.xx @ self.weight.mT

    def bias(self, effective: Tensor) -> Tensor:
        """Return the bias of a layer of that weight, with which the means are right."""
        return (self.mean_y - (effective @ self.mean_x[:, :, None])[:, :, 0]).flatten()

    def missed_variance(self, effective: Tensor, roots: list[MatrixRoots]) -> float:
        """Return the weighted fraction of the wanted variance that is missed: tr(G Cov(y - ŷ)) / tr(G Cov(y))."""
        assert self.seen is not None
        assert self.yx is not None
        both = self.yx @ effective.mT
        residual = self.wanted - both - both.mT + effective @ self.seen @ effective.mT
        whole = weighted_variance(self.wanted, roots)
        return max(0.0, weighted_variance(residual, roots) / whole) if whole else 0.0


def _factorise(
    layer: LayerPlan, weight: Tensor, xx: Tensor | None, yy: Tensor, roots: MatrixRoots
) -> tuple[list[Tensor], Tensor]:
    """Return the matrices of the chain of layers, first to last, and their product on a patch."""
    if layer.form == "keep":
        return [weight], weight
    if layer.form == "output":
        assert layer.rank_out is not None
        u, v = output_factors(yy, roots, layer.rank_out)
        return balance_scales([v @ weight, u]), u @ v @ weight
    assert xx is not None
    assert layer.rank_in is not None
    taps = weight.shape[1] // layer.inputs
    behind = InputProjection(weight, xx, taps, roots.sqrt)
    projection, core = behind.factors(layer.rank_in)
    matrices, final = [projection, core], core
    if layer.rank_out is not None:
        u, v = output_factors(behind.output_covariance(layer.rank_in), roots, layer.rank_out)
        matrices, final = [projection, v @ core, u], u @ v @ core
    effective = torch.einsum("ort,ri->oit", final.view(-1, layer.rank_in, taps), projection).flatten(1)
    return balance_scales(matrices), effective
