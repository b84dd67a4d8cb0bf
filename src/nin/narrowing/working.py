"""`narrow`: from a model and images to a narrower model, its plan and its report."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin import timing
from nin.errors import UserError
from nin.narrowing import pricing
from nin.narrowing.candidates import Candidates
from nin.narrowing.choosing import Choice, Knapsack
from nin.narrowing.plan import LayerPlan, Plan, Thinning
from nin.narrowing.rebuilding import apply_plan, to_layout
from nin.narrowing.recovering import calibration_error, correct
from nin.narrowing.refining import Material, refine
from nin.narrowing.reporting import NarrowReport, file_bytes, layer_reports
from nin.narrowing.structure import expand, factors, inputs_of
from nin.narrowing.studying import Study, study

# The whole model is measured after each plan for a latency; so many plans are made at most.
LATENCY_PLANS = 4

# A plan whose whole model is this near to the latency asked for is good enough.
LATENCY_TOLERANCE = 1.02


@dataclasses.dataclass(frozen=True)
class NarrowOptions:
    """How `nin.narrow` works, beside what is asked for.

    Attributes:
        thin: leave out channels between layers, where the traced graph shows that one layer alone looks at them.
        factorise: replace layers by two or three with fewer channels between them.
        passes: times that the images are run through both networks while fitting, at most.
        renormalise: measure BatchNorm statistics again, and keep them where the result comes nearer to the original's.
        revert_slower: keep layers that were measured slower than before, where the budget allows it.
        measure_latency: time the whole model before and after.
        batch: images at a time when measuring; that of the first batch if not given.
        layout: of the weights: "contiguous", or "channels_last", which is often faster.
        cache: a file that keeps what was found of the network, so that another budget takes less time.
        dry_run: make the plan only; the result's ``model`` has fresh weights where the plan changes it.
        on_progress: called with what is being done, the number done, and the number of all.
    """

    thin: bool = True
    factorise: bool = True
    passes: int = 32
    renormalise: bool = True
    revert_slower: bool = True
    measure_latency: bool = True
    batch: int | None = None
    layout: str = "contiguous"
    cache: Path | None = None
    dry_run: bool = False
    on_progress: Callable[[str, int, int], None] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.layout not in ("contiguous", "channels_last"):
            raise ValueError(f"layout must be 'contiguous' or 'channels_last', got {self.layout!r}")
        for name in ("passes", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


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
    if not images:
        raise UserError("batches must hold at least one batch of images, got none")
    original = to_layout(expand(model).eval(), options.layout)
    known = study(original, images, skip=tuple(skip), cache=options.cache, on_progress=options.on_progress)
    job = _Job(original, images, known, kind, share, options)
    plan, choice, notes = job.make_plan()
    errors: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    if options.dry_run:
        narrowed, correction = apply_plan(original, plan), None
    else:
        narrowed, errors = job.refine(plan)
        if evaluate is not None:
            accuracy = {"original": evaluate(original), "raw": evaluate(narrowed)}
        if options.renormalise:
            narrowed, correction, changed = correct(narrowed, original, images)
            notes += ("BatchNorm statistics were measured again.",) if changed else ()
        else:
            correction = calibration_error(narrowed, original, images)
        if evaluate is not None:
            accuracy["corrected"] = evaluate(narrowed)
    narrowed = to_layout(narrowed, options.layout)
    report = job.report(narrowed, plan, choice, errors, accuracy, correction, notes)
    return NarrowResult(narrowed.train(model.training), plan, report)


def _budget(**shares: float | None) -> tuple[str, float]:
    """Return which budget was given, and its share."""
    given = {name: value for name, value in shares.items() if value is not None}
    if len(given) != 1:
        got = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise ValueError(f"give exactly one of macs, latency and parameters, got {got}")
    name, share = next(iter(given.items()))
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"{name} must be a share of the original's, above 0 and below 1, got {share!r}")
    return name, float(share)


class _Job:
    """One narrowing: what all of its steps look at."""

    def __init__(
        self, original: nn.Module, images: list[Any], known: Study, kind: str, share: float, options: NarrowOptions
    ) -> None:
        self.original, self.images, self.known = original, images, known
        self.kind, self.share, self.options = kind, share, options
        self.like = next(p for p in original.parameters() if p.is_floating_point())
        leaf = next(t for t in pytree.tree_leaves(images[0]) if isinstance(t, Tensor))
        self.batch = options.batch or len(leaf)
        self.table = pricing.LatencyTable(self.like, self.batch, options.layout)

    def make_plan(self) -> tuple[Plan, Choice, tuple[str, ...]]:
        """Return the plan for the budget, the choice behind it, and notes."""
        candidates = self.known.candidates
        if not self.options.factorise:
            kept = {name: forms[:1] for name, forms in candidates.forms.items()}
            candidates = dataclasses.replace(candidates, forms=kept)
        edges = self.known.edges if self.options.thin else ()
        if self.kind == "latency":
            return self._plan_for_latency(candidates, edges)
        price = pricing.macs if self.kind == "macs" else pricing.parameters
        knapsack = Knapsack(self.known.shapes, candidates, edges, price)
        whole = knapsack.everything().cost
        budget = self.share * whole
        if self.kind == "parameters":  # those of BatchNorm and others stay
            budget -= (1 - self.share) * (_parameters(self.original) - whole)
        choice = knapsack.choose(budget)
        notes = self.known.notes
        if self.options.revert_slower and self.options.factorise:
            choice, more = self._revert_slower(knapsack, candidates, choice, budget)
            notes += more
        return self.plan(knapsack, choice), choice, notes

    def _revert_slower(
        self, knapsack: Knapsack, candidates: Candidates, choice: Choice, budget: float
    ) -> tuple[Choice, tuple[str, ...]]:
        """Return a choice without factorised layers that were measured slower, where there is one."""
        notes: tuple[str, ...] = ()
        for _ in range(3):
            slower = [name for name, ms in self.latency(knapsack, choice).items() if ms[1] > ms[0]]
            slower = [name for name in slower if choice.forms[name].form != "keep"]
            if not slower:
                break
            forms = {name: v[:1] if name in slower else v for name, v in candidates.forms.items()}
            candidates = dataclasses.replace(candidates, forms=forms)
            again = Knapsack(self.known.shapes, candidates, tuple(knapsack.edges), knapsack.price)
            try:
                choice = again.choose(budget)
            except UserError:
                return choice, (*notes, f"Slower than before, but the budget needs them: {', '.join(slower)}.")
            notes += (f"Not factorised, as that was measured slower: {', '.join(slower)}.",)
        return choice, notes

    def _plan_for_latency(self, candidates: Candidates, edges: Any) -> tuple[Plan, Choice, tuple[str, ...]]:
        """Plan over the measured table, measure the whole model, and plan again until it is fast enough."""
        knapsack = Knapsack(self.known.shapes, candidates, edges, self.table)
        budget = self.share * knapsack.everything().cost
        best: tuple[float, Plan, Choice] | None = None
        for _ in range(LATENCY_PLANS):
            choice = knapsack.choose(budget)
            plan = self.plan(knapsack, choice)
            before, after = self.time(apply_plan(self.original, plan), self.batch)
            reached = after.median_ms / before.median_ms
            if best is None or (reached < best[0] if best[0] > self.share * LATENCY_TOLERANCE else False):
                best = reached, plan, choice
            if reached <= self.share * LATENCY_TOLERANCE:
                break
            budget *= self.share / reached * 0.98
        assert best is not None
        notes = self.known.notes
        if best[0] > self.share * LATENCY_TOLERANCE:
            notes += (f"The latency asked for, {self.share:.2f} of the original's, was not reached: {best[0]:.2f}.",)
        return best[1], best[2], notes

    def plan(self, knapsack: Knapsack, choice: Choice) -> Plan:
        """Return a choice as a plan."""
        layers = []
        for name, form in choice.forms.items():
            inputs = knapsack.width(name, choice.widths, before=True)
            outputs = knapsack.width(name, choice.widths, before=False)
            dtype = str(self.original.get_submodule(name).get_parameter("weight").dtype).removeprefix("torch.")
            ranks = form.form, form.rank_in, form.rank_out
            layers.append(LayerPlan(name, *ranks, inputs, outputs, dtype, self.known.reasons.get(name, "")))
        thinned = []
        for number, edge in enumerate(knapsack.edges):
            full = self.known.shapes[edge.consumer].in_channels
            left = choice.widths.get(number, full)
            if left < full:
                thinned.append(Thinning(edge.producer, edge.consumer, edge.between, left, full))
        return Plan(tuple(layers), tuple(thinned), self.kind, self.share, self.options.layout)

    def refine(self, plan: Plan) -> tuple[nn.Module, dict[str, float]]:
        """Return the fitted network and the error of each layer."""
        known, tell = self.known, self.options.on_progress
        material = Material(self.original, plan, known.shapes, known.sensitivities, known.shortcuts, self.images)
        return refine(
            material,
            passes=self.options.passes,
            on_progress=None if tell is None else lambda done, total: tell("Fitting the layers", done, total),
        )

    def latency(self, knapsack: Knapsack, choice: Choice) -> dict[str, tuple[float, float]]:
        """Return the milliseconds before and after of each layer that is factorised."""
        found = {}
        for name, form in choice.forms.items():
            if form.form == "keep":
                continue
            inputs = knapsack.width(name, choice.widths, before=True)
            outputs = knapsack.width(name, choice.widths, before=False)
            shape = self.known.shapes[name]
            chain = factors(shape, form.form, form.rank_in, form.rank_out, inputs=inputs, outputs=outputs)
            found[name] = self.table((shape,)), self.table(chain)
        return found

    def time(self, narrowed: nn.Module, batch: int) -> tuple[timing.Timing, timing.Timing]:
        """Time the original and the narrowed model side by side."""
        args, kwargs = pytree.tree_map(lambda t: _resized(t, batch), next(inputs_of(self.images)))
        if self.options.layout == "channels_last":
            args, kwargs = pytree.tree_map(_channels_last, (args, kwargs))

        def call(model: nn.Module) -> Callable[[], None]:
            def run() -> None:
                model(*args, **kwargs)
                pricing.wait_for(self.like.device)

            return run

        narrowed = to_layout(copy.deepcopy(narrowed), self.options.layout).eval()
        with torch.inference_mode():
            times = timing.compare({"before": call(self.original), "after": call(narrowed)}, runs=9, warmup=2)
        return times["before"], times["after"]

    def report(
        self,
        narrowed: nn.Module,
        plan: Plan,
        choice: Choice,
        errors: dict[str, float],
        accuracy: dict[str, float],
        error: float | None,
        notes: tuple[str, ...],
    ) -> NarrowReport:
        """Return what was done and what it cost."""
        planned = {layer.name: layer for layer in plan.layers}
        latency, predicted = {}, {}
        for name, form in choice.forms.items():
            p, shape = planned[name], self.known.shapes[name]
            chain = factors(shape, p.form, p.rank_in, p.rank_out, inputs=p.inputs, outputs=p.outputs)
            predicted[name] = form.loss + sum(
                self.known.candidates.widths[t.producer, t.consumer][t.channels]
                for t in plan.thinned
                if t.consumer == name
            )
            if self.options.measure_latency and chain != (shape,):
                latency[name] = self.table((shape,)), self.table(chain)
        rows = layer_reports(self.known.shapes, plan, self.known.reasons, predicted, errors, latency)
        sizes = sorted({1, self.batch}) if self.options.measure_latency else []
        return NarrowReport(
            rows,
            (sum(r.macs_before for r in rows), sum(r.macs_after for r in rows)),
            (_parameters(self.original), _parameters(narrowed)),
            (file_bytes(self.original), file_bytes(narrowed)),
            {size: self.time(narrowed, size) for size in sizes},
            accuracy,
            choice.loss,
            error,
            notes,
        )


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _resized(value: Any, batch: int) -> Any:
    """Return a tensor with that many rows, its own repeated as needed."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[torch.arange(batch) % len(value)]


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value
