"""`narrow`: from a model and images to a narrower model, its plan and its report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.errors import UserError
from nin.models.layer_shape import expand
from nin.models.plan import Plan
from nin.models.surgery import apply_plan, to_layout
from nin.narrowing.analysis import Study, study
from nin.narrowing.latency import LatencyTable, Stopwatch
from nin.narrowing.options import NarrowOptions, check_share
from nin.narrowing.planner import Decision, Planner, count_parameters, first_parameter
from nin.narrowing.recalibration import calibration_error, correct
from nin.narrowing.reconstruction import Material, refine
from nin.narrowing.report import CurvePoint, NarrowReport, file_bytes, layer_reports
from nin.runtime import distributed


@dataclasses.dataclass(frozen=True)
class NarrowResult:
    """What narrowing gives.

    Attributes:
        model: the new network, of plain PyTorch layers, in the mode (training or evaluation) of the given one.
        plan: what was done; `nin.apply_plan` builds the architecture from it.
        report: what it cost.
    """

    model: nn.Module
    plan: Plan
    report: NarrowReport


def narrow(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    macs: float | None = None,
    latency: float | None = None,
    parameters: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    skip: Iterable[str] = (),
    options: NarrowOptions | None = None,
) -> NarrowResult:
    """Make a trained network narrower by 1×1 bottlenecks and left-out channels.

    Each layer ``y = W x + b`` becomes the layer, or chain of layers, of few channels that minimises
    ``tr(G · Cov(y - ŷ))`` over the images; which layer gets how many is decided by what the whole network loses for
    what it saves. No labels are needed. The given model is left as it is.

    Args:
        model: any network with ``nn.Conv2d`` or ``nn.Linear`` layers inside.
        batches: a few hundred typical images in batches, preprocessed as the model takes them: tensors, tuples or
            lists that begin with one (labels behind it are not used), or dicts of keyword arguments.
        macs: multiply-accumulates to be left, as a share of the original's, above 0 and below 1.
        latency: time to be left, measured on the model's device; give one of the three.
        parameters: parameters to be left.
        evaluate: gives an accuracy for a model; for the report only.
        skip: names of layers to leave alone, or patterns such as "layer1.*".
        options: see `NarrowOptions`.

    In a job of several processes (``torch.distributed`` in use) each of them calls this with every n-th batch: the
    statistics are added up, the first process decides and measures times, and all get the same network and report.
    The accuracy in it is the first one's; where images are shared out, ``evaluate`` adds up over the processes.

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
    images = list(batches)
    if (
        distributed.all_reduce_sum(torch.tensor(float(not images))) > 0
    ):  # all of them end, or the others would wait for one
        raise UserError("batches must hold at least one batch of images (in each process), got none")
    original = to_layout(expand(model).eval(), options.layout)
    known = study(original, images, skip=tuple(skip), cache=options.cache, on_progress=options.on_progress)
    job = _Job(original, images, known, kind, evaluate, options)
    try:
        points = [job.narrow(other).point() for other in options.budgets if other != share]
        outcome = job.narrow(share)
        curve = sorted([*points, outcome.point()], key=lambda p: -p.share) if points else []
        report = dataclasses.replace(outcome.report, curve=tuple(curve))
    finally:
        if distributed.rank() == 0:
            job.table.save()
    return NarrowResult(outcome.model.train(model.training), report=report, plan=outcome.plan)


def _budget(**shares: float | None) -> tuple[str, float]:
    """Return which budget was given, and its share."""
    given = {name: value for name, value in shares.items() if value is not None}
    if len(given) != 1:
        got = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise ValueError(f"give exactly one of macs, latency and parameters, got {got}")
    name, share = next(iter(given.items()))
    return name, check_share(name, share)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """A network narrowed to one budget."""

    model: nn.Module
    plan: Plan
    report: NarrowReport

    def point(self) -> CurvePoint:
        """Return what the curve shows of it."""
        r = self.report
        return CurvePoint(self.plan.share, r.macs[1], r.parameters[1], r.latency, r.accuracy, r.calibration_error)


