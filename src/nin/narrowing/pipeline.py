"""`narrow`: from a model and images to a narrower model, its plan and its report."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.engines.catalog import ENGINES, NARROWING_ENGINES
from nin.errors import UserError
from nin.models.narrowing_plan import Plan
from nin.models.surgery import apply_plan, to_layout, to_plain_layers
from nin.narrowing.analysis import Analysis, analyse
from nin.narrowing.calibration import find_refused_batch
from nin.narrowing.function_matching import count_passes, match_function, split_images
from nin.narrowing.latency import LatencyTable, ModelTimer
from nin.narrowing.options import NarrowOptions
from nin.narrowing.planner import LATENCY_TOLERANCE, Planner, PlannerResult, count_parameters
from nin.narrowing.recalibration import calibration_error, count_images, measure_error, recalibrate_if_better
from nin.narrowing.reconstruction import reconstruct
from nin.narrowing.report import CurvePoint, NarrowReport, file_bytes, layer_reports
from nin.narrowing.timed_engines import make_engine
from nin.runtime import distributed
from nin.runtime.device import use_threads
from nin.runtime.progress import ProgressCallback
from nin.runtime.shown_progress import shown_progress
from nin.runtime.timer import Timing
from nin.value_checks import check_share


@dataclasses.dataclass(frozen=True)
class NarrowResult:
    """A narrowed network, its plan and its report.

    Attributes:
        model: of plain PyTorch layers, in the mode (training or evaluation) of the given one.
        plan: `nin.apply_plan` builds the architecture from it.
        report: cost and accuracy before and after.
    """

    model: nn.Module
    plan: Plan
    report: NarrowReport

    def with_report(self, **changes: Any) -> "NarrowResult":
        """Return the result with other values in fields of its report."""
        return dataclasses.replace(self, report=dataclasses.replace(self.report, **changes))


def narrow(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    macs: float | None = None,
    latency: float | None = None,
    parameters: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    skip: str | Iterable[str] = (),
    options: NarrowOptions | None = None,
) -> NarrowResult:
    """Narrow a trained network: structured pruning of channels plus low-rank factorisation into 1×1 bottlenecks.

    Each layer ``y = W x + b`` becomes the layer, or chain of layers, of fewer channels that minimises
    ``tr(G · Cov(y - ŷ))`` over the images, where the Fisher information G weighs the directions of y. Which layer gets
    how many channels is a knapsack over the losses and the costs of all layers. No labels are needed. The given model
    is left as it is.

    Args:
        model: any network with ``nn.Conv2d`` or ``nn.Linear`` layers inside.
        batches: a few hundred typical images in batches, preprocessed as the model takes them: tensors, tuples or
            lists that begin with one (labels behind it are not used), or dicts of keyword arguments. A tensor alone is
            one batch.
        macs: multiply-accumulates to be left, as a share of the original's, above 0 and below 1.
        latency: time to be left, measured on the model's device; give one of the three.
        parameters: parameters to be left.
        evaluate: returns the accuracy of a model; for the report only.
        skip: names of layers to leave alone, or patterns such as "layer1.*"; one of them, or several.
        options: see `NarrowOptions`.

    In a job of several processes (``torch.distributed`` in use) each of them calls this with every n-th batch: the
    moments are all-reduced, the first process plans and times, and all get the same network and report. The accuracy
    in it is the first one's; where each process tests some of the images, ``evaluate`` adds up over the processes.

    Returns:
        The new model, the plan and the report.

    Raises:
        UserError: nothing can be narrowed, the budget cannot be reached (it says what can), a layer gives NaN, or a
            pattern matches no layer.
        ValueError: not exactly one of ``macs``, ``latency`` and ``parameters`` is a number between 0 and 1.

    Source:
        Zhang, Zou, He, Sun: Accelerating very deep convolutional networks, 2015, arXiv 1505.06798; Kim et al.:
        Compression of deep convolutional neural networks (Tucker-2), 2015, arXiv 1511.06530.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3))
        >>> result = nin.narrow(model, [torch.randn(16, 8, 12, 12)], macs=0.5)
        >>> result.report.macs[1] <= 0.5 * result.report.macs[0]
        True
    """
    kind, share = _budget(macs=macs, latency=latency, parameters=parameters)
    options = options or NarrowOptions()
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    loaded, held_out = _load_batches("batches", batches), _load_batches("held_out", options.held_out)
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    original = to_layout(to_plain_layers(model).eval(), options.layout)
    refused = find_refused_batch("batches", original, loaded) or find_refused_batch("held_out", original, held_out)
    # in all processes, or the others would wait for one that has ended
    if distributed.all_reduce_sum(torch.tensor(float(not loaded or refused is not None))) > 0:
        raise refused or UserError("batches must hold at least one batch of images (in each process), got none")
    with shown_progress("Narrowing", options.on_progress) as on_progress:
        with use_threads(options.threads):
            like = next((p for p in original.parameters() if p.is_floating_point()), torch.zeros(()))
            model_timer = ModelTimer(
                original, loaded, options.layout, make_engine(options.engine, like, options.layout), on_progress
            )
            if options.measure_latency or kind == "latency":  # refused before the work, and in all processes
                distributed.broadcast_result(model_timer.prepare)
        analysis = analyse(original, loaded, skip=patterns, cache=options.cache, on_progress=on_progress)
        narrower = _Narrower(model_timer, held_out, analysis, kind, evaluate, options, on_progress)
        try:
            points = [_curve_point(narrower.narrow(other)) for other in options.budgets if other != share]
            result = narrower.narrow(share)
        finally:  # layers that were timed before an interruption need not be timed again
            if distributed.is_main_process():
                narrower.table.save()
    result.model.train(model.training)
    if not points:
        return result
    curve = tuple(sorted([*points, _curve_point(result)], key=lambda p: -p.share))
    return result.with_report(curve=curve)


def _budget(**shares: float | None) -> tuple[str, float]:
    """Return the kind of budget that was given, and the share that it leaves."""
    given = {name: value for name, value in shares.items() if value is not None}
    if len(given) != 1:
        got = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise ValueError(f"give exactly one of macs, latency and parameters, got {got}")
    name, share = next(iter(given.items()))
    return name, check_share(name, share)


def _load_batches(name: str, batches: Iterable[Any]) -> list[Any]:
    """Return batches as a list, a tensor alone as one batch."""
    if isinstance(batches, Tensor) and batches.dim() <= 4:
        return [batches]  # of vectors, or of images
    if isinstance(batches, str | dict) or not isinstance(batches, Iterable):
        raise UserError(f"{name} must be a list or loader of batches, got {type(batches).__name__}")
    return list(batches)


def _curve_point(result: NarrowResult) -> CurvePoint:
    r = result.report
    return CurvePoint(result.plan.share, r.macs[1], r.parameters[1], r.latency, r.accuracy, r.calibration_error)


class _Narrower:
    """Narrows one network to one budget after the other; they share the analysis and the latencies."""

    def __init__(
        self,
        model_timer: ModelTimer,
        held_out: list[Any],
        analysis: Analysis,
        kind: str,
        evaluate: Callable[[nn.Module], float] | None,
        options: NarrowOptions,
        on_progress: ProgressCallback,
    ) -> None:
        original, batches = model_timer.original, model_timer.batches
        self.original, self.batches, self.held_out, self.analysis = original, batches, held_out, analysis
        self.evaluate, self.options = evaluate, options
        self.on_progress = on_progress
        images = len(next(t for t in pytree.tree_leaves(batches[0]) if isinstance(t, Tensor)))
        batch = options.batch or images
        self.reported_batches = sorted({1, images, batch}) if options.measure_latency else []
        cache = None if options.cache is None else options.cache.with_suffix(".latency.json")
        self.model_timer, engine = model_timer, model_timer.engine
        with use_threads(options.threads):
            self.table = LatencyTable(
                engine.like, batch, options.layout, engine=engine, cache=cache, on_progress=on_progress
            )
        self.planner = Planner(original, analysis, kind, self.table, self.model_timer, options)
        self.original_accuracy: dict[str, float] = {}  # evaluated once for all budgets

    def narrow(self, share: float) -> NarrowResult:
        """Return the network narrowed to a share of its cost."""
        with use_threads(self.options.threads):
            planned = PlannerResult.from_json(distributed.broadcast_result(lambda: self.planner.plan(share).to_json()))
        if self.options.dry_run:
            return self.result(apply_plan(self.original, planned.plan), planned)
        narrowed, errors, note = self.fit(planned)
        if note:
            planned = dataclasses.replace(planned, notes=(*planned.notes, note))
        distributed.broadcast_model(narrowed)
        if self.evaluate is not None and not self.original_accuracy:
            self.original_accuracy = {"original": self.evaluate(self.original)}
        accuracy = {**self.original_accuracy, "raw": self.evaluate(narrowed)} if self.evaluate is not None else {}
        on_fitted, recalibrated = None, False
        if self.options.renormalise:
            narrowed, on_fitted, recalibrated = recalibrate_if_better(narrowed, self.original, self.batches)
        error = measure_error(narrowed, self.original, self.batches, self.held_out, on_fitted)
        if self.evaluate is not None:
            accuracy["corrected"] = self.evaluate(narrowed) if recalibrated else accuracy["raw"]
        if recalibrated:
            planned = dataclasses.replace(planned, notes=(*planned.notes, "BatchNorm statistics were measured again."))
        return self.result(to_layout(narrowed, self.options.layout), planned, errors, accuracy, error)

    def fit(self, planned: PlannerResult) -> tuple[nn.Module, dict[str, float], str]:
        """Return the network of a plan with fitted weights, the error of each layer, and a note for the report."""
        fit_layers = functools.partial(
            reconstruct,
            self.original,
            planned.plan,
            self.analysis,
            passes=self.options.passes,
            on_progress=self.on_progress,
        )
        layers = layer_reports(self.analysis, planned, {})
        macs = sum(layer.macs_before for layer in layers), sum(layer.macs_after for layer in layers)
        passes = self.options.matching_passes
        if passes is None:
            passes = count_passes(count_images(self.batches), macs)
        match = functools.partial(match_function, original=self.original, passes=passes, on_progress=self.on_progress)
        if passes and (parts := split_images(self.original, self.batches)) is not None:
            # whether it helps is judged by images that nothing was fitted to; then all are
            seen, judges = parts
            narrowed, _ = fit_layers(seen)
            errors_by_judges = [
                calibration_error(model, self.original, judges) for model in (narrowed, match(narrowed, images=seen))
            ]
            if errors_by_judges[1] < errors_by_judges[0]:
                narrowed, errors = fit_layers(self.batches)
                note = f"All weights were fitted together to the original's outputs, {passes} passes over mixed images."
                return match(narrowed, images=[*seen, *judges]), errors, note
        return *fit_layers(self.batches), ""

    def result(self, narrowed: nn.Module, planned: PlannerResult, *measured: Any) -> NarrowResult:
        """Return the result with its report; of several processes the first one's, which alone measures times."""
        with use_threads(self.options.threads):
            text = distributed.broadcast_result(lambda: json.dumps(self.report(narrowed, planned, *measured).to_dict()))
        return NarrowResult(narrowed, planned.plan, NarrowReport.from_dict(json.loads(text)))

    def missed_notes(self, plan: Plan, latency: dict[int, tuple[Timing, Timing]]) -> list[str]:
        """Return a sentence for the report where the finished network misses the latency that its plan kept."""
        if plan.budget != "latency" or self.table.batch not in latency:
            return []
        before, after = latency[self.table.batch]
        reached = after.median_ms / before.median_ms
        if reached <= LATENCY_TOLERANCE * plan.share:
            return []
        least, most = after.low_ms / before.high_ms, after.high_ms / before.low_ms
        if least <= plan.share:
            reason = "the times spread too far to tell whether it is kept; time it again on a quiet machine"
        else:
            reason = "the plan kept it when it was timed; with other load, or other numbers of images, it differs"
        return [
            f"{reached:.2f} of the latency is left ({least:.2f} to {most:.2f}) at batch {self.table.batch}, where "
            f"{plan.share:.2f} was asked for: {reason}."
        ]

    def slower_notes(self, latency: dict[int, tuple[Timing, Timing]]) -> list[str]:
        """Return a sentence for the report where the whole network takes longer than before, beyond the spread."""
        slower = [
            f"{before.median_ms:.3f} → {after.median_ms:.3f} ms with {size} at a time"
            for size, (before, after) in latency.items()
            if after.low_ms > before.high_ms
        ]
        advice = "a budget of multiply-accumulates or parameters promises no time, one of latency does"
        return [f"Slower than before, {', '.join(slower)}: {advice}."] if slower else []

    def report(
        self,
        narrowed: nn.Module,
        planned: PlannerResult,
        errors: dict[str, float] | None = None,
        accuracy: dict[str, float] | None = None,
        error: tuple[float | None, str] = (None, ""),
    ) -> NarrowReport:
        """Return the report; without errors, accuracy and error in a dry run."""
        layers = layer_reports(self.analysis, planned, errors or {})
        self.model_timer.progress = (" for the report", 0, 0)
        latency = {size: self.model_timer.compare(narrowed, size) for size in self.reported_batches}
        notes = planned.notes
        if planned.reached:  # else they say so
            notes = (*notes, *self.missed_notes(planned.plan, latency))
        return NarrowReport(
            layers,
            macs=(sum(r.macs_before for r in layers), sum(r.macs_after for r in layers)),
            parameters=(count_parameters(self.original), count_parameters(narrowed)),
            file_bytes=(file_bytes(self.original), file_bytes(narrowed)),
            latency=latency,
            accuracy=accuracy or {},
            predicted_loss=planned.loss,
            calibration_error=error[0],
            notes=(*self.analysis.notes, *notes, *self.slower_notes(latency)),
            environment={
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "measured on": self.table.setting,
            },
            error_measured_on=error[1],
            engine=ENGINES[NARROWING_ENGINES[self.options.engine]].title,
        )
