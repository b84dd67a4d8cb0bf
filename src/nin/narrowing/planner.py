"""From a budget to a plan: the knapsack's solution, checked against measured latencies."""

import dataclasses
import json
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from nin.errors import UserError
from nin.models.layer_spec import LayerSpec
from nin.models.narrowing_plan import ChannelPruning, LayerPlan, Plan
from nin.models.surgery import apply_plan, planned_layers
from nin.narrowing.analysis import Analysis
from nin.narrowing.knapsack import WELL_SPENT, CostFunction, GroupKey, Knapsack, Solution, macs, parameters
from nin.narrowing.latency import LatencyTable, ModelTimer
from nin.narrowing.options import NarrowOptions
from nin.narrowing.search_space import Factorisation, SearchSpace
from nin.runtime.timer import Timing

# With a latency budget the whole model is timed after each plan; so many plans are made at most.
LATENCY_PLANS = 5

# A plan is good enough if the latency of its whole model, as a fraction of the budget, lies between these.
LATENCY_SPENT, LATENCY_TOLERANCE = 0.96, 1.02

# A plan for a latency is made of estimates, and what it is made of is timed; where the sum of that differs from the
# estimates' by more than this fraction, the plan is made again with it, so many times at most.
REFINED, REFINEMENTS = 0.05, 2

# Where the whole model's latency and the sum of its layers' differ by more than this fraction of the latter, the layers
# of the plan are timed again, once, and the plan is made again.
DISAGREEMENT = 0.15

# A layer is not left slower than before where the plan without that is expected to lose at most so many times as much,
# and this fraction of a layer's variance more.
REVERT_LOSS, REVERT_LEAST = 1.2, 1e-3


