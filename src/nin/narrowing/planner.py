"""From a budget to a plan: choices over what layers cost, checked against what was measured."""

from __future__ import annotations

import dataclasses
import json

from torch import Tensor, nn

from nin.errors import UserError
from nin.models.plan import LayerPlan, Plan, Thinning
from nin.models.surgery import apply_plan, chain_of
from nin.narrowing import latency as pricing
from nin.narrowing.analysis import Study
from nin.narrowing.candidates import Candidates
from nin.narrowing.dependency_graph import Edge
from nin.narrowing.knapsack import Choice, Knapsack
from nin.narrowing.latency import LatencyTable, Price, Stopwatch
from nin.narrowing.options import NarrowOptions

# The whole model is measured after each plan for a latency; so many plans are made at most.
LATENCY_PLANS = 5

# A plan is good enough if the time of its whole model, as a share of what was asked for, lies between these.
LATENCY_SPENT, LATENCY_TOLERANCE = 0.96, 1.02


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided for a budget.

    Attributes:
        plan: what to do.
        loss: sum over the layers of the share of variance that each is expected to lose.
        predicted: the same for each layer.
        latency: milliseconds before and after of each layer that changes; empty where they are not measured.
        notes: sentences for the report.
    """

    plan: Plan
    loss: float
    predicted: dict[str, float]
    latency: dict[str, tuple[float, float]]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Return it as text, for another process."""
        return json.dumps({**dataclasses.asdict(self), "plan": self.plan.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Decision:
        """Return what `to_json` wrote."""
        values = json.loads(text)
        latency = {name: (before, after) for name, (before, after) in values["latency"].items()}
        plan, notes = Plan.from_dict(values["plan"]), tuple(values["notes"])
        return cls(**{**values, "plan": plan, "latency": latency, "notes": notes})


class Planner:
    """Makes plans for one model; what it measures serves all of them.

    Args:
        original: the model, expanded, in evaluation mode.
        known: what was found of it.
        kind: "macs", "latency" or "parameters".
        table: milliseconds of layers.
        stopwatch: milliseconds of whole models.
        options: how to work.
    """

    def __init__(
        self,
        original: nn.Module,
        known: Study,
        kind: str,
        table: LatencyTable,
        stopwatch: Stopwatch,
        options: NarrowOptions,
    ) -> None:
        self.original, self.known, self.kind, self.options = original, known, kind, options
        self.table, self.stopwatch = table, stopwatch
        self.candidates = known.candidates
        if not options.factorise:
            kept = {name: forms[:1] for name, forms in known.candidates.forms.items()}
            self.candidates = dataclasses.replace(known.candidates, forms=kept)
        self.edges = known.edges if options.thin else ()

    def decide(self, share: float) -> Decision:
        """Return the plan for a share of the original's.

        Raises:
            UserError: it cannot be reached; the message says what can.
        """
        if self.kind == "latency":
            knapsack, choice, notes = self._for_latency(share)
        else:
            knapsack, choice, notes = self._for_count(share)
        plan = self._plan(knapsack, choice, share)
        times = self._times(plan) if self.options.measure_latency else {}
        return Decision(plan, choice.loss, self._predicted(plan, choice), times, notes)

    def _knapsack(self, candidates: Candidates, edges: tuple[Edge, ...]) -> Knapsack:
        prices: dict[str, Price] = {"macs": pricing.macs, "parameters": pricing.parameters, "latency": self.table}
        price, fixed = prices[self.kind], 0.0
        if self.kind == "parameters":  # those of BatchNorm and others stay
            fixed = count_parameters(self.original) - sum(s.parameters for s in self.known.shapes.values())
        return Knapsack(self.known.shapes, candidates, edges, price, fixed)

    def _for_count(self, share: float) -> tuple[Knapsack, Choice, tuple[str, ...]]:
        """Choose for a number of MACs or parameters."""
        knapsack = self._knapsack(self.candidates, self.edges)
        budget = share * knapsack.everything().cost
        choice = knapsack.choose(budget)
        if self.options.revert_slower:
            return self._revert_slower(knapsack, choice, share, budget)
        return knapsack, choice, ()

    def _revert_slower(
        self, knapsack: Knapsack, choice: Choice, share: float, budget: float
    ) -> tuple[Knapsack, Choice, tuple[str, ...]]:
        """Return a choice in which no layer was measured slower than before, else the fastest one met."""
        candidates, found = self.candidates, set[str]()
        fastest: tuple[float, Knapsack, Choice, list[str]] | None = None
        while True:
            times = self._times(self._plan(knapsack, choice, share))
            slower = [name for name, (before, after) in times.items() if after > before]
            if not slower:
                break
            found.update(slower)
            added = sum(after - before for before, after in times.values())
            if fastest is None or added < fastest[0]:
                fastest = added, knapsack, choice, slower
            candidates = _with_less(candidates, knapsack, choice, slower)
            knapsack = self._knapsack(candidates, self.edges)
            try:
                choice = knapsack.choose(budget)
            except UserError:
                _, knapsack, choice, slower = fastest
                return knapsack, choice, (f"Slower than before, but the budget needs them: {', '.join(slower)}.",)
        if not found:
            return knapsack, choice, ()
        names = ", ".join(name for name in self.known.shapes if name in found)
        note = f"Left as they were, or given fewer channels, as more were measured slower: {names}."
        return knapsack, choice, (note,)

    def _for_latency(self, share: float) -> tuple[Knapsack, Choice, tuple[str, ...]]:
        """Choose over the measured table, measure the whole model, and choose again until the time is kept and used."""
        knapsack = self._knapsack(self.candidates, self.edges)
        whole, lowest = knapsack.everything().cost, knapsack.cheapest().cost
        budget, kept, missed = share * whole, 0.0, whole  # budgets of the table; those that kept the time, and not
        best: tuple[float, Choice] | None = None
        for _ in range(LATENCY_PLANS):
            choice = knapsack.choose(budget)
            planned = apply_plan(self.original, self._plan(knapsack, choice, share))
            before, after = self.stopwatch.compare(planned, self.table.batch)
            reached = after.low_ms / before.low_ms  # what else the machine does makes times longer only
            if _better(reached, choice, best, share * LATENCY_TOLERANCE):
                best = reached, choice
            if reached > share * LATENCY_TOLERANCE:
                missed = min(missed, budget)
            elif reached < share * LATENCY_SPENT:
                kept = max(kept, budget)
            else:
                break
            # a part of the time does not shrink with the layers, so aim a little lower than in proportion
            following = budget * share / reached * 0.98
            if kept and not kept < following < missed:
                following = (kept + missed) / 2
            following = max(following, lowest)
            if following == budget or kept >= missed:  # nothing more can be left out, or put back
                break
            budget = following
        assert best is not None
        notes: tuple[str, ...] = ()
        if best[0] > share * LATENCY_TOLERANCE:
            notes = (f"The latency asked for, {share:.2f} of the original's, was not reached: {best[0]:.2f}.",)
        return knapsack, best[1], notes

    def _plan(self, knapsack: Knapsack, choice: Choice, share: float) -> Plan:
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
        return Plan(tuple(layers), tuple(thinned), self.kind, share, self.options.layout)

    def _predicted(self, plan: Plan, choice: Choice) -> dict[str, float]:
        """Return the share of its variance that each layer is expected to lose."""
        lost = {name: form.loss for name, form in choice.forms.items()}
        for t in plan.thinned:
            lost[t.consumer] += self.known.candidates.widths[t.producer, t.consumer][t.channels]
        return lost

    def _times(self, plan: Plan) -> dict[str, tuple[float, float]]:
        """Return the milliseconds before and after of each layer that changes."""
        found = {}
        for layer in plan.layers:
            shape = self.known.shapes[layer.name]
            chain = chain_of(shape, layer)
            if chain != (shape,):
                found[layer.name] = self.table((shape,)), self.table(chain)
        return found


def _better(reached: float, choice: Choice, best: tuple[float, Choice] | None, most: float) -> bool:
    """Return whether a choice is better than the best one met: one that keeps the time, then one that loses less."""
    if best is None:
        return True
    if reached <= most and best[0] <= most:
        return choice.loss < best[1].loss
    return reached < best[0]


def _with_less(candidates: Candidates, knapsack: Knapsack, choice: Choice, layers: list[str]) -> Candidates:
    """Return the choices without those that leave these layers as much to compute as a choice does, or more."""
    forms, widths = dict(candidates.forms), dict(candidates.widths)
    for name in layers:
        if choice.forms[name].form != "keep":  # the forms stand by what they cost, the dearest first behind "keep"
            forms[name] = (forms[name][0], *forms[name][forms[name].index(choice.forms[name]) + 1 :])
            continue
        for ends in (knapsack.edge_before, knapsack.edge_after):
            if name in ends and ends[name] in choice.widths:
                edge, left = knapsack.edges[ends[name]], choice.widths[ends[name]]
                key = edge.producer, edge.consumer
                widths[key] = {n: lost for n, lost in widths[key].items() if n < left}
    return Candidates(forms, widths)


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights and biases."""
    return sum(p.numel() for p in model.parameters())


def first_parameter(model: nn.Module) -> Tensor:
    """Return a parameter that tells the model's device and number type."""
    return next(p for p in model.parameters() if p.is_floating_point())