class _Job:
    """The narrowings of one network: what all of their steps look at."""

    def __init__(
        self,
        original: nn.Module,
        images: list[Any],
        known: Study,
        kind: str,
        evaluate: Callable[[nn.Module], float] | None,
        options: NarrowOptions,
    ) -> None:
        self.original, self.images, self.known = original, images, known
        self.evaluate, self.options = evaluate, options
        leaf = next(t for t in pytree.tree_leaves(images[0]) if isinstance(t, Tensor))
        cache = None if options.cache is None else options.cache.with_suffix(".latency.json")
        batch = options.batch or len(leaf)
        self.reported_batches = sorted({1, len(leaf), batch})
        tell = options.on_progress
        self.table = LatencyTable(
            first_parameter(original),
            batch,
            options.layout,
            cache=cache,
            on_progress=None if tell is None else lambda done: tell("Timing layers", done, 0),
        )
        self.stopwatch = Stopwatch(original, images, options.layout)
        self.planner = Planner(original, known, kind, self.table, self.stopwatch, options)
        self.accuracy: dict[str, float] = {}  # of the original, once it is known

    def narrow(self, share: float) -> _Outcome:
        """Return the network narrowed to a share."""
        decision = Decision.from_json(distributed.broadcast_result(lambda: self.planner.decide(share).to_json()))
        if self.options.dry_run:
            narrowed = to_layout(apply_plan(self.original, decision.plan), self.options.layout)
            return _Outcome(narrowed, decision.plan, self.report(narrowed, decision))
        narrowed, errors = self.refine(decision.plan)
        distributed.broadcast_model(narrowed)
        if self.evaluate is not None and not self.accuracy:
            self.accuracy = {"original": self.evaluate(self.original)}
        accuracy = {**self.accuracy, "raw": self.evaluate(narrowed)} if self.evaluate is not None else {}
        changed = False
        if self.options.renormalise:
            narrowed, correction, changed = correct(narrowed, self.original, self.images)
        else:
            correction = calibration_error(narrowed, self.original, self.images)
        if self.evaluate is not None:
            accuracy["corrected"] = self.evaluate(narrowed) if changed else accuracy["raw"]
        if changed:
            notes = (*decision.notes, "BatchNorm statistics were measured again.")
            decision = dataclasses.replace(decision, notes=notes)
        narrowed = to_layout(narrowed, self.options.layout)
        return _Outcome(narrowed, decision.plan, self.report(narrowed, decision, errors, accuracy, correction))

    def refine(self, plan: Plan) -> tuple[nn.Module, dict[str, float]]:
        """Return the fitted network and the error of each layer."""
        known, tell = self.known, self.options.on_progress
        material = Material(self.original, plan, known.shapes, known.sensitivities, known.shortcuts, self.images)
        return refine(
            material,
            passes=self.options.passes,
            on_progress=None if tell is None else lambda done, total: tell("Fitting the layers", done, total),
        )

    def report(self, *facts: Any) -> NarrowReport:
        """Return what was done and what it cost; of several processes the first one's, which alone measures times."""
        text = distributed.broadcast_result(lambda: json.dumps(self.collect_report(*facts).to_dict()))
        return NarrowReport.from_dict(json.loads(text))

    def collect_report(
        self,
        narrowed: nn.Module,
        decision: Decision,
        errors: Mapping[str, float] = MappingProxyType({}),
        accuracy: Mapping[str, float] = MappingProxyType({}),
        error: float | None = None,
    ) -> NarrowReport:
        """Return what was done and what it cost."""
        known = self.known
        rows = layer_reports(
            known.shapes, decision.plan, known.reasons, decision.predicted, dict(errors), decision.latency
        )
        sizes = self.reported_batches if self.options.measure_latency else []
        return NarrowReport(
            rows,
            (sum(r.macs_before for r in rows), sum(r.macs_after for r in rows)),
            (count_parameters(self.original), count_parameters(narrowed)),
            (file_bytes(self.original), file_bytes(narrowed)),
            {size: self.stopwatch.compare(narrowed, size) for size in sizes},
            dict(accuracy),
            decision.loss,
            error,
            (*known.notes, *decision.notes),
            {"torch": torch.__version__, "threads": torch.get_num_threads(), "measured on": self.table.setting},
        )