@dataclasses.dataclass(frozen=True)
class PlannerResult:
    """A plan for a budget and what is expected of it.

    Attributes:
        plan: what to do.
        loss: sum over the layers of the fraction of variance that each is expected to lose.
        predicted: the same for each layer.
        latency: milliseconds before and after of each layer that changes; empty where they are not measured.
        notes: sentences for the report.
        reached: whether the plan kept the budget when its whole model was timed, or none was to be timed.
    """

    plan: Plan
    loss: float
    predicted: dict[str, float]
    latency: dict[str, tuple[float, float]]
    notes: tuple[str, ...]
    reached: bool = True

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
        notes: tuple[str, ...] = ()
        reached = True
        if self.kind == "latency":
            knapsack, solution, notes, reached = self._fit_latency(share)
        else:
            knapsack = self._knapsack(self.space)
            whole = knapsack.unchanged().cost
            budget = share * whole
            solution = _solve(knapsack, budget)
            if self.options.revert_slower:
                solution, notes = self._revert_slower(knapsack, solution, share, budget)
            if solution.cost < WELL_SPENT * budget:
                left = f"{solution.cost / whole:.3f} of the {self.kind.replace('macs', 'MACs')} are left"
                reason = "no choice of ranks and channels between them loses less"
                notes = (*notes, f"{left} where {share:.3f} was asked for: {reason}.")
        plan = self._to_plan(knapsack, solution, share)
        latency = self._layer_latencies(plan) if self.options.measure_latency else {}
        predicted = {name: choice.loss for name, choice in solution.factorisations.items()}
        for key, units in solution.widths.items():
            for consumer, loss in knapsack.consumer_losses(key, units).items():
                predicted[consumer] += loss
        for name, weight in self.analysis.shortcut_weights.items():
            predicted[name] /= weight  # of the layer's own variance again
        return PlannerResult(plan, solution.loss, predicted, latency, notes, reached)

    def _knapsack(self, space: SearchSpace) -> Knapsack:
        latency = self.table.estimates(self.analysis.specs.values())
        costs: dict[str, CostFunction] = {"macs": macs, "parameters": parameters, "latency": latency}
        groups = self.analysis.graph.groups if self.options.thin else ()
        fixed, channels = 0.0, dict[GroupKey, float]()
        if self.kind == "parameters":  # those of other modules stay, but for BatchNorm's where channels go
            fixed = count_parameters(self.original) - sum(s.parameters for s in self.analysis.specs.values())
            for group in groups:
                norms = [(n, self.original.get_submodule(n)) for n in group.between if n not in self.analysis.specs]
                of_channels = [(len(group.outputs[n][0]), m) for n, m in norms if isinstance(m, nn.BatchNorm2d)]
                each = sum(parts * count_parameters(norm) / norm.num_features for parts, norm in of_channels)
                channels[group.key] = each
                fixed -= each * group.units
        on_step = self._on_latency_step if self.kind == "latency" else lambda done, total: None
        return Knapsack(self.analysis.specs, space, groups, costs[self.kind], channels, fixed, on_step)

    def _on_latency_step(self, done: int, total: int) -> None:
        """Say which step of the solver asks for the times that follow."""
        self.table.progress = (self.table.progress[0], done, total)

    def _revert_slower(
        self, knapsack: Knapsack, solution: Solution, share: float, budget: float
    ) -> tuple[Solution, tuple[str, ...]]:
        """Return a solution with fewer layers that were measured slower than before.

        A layer is given fewer channels than those that were slower, or is left as it was, where the solution stays as
        near to the budget and does not lose much more. Where it does not, the layer stays slower.
        """
        space = self.space
        least_cost, most_loss = WELL_SPENT * solution.cost, REVERT_LOSS * solution.loss + REVERT_LEAST
        mended: list[str] = []
        needed: list[str] = []
        slower = self._slower(knapsack, solution, share)
        while todo := [name for name in slower if name not in needed]:
            name = max(todo, key=lambda name: slower[name])
            for other_space, other in self._without_slower(knapsack, space, solution, name, share, budget):
                is_near = other.cost >= least_cost and other.loss <= most_loss
                now_slower = self._slower(knapsack, other, share) if is_near else slower
                if sum(now_slower.values()) < sum(slower.values()):
                    space, solution, slower = other_space, other, now_slower
                    mended.append(name)
                    break
            else:
                needed.append(name)
        notes = []
        for text, names in (
            ("Left as they were, or given other numbers of channels, as they were measured slower: ", mended),
            ("Slower than before, but the budget needs them: ", needed),
        ):
            still = names is needed
            if listed := [name for name in self.analysis.specs if name in names and (name in slower) == still]:
                notes.append(f"{text}{', '.join(listed)}.")
        return solution, tuple(notes)

    def _without_slower(
        self, knapsack: Knapsack, space: SearchSpace, solution: Solution, name: str, share: float, budget: float
    ) -> Iterator[tuple[SearchSpace, Solution]]:
        """Yield solutions in which a layer is not slower: with a cheaper choice, and with the layer as it was."""
        for cheaper in (True, False):
            trial_space, trial = space, solution
            while (smaller := _without_choice(trial_space, knapsack, trial, name, cheaper=cheaper)) != trial_space:
                try:
                    # its groups are among those of the given knapsack, in whose terms the plan is made
                    trial_space, trial = smaller, _solve(self._knapsack(smaller), budget)
                except UserError:
                    break
                if name not in self._slower(knapsack, trial, share):
                    yield trial_space, trial
                    break

    def _slower(self, knapsack: Knapsack, solution: Solution, share: float) -> dict[str, float]:
        """Return by how many milliseconds layers are slower than before, those that are."""
        latencies = self._layer_latencies(self._to_plan(knapsack, solution, share))
        return {name: after - before for name, (before, after) in latencies.items() if after > before}

    def _fit_latency(self, share: float) -> tuple[Knapsack, Solution, tuple[str, ...], bool]:
        """Solve with the latencies of layers, time the whole model, and adapt the budget until that meets the share.

        Returns:
            The solution and the knapsack that it is of, sentences for the report, and whether the share is kept.
        """
        self._time_layers(" of the original", [(spec,) for spec in self.analysis.specs.values()])
        self.table.progress = (" of the smallest plan", 0, 0)
        knapsack = self._knapsack(self.space)
        lowest = knapsack.cheapest().cost / knapsack.unchanged().cost
        # between budgets of the table whose whole model keeps to the share, and whose does not; all are shares, too
        kept, missed, budget = 0.0, 1.0, share
        most = share * LATENCY_TOLERANCE
        tried: list[tuple[float, Knapsack, Solution]] = []  # with the share that each leaves
        retimed = False
        for attempt in range(1, LATENCY_PLANS + 1):
            purpose = f", plan {attempt} of at most {LATENCY_PLANS}"
            knapsack, solution = self._solve_latency(purpose, budget, later=attempt > 1)
            before, after = self._time_whole(purpose, knapsack, solution, share)
            costs = self._measured_costs(knapsack, solution, share)
            if not retimed and _disagree(before, after, *costs):
                retimed = True
                if self._time_layers_again(knapsack, solution, share):
                    budget, kept, missed = share, 0.0, 1.0
                    purpose = f", plan {attempt} made again"
                    knapsack, solution = self._solve_latency(purpose, budget, later=False)
                    before, after = self._time_whole(purpose, knapsack, solution, share)
            reached = after.low_ms / before.low_ms  # other load on the machine only makes times longer
            tried.append((reached, knapsack, solution))
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
        if within := [attempt for attempt in tried if attempt[0] <= most]:
            reached, knapsack, solution = min(within, key=lambda attempt: attempt[2].loss)
            if reached >= share * LATENCY_SPENT:
                return knapsack, solution, (), True
            reason = "no plan that was timed comes nearer from below"
            note = f"{reached:.2f} of the latency is left where {share:.2f} was asked for: {reason}."
            return knapsack, solution, (note,), True
        asked = f"The latency asked for, {share:.2f} of the original's, was not reached"
        reached, knapsack, solution = min(tried, key=lambda attempt: attempt[0])
        if reached < 1:
            return knapsack, solution, (f"{asked}: {reached:.2f}.",), False
        note = f"{asked}: no plan is faster than the original, which is left as it is ({reached:.2f})."
        return knapsack, knapsack.unchanged(), (note,), False

    def _solve_latency(self, purpose: str, budget: float, *, later: bool) -> tuple[Knapsack, Solution]:
        """Solve for a share of the layers' latencies: with estimates, until what was chosen takes the time expected."""
        for number in range(1, REFINEMENTS + 1):
            self.table.progress = (purpose if number == 1 else f"{purpose}, draft {number}", 0, 0)
            knapsack = self._knapsack(self.space)
            limit = budget * knapsack.unchanged().cost
            # below what can be reached, the first plan is a mistake of whoever asks; a later one aims too low
            least = knapsack.cheapest() if later else None
            solution = least if least is not None and least.cost >= limit else knapsack.solve(limit)
            chains = self._planned_chains(knapsack, solution, budget)
            if all(map(self.table.knows, chains)):
                break
            self._time_layers(f" of draft {number}{purpose}", chains)
            exact = self._measured_costs(knapsack, solution, budget)[1]
            if abs(exact - solution.cost) <= REFINED * solution.cost:
                break
        return knapsack, solution

    def _time_layers(self, purpose: str, chains: list[tuple[LayerSpec, ...]]) -> None:
        """Measure chains that are not known yet."""
        for done, chain in enumerate(chains):
            self.table.progress = (purpose, done, len(chains))
            self.table(chain)

    def _planned_chains(self, knapsack: Knapsack, solution: Solution, share: float) -> list[tuple[LayerSpec, ...]]:
        """Return what takes the place of each layer."""
        layers = self._to_plan(knapsack, solution, share).layers
        return [planned_layers(self.analysis.specs[layer.name], layer) for layer in layers]

    def _measured_costs(self, knapsack: Knapsack, solution: Solution, share: float) -> tuple[float, float]:
        """Return the sums of the layers' measured latencies before and after."""
        chains = self._planned_chains(knapsack, solution, share)
        return sum(self.table((spec,)) for spec in self.analysis.specs.values()), sum(map(self.table, chains))

    def _time_whole(self, purpose: str, knapsack: Knapsack, solution: Solution, share: float) -> tuple[Timing, Timing]:
        """Return the timings of the whole model before and after, on a batch, timed on as many images as are enough."""
        planned = apply_plan(self.original, self._to_plan(knapsack, solution, share))
        self.model_timer.progress = (purpose, 0, 0)
        images = self.model_timer.images_for_plan(self.table.batch)
        before, after = self.model_timer.compare(planned, images)
        return before.times(self.table.batch / images), after.times(self.table.batch / images)

    def _time_layers_again(self, knapsack: Knapsack, solution: Solution, share: float) -> bool:
        """Time the layers of a plan once more, before and after; return whether one takes another time than before.

        What was measured of other layers is forgotten then: it may be of a busy moment, too.
        """
        chains = [(spec,) for spec in self.analysis.specs.values()] + self._planned_chains(knapsack, solution, share)
        before = self.table.forget(chains)
        self._time_layers(" of the plan again", chains)
        if all(abs(self.table.known[key] - old) <= DISAGREEMENT * old for key, old in before.items()):
            return False
        self.table.keep_only(chains)
        return True

    def _to_plan(self, knapsack: Knapsack, solution: Solution, share: float) -> Plan:
        layers = []
        for name, choice in solution.factorisations.items():
            inputs = knapsack.width(name, solution.widths, before=True)
            outputs = knapsack.width(name, solution.widths, before=False)
            # of a pruned layer, which is left alone, the weight is no parameter
            weight = cast(Tensor, self.original.get_submodule(name).weight)
            dtype = str(weight.dtype).removeprefix("torch.")
            reason = self.analysis.reasons.get(name, "")
            layers.append(LayerPlan(name, choice.form, choice.rank_in, choice.rank_out, inputs, outputs, dtype, reason))
        pruned = []
        for key, group in knapsack.groups.items():
            left = solution.widths.get(key, group.units)
            if left < group.units:
                between = tuple(name for name in group.between for _ in group.outputs[name][0])
                others = (*group.readers, *group.consumers[1:]), (*group.gates, *group.writers)
                pruned.append(ChannelPruning(*key, between, left, group.units, *others))
        return Plan(tuple(layers), tuple(pruned), self.kind, share, self.options.layout)

    def _layer_latencies(self, plan: Plan) -> dict[str, tuple[float, float]]:
        """Return the milliseconds before and after of each layer that changes."""
        latencies = {}
        for done, layer in enumerate(plan.layers):
            self.table.progress = (" of a plan", done, len(plan.layers))
            before = (self.analysis.specs[layer.name],)
            after = planned_layers(before[0], layer)
            if after != before:
                latencies[layer.name] = self.table(before), self.table(after)
        return latencies


