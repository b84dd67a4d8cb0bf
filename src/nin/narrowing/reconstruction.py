"""Layerwise reconstruction: each layer of the narrowed network is fitted to the original's output at its place."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from nin.models.narrowing_plan import LayerPlan, Plan
from nin.models.surgery import make_planned_module, replace_module, select_outputs
from nin.narrowing.analysis import Analysis
from nin.narrowing.calibration import model_inputs
from nin.narrowing.channel_elimination import eliminate_channels, patch_indices
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
    readers = {p.consumer: p.readers for p in plan.pruned}
    changed = [p for p in plan.layers if p.form != "keep" or p.name in reconstruction.prunings]
    size = max(1, -(-len(changed) // max(1, passes)))
    groups = [changed[i : i + size] for i in range(0, len(changed), size)]
    errors: dict[str, float] = {}
    for done, group in enumerate(groups):
        moments = reconstruction.collect([n for layer in group for n in (layer.name, *readers.get(layer.name, ()))])
        for layer in group:
            error = reconstruction.replace(layer, moments)
            if error is not None:
                errors[layer.name] = error
        on_progress("Fitting the layers", done + 1, len(groups))
    return reconstruction.narrowed, errors


class _Reconstruction:
    """The original network beside the one that is narrowed layer by layer, in place."""

    def __init__(self, original: nn.Module, plan: Plan, analysis: Analysis, batches: list[Any]) -> None:
        self.original, self.analysis, self.batches = original, analysis, batches
        self.narrowed = copy_model(original)
        self.prunings = {pruning.consumer: pruning for pruning in plan.pruned}

    def collect(self, names: list[str]) -> dict[str, Moments]:
        """Return the moments of layers: x is the input in the narrowed network, y the output that is wanted."""
        modules = {name: self.narrowed.get_submodule(name) for name in names}
        specs = {name: self.analysis.specs[name] for name in names}
        moments = {name: Moments.of_layer(specs[name], module, "xx", "yx", "yy") for name, module in modules.items()}
        graph = self.analysis.graph
        scales = {n: scale for n in names if (scale := shortcut_scale(self.original, graph, specs[n])) is not None}
        for args, kwargs in model_inputs(self.batches):
            shortcuts = {name: graph.shortcuts[name] for name in scales}
            wanted = record_layers(self.original, specs, shortcuts, args, kwargs, extract_outputs)
            seen = record_layers(self.narrowed, specs, shortcuts, args, kwargs, extract_patches)
            for name in names:
                target = wanted[name, "layer"]
                if (name, "shortcut") in seen:
                    missing = wanted[name, "shortcut"] - seen[name, "shortcut"]
                    if missing.shape == target.shape:
                        target = target + missing * scales[name][None, :, None]
                moments[name].add(seen[name, "layer"], target)
        all_reduce_moments(moments)
        return moments

    def replace(self, layer: LayerPlan, all_moments: dict[str, Moments]) -> float | None:
        """Put the fitted layer into the network; return the fraction of its variance that it misses, where known."""
        moments = all_moments[layer.name]
        spec, old = self.analysis.specs[layer.name], self.narrowed.get_submodule(layer.name)
        weight = old.get_parameter("weight").detach().double().flatten(1).view(spec.groups, -1, spec.patch)
        roots = [matrix_roots(g.to(weight.device)) for g in self.analysis.sensitivities[layer.name]]
        mean_x, mean_y = moments.mean("x"), moments.mean("y")
        kept_inputs: Tensor | slice = slice(None)
        if moments.has_patch_covariance:
            seen, yx, shrinkage = moments.covariance("xx"), moments.covariance("yx"), moments.shrinkage()
            fitted = torch.stack([least_squares(weight[g], seen[g], yx[g], shrinkage[g]) for g in range(spec.groups)])
            xx = shrink(seen, shrinkage)
            yy = fitted @ xx @ fitted.mT
        else:
            xx, fitted, yy = None, weight, moments.covariance("yy")
        pruning = self.prunings.get(layer.name)
        if pruning is not None:
            assert xx is not None
            elimination = eliminate_channels(fitted[0], xx[0], spec.taps, roots[0].sqrt, least=pruning.channels)
            kept = elimination.kept(pruning.channels, pruning.before).to(weight.device)
            kept_inputs = patch_indices(kept, spec.taps)
            xx, seen = (both[:, kept_inputs][:, :, kept_inputs] for both in (xx, seen))
            mean_x = mean_x[:, kept_inputs]
            fitted = least_squares(weight[0][:, kept_inputs], seen[0], yx[0][:, kept_inputs], shrinkage[0])[None]
            yy = fitted @ xx @ fitted.mT
            for name in (pruning.producer, *pruning.between, *pruning.gates):
                replace_module(self.narrowed, name, select_outputs(self.narrowed.get_submodule(name), kept))
            for name in pruning.readers:
                self.cut_inputs(name, kept, all_moments[name])
        factored = [
            _factorise(layer, fitted[g], None if xx is None else xx[g], yy[g], roots[g]) for g in range(spec.groups)
        ]
        effective = torch.stack([product for _, product in factored])
        bias = (mean_y - (effective @ mean_x[:, :, None])[:, :, 0]).flatten()
        # its output channels are pruned when their consumer is replaced, which comes later
        new = make_planned_module(dataclasses.replace(layer, outputs=spec.out_channels), old)
        _fill(new, [matrices for matrices, _ in factored], bias)
        replace_module(self.narrowed, layer.name, new)
        return None if xx is None else _missed_variance(moments, effective, seen, kept_inputs, roots)

    def cut_inputs(self, name: str, kept: Tensor, moments: Moments) -> None:
        """Fit a 1×1 layer to these input channels alone, in the narrowed network."""
        spec, old = self.analysis.specs[name], self.narrowed.get_submodule(name)
        weight = old.get_parameter("weight").detach().double().flatten(1)
        xx, yx = moments.covariance("xx")[0], moments.covariance("yx")[0]
        fitted = least_squares(weight[:, kept], xx[kept][:, kept], yx[:, kept], moments.shrinkage()[0])
        bias = moments.mean("y")[0] - fitted @ moments.mean("x")[0, kept]
        new = dataclasses.replace(spec, in_channels=len(kept)).make_layer(old.get_parameter("weight"))
        _fill(new, [[fitted]], bias)
        replace_module(self.narrowed, name, new)


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


@torch.no_grad()
def _fill(module: nn.Module, groups: list[list[Tensor]], bias: Tensor) -> None:
    """Copy the matrices of each group into the weights of a layer or a chain of layers, and the bias into its last."""
    chain = list(module) if isinstance(module, nn.Sequential) else [module]
    for layer, matrices in zip(chain, zip(*groups, strict=True), strict=True):
        weight = layer.get_parameter("weight")
        weight.copy_(torch.cat(matrices).view(weight.shape))
    if isinstance(chain[-1].bias, Tensor):
        chain[-1].bias.copy_(bias)


def _missed_variance(
    moments: Moments, effective: Tensor, xx: Tensor, kept_inputs: Tensor | slice, roots: list[MatrixRoots]
) -> float:
    """Return the weighted fraction of the wanted variance that is missed: tr(G Cov(y - ŷ)) / tr(G Cov(y))."""
    yy, yx = moments.covariance("yy"), moments.covariance("yx")[:, :, kept_inputs]
    both = yx @ effective.mT
    residual = yy - both - both.mT + effective @ xx @ effective.mT
    whole = weighted_variance(yy, roots)
    return max(0.0, weighted_variance(residual, roots) / whole) if whole else 0.0
