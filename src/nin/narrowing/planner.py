"""From a budget to a plan: the knapsack's solution, checked against measured latencies."""

import dataclasses
import json

from torch import nn

from nin.errors import UserError
from nin.models.narrowing_plan import ChannelPruning, LayerPlan, Plan
from nin.models.surgery import apply_plan, planned_layers
from nin.narrowing.analysis import Analysis
from nin.narrowing.knapsack import CostFunction, Knapsack, Solution, macs, parameters
from nin.narrowing.latency import LatencyTable, ModelTimer
from nin.narrowing.options import NarrowOptions
from nin.narrowing.search_space import SearchSpace

# With a latency budget the whole model is timed after each plan; so many plans are made at most.
LATENCY_PLANS = 5

# A plan is good enough if the latency of its whole model, as a fraction of the budget, lies between these.
LATENCY_SPENT, LATENCY_TOLERANCE = 0.96, 1.02


@dataclasses.dataclass(frozen=True)
class PlannerResult:
    """A plan for a budget and what is expected of it.

    Attributes:
        plan: what to do.
        loss: sum over the layers of the fraction of variance that each is expected to lose.
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
    def from_json(cls, text: str) -> "PlannerResult":
        """Return what `to_json` wrote."""
        values = json.loads(text)
        latency = {name: (before, after) for name, (before, after) in values["latency"].items()}
        plan, notes = Plan.from_dict(values["plan"]), tuple(values["notes"])
        return cls(**{**values, "plan": plan, "latency": latency, "notes": notes})


class Planner:
    """Makes plans for one model; the latencies that it measures serve all of them.

    Args:
        original: the model, of plain layers, in evaluation mode.
        analysis: of the model.
        kind: of the budget: "macs", "latency" or "parameters".
        table: milliseconds of layers.
        model_timer: milliseconds of whole models.
        options: see `NarrowOptions`.
    """

    def __init__(
        self,
        original: nn.Module,
        analysis: Analysis,
        kind: str,
        table: LatencyTable,
        model_timer: ModelTimer,
        options: NarrowOptions,
    ) -> None:
        self.original, self.analysis, self.kind, self.options = original, analysis, kind, options
        self.table, self.model_timer = table, model_timer
        self.space = analysis.search_space
        if not options.factorise:
            kept = {name: choices[:1] for name, choices in self.space.factorisations.items()}
            self.space = dataclasses.replace(self.space, factorisations=kept)

    def plan(self, share: float) -> PlannerResult:
        """Return the plan for a share of the original's cost.

        Raises:
            UserError: it cannot be reached; the message says what can.
        """
        knapsack = self._knapsack(self.space)
        budget = share * knapsack.unchanged().cost
        notes: tuple[str, ...] = ()
        if self.kind == "latency":
            solution, notes = self._fit_latency(knapsack, share, budget)
        else:
            solution = knapsack.solve(budget)
            if self.options.revert_slower:
                solution, notes = self._revert_slower(knapsack, solution, share, budget)
        plan = self._to_plan(knapsack, solution, share)
        latency = self._layer_latencies(plan) if self.options.measure_latency else {}
        predicted = {name: choice.loss for name, choice in solution.factorisations.items()}
        for p in plan.pruned:
            predicted[p.consumer] += self.space.widths[p.producer, p.consumer][p.channels]
        return PlannerResult(plan, solution.loss, predicted, latency, notes)

    def _knapsack(self, space: SearchSpace) -> Knapsack:
        costs: dict[str, CostFunction] = {"macs": macs, "parameters": parameters, "latency": self.table}
        fixed = 0.0
        if self.kind == "parameters":  # those of BatchNorm and others stay
            fixed = count_parameters(self.original) - sum(s.parameters for s in self.analysis.specs.values())
        edges = self.analysis.graph.edges if self.options.thin else ()
        return Knapsack(self.analysis.specs, space, edges, costs[self.kind], fixed)

    def _revert_slower(
        self, knapsack: Knapsack, solution: Solution, share: float, budget: float
    ) -> tuple[Solution, tuple[str, ...]]:
        """Return a solution in which no layer is slower than before, else the fastest one met."""
        space = self.space
        tried: list[tuple[float, Solution, list[str]]] = []  # with the milliseconds added, and by which layers
        while True:
            latencies = self._layer_latencies(self._to_plan(knapsack, solution, share))
            slower = [name for name, (before, after) in latencies.items() if after > before]
            if not slower:
                break
            added = sum(after - before for before, after in latencies.values())
            tried.append((added, solution, slower))
            space = _without_slower(space, knapsack, solution, slower)
            try:
                # its edges are among those of the given knapsack, in whose terms the plan is made
                solution = self._knapsack(space).solve(budget)
            except UserError:
                _, solution, slower = min(tried, key=lambda attempt: attempt[0])
                return solution, (f"Slower than before, but the budget needs them: {', '.join(slower)}.",)
        if not tried:
            return solution, ()
        found = {name for *_, slower in tried for name in slower}
        names = ", ".join(name for name in self.analysis.specs if name in found)
        note = f"Left as they were, or given fewer channels, as more were measured slower: {names}."
        return solution, (note,)

    def _fit_latency(self, knapsack: Knapsack, share: float, budget: float) -> tuple[Solution, tuple[str, ...]]:
        """Solve with the latencies of layers, time the whole model, and adapt the budget until that meets the share."""
        lowest = knapsack.cheapest().cost
        # between budgets of the table whose whole model keeps to the share, and whose does not
        kept, missed = 0.0, knapsack.unchanged().cost
        most = share * LATENCY_TOLERANCE
        tried: list[tuple[float, Solution]] = []  # with the share that each leaves
        for _ in range(LATENCY_PLANS):
            solution = knapsack.solve(budget)
            planned = apply_plan(self.original, self._to_plan(knapsack, solution, share))
            before, after = self.model_timer.compare(planned, self.table.batch)
            reached = after.low_ms / before.low_ms  # other load on the machine only makes times longer
            tried.append((reached, solution))
            if reached > most:
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
        if within := [solution for reached, solution in tried if reached <= most]:
            return min(within, key=lambda solution: solution.loss), ()
        reached, solution = min(tried, key=lambda attempt: attempt[0])
        return solution, (f"The latency asked for, {share:.2f} of the original's, was not reached: {reached:.2f}.",)

    def _to_plan(self, knapsack: Knapsack, solution: Solution, share: float) -> Plan:
        layers = []
        for name, choice in solution.factorisations.items():
            inputs = knapsack.width(name, solution.widths, before=True)
            outputs = knapsack.width(name, solution.widths, before=False)
            dtype = str(self.original.get_submodule(name).get_parameter("weight").dtype).removeprefix("torch.")
            reason = self.analysis.reasons.get(name, "")
            layers.append(LayerPlan(name, choice.form, choice.rank_in, choice.rank_out, inputs, outputs, dtype, reason))
        pruned = []
        for edge in knapsack.edges.values():
            full = self.analysis.specs[edge.consumer].in_channels
            left = knapsack.width(edge.consumer, solution.widths, before=True)
            if left < full:
                pruned.append(ChannelPruning(edge.producer, edge.consumer, edge.between, left, full))
        return Plan(tuple(layers), tuple(pruned), self.kind, share, self.options.layout)

    def _layer_latencies(self, plan: Plan) -> dict[str, tuple[float, float]]:
        """Return the milliseconds before and after of each layer that changes."""
        latencies = {}
        for layer in plan.layers:
            before = (self.analysis.specs[layer.name],)
            after = planned_layers(before[0], layer)
            if after != before:
                latencies[layer.name] = self.table(before), self.table(after)
        return latencies


def _without_slower(space: SearchSpace, knapsack: Knapsack, solution: Solution, slower: list[str]) -> SearchSpace:
    """Return the search space without the solution's choices for these layers, and without costlier ones."""
    factorisations, widths = dict(space.factorisations), dict(space.widths)
    for name in slower:
        choice = solution.factorisations[name]
        if choice.form != "keep":  # behind "keep" they stand by falling cost
            keep, *others = factorisations[name]
            factorisations[name] = (keep, *others[others.index(choice) + 1 :])
            continue
        for ends in (knapsack.edge_before, knapsack.edge_after):
            consumer = ends.get(name)
            if consumer in solution.widths:
                key = knapsack.edges[consumer].producer, consumer
                widths[key] = {n: loss for n, loss in widths[key].items() if n < solution.widths[consumer]}
    return SearchSpace(factorisations, widths)


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights and biases."""
    return sum(p.numel() for p in model.parameters())