def _disagree(before: Timing, after: Timing, layers_before: float, layers_after: float) -> bool:
    """Return whether the whole model's time and the sum of its layers' differ: in what they take, or in what goes.

    A part of the whole's time is not in its layers, and stays; or the layers take less together than one by one, where
    an engine converts the input and the output of each.
    """
    other = max(0.0, before.low_ms - layers_before)
    expected = other + layers_after * min(1.0, before.low_ms / layers_before)
    return abs(after.low_ms - expected) > DISAGREEMENT * expected


def _solve(knapsack: Knapsack, budget: float) -> Solution:
    """Return the solution of least loss within a budget of multiply-accumulates or parameters, most of it spent."""
    return knapsack.grow(knapsack.solve(budget), budget)


def _without_choice(
    space: SearchSpace, knapsack: Knapsack, solution: Solution, name: str, *, cheaper: bool
) -> SearchSpace:
    """Return the search space without the solution's choice for a layer, and without others: all or the costlier."""
    choice, factorisations, widths = solution.factorisations[name], dict(space.factorisations), dict(space.widths)
    if choice.form != "keep":

        def cost(factorisation: Factorisation) -> float:
            return knapsack.layer_cost(name, factorisation, solution.widths)

        keep, *others = factorisations[name]
        factorisations[name] = (keep, *(f for f in others if cheaper and cost(f) < cost(choice)))
    else:
        for ends in (knapsack.groups_before, knapsack.groups_after):
            for key, _ in ends.get(name, ()):
                group, most = knapsack.groups[key], solution.widths.get(key, knapsack.groups[key].units)
                for consumer in group.consumers:
                    losses = widths[group.producer, consumer]
                    widths[group.producer, consumer] = {n: x for n, x in losses.items() if cheaper and n < most}
    return SearchSpace(factorisations, widths)


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights and biases."""
    return sum(p.numel() for p in model.parameters())
