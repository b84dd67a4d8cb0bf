"""Budget allocation: a choice for each layer and channel group, a multiple-choice knapsack by Lagrangian relaxation."""

import dataclasses
from collections.abc import Callable, Iterator

from nin.errors import UserError
from nin.models.layer_spec import LayerSpec
from nin.narrowing.channel_flow import ChannelGroup
from nin.narrowing.search_space import Factorisation, SearchSpace

# Steps of the bisection over the multiplier, on a logarithmic scale.
BISECTION_STEPS = 40

# Over the cost of everything: with such a multiplier no loss counts.
LARGEST_MULTIPLIER = 1e12

# Sweeps of the coordinate descent over all layers with one multiplier; only the first two or three change something.
MAX_SWEEPS = 8

# A budget of which so much is spent is spent well; of less, sizes between the candidates are tried.
WELL_SPENT = 0.97

# Between candidates, a layer of fewer than 512 channels is tried at so many sizes, a wider one in steps of 8.
FINEST_SIZES = 64

# A group of channels goes by its `ChannelGroup.key`.
GroupKey = tuple[str, str]

# The cost of a chain of layers that runs one after the other.
CostFunction = Callable[[tuple[LayerSpec, ...]], float]


def macs(chain: tuple[LayerSpec, ...]) -> float:
    """Return the multiply-accumulates of a chain of layers for one image."""
    return float(sum(spec.macs for spec in chain))


def parameters(chain: tuple[LayerSpec, ...]) -> float:
    """Return the weights and biases of a chain of layers."""
    return float(sum(spec.parameters for spec in chain))


@dataclasses.dataclass(frozen=True)
class Solution:
    """One choice for every layer and every group of channels.

    Attributes:
        factorisations: by layer.
        widths: units left of each group; groups that are not there keep all.
        cost: of the network, in units of the budget.
        loss: sum over the layers of the fraction of variance that each loses.
    """

    factorisations: dict[str, Factorisation]
    widths: dict[GroupKey, int]
    cost: float
    loss: float


class Knapsack:
    """Chooses the factorisations and widths of least loss within a budget.

    The loss adds up over layers and groups. The cost of a layer depends on its factorisation and on the widths of the
    groups at both its ends, so ``loss + λ · cost`` is minimised by coordinate descent, and λ is found by bisection.

    Args:
        specs: of all layers that cost something.
        space: the choices.
        groups: of channels that can be pruned together.
        cost: of a chain of layers.
        channel_costs: of what else has a group's channels (BatchNorm), for each of its units.
        fixed_cost: of all else in the network.
        on_step: called in `solve`, before each of its steps, with the number of those before it and of all.
    """

    def __init__(
        self,
        specs: dict[str, LayerSpec],
        space: SearchSpace,
        groups: tuple[ChannelGroup, ...],
        cost: CostFunction,
        channel_costs: dict[GroupKey, float] | None = None,
        fixed_cost: float = 0.0,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.on_step = on_step
        self.specs, self.space, self.cost, self.fixed_cost = specs, space, cost, fixed_cost
        self.channel_costs = channel_costs or {}
        self.units = {group.key: group.units for group in groups}
        # those of which every consumer's loss is known
        self.groups = {g.key: g for g in groups if all(space.widths.get((g.producer, c)) for c in g.consumers)}
        # of each group, the loss by the number of units left, all of them first
        self.group_losses: dict[GroupKey, dict[int, float]] = {}
        # the groups in the input and in the output of a layer, and how many channels of it each of their units is
        self.groups_before: dict[str, list[tuple[GroupKey, int]]] = {}
        self.groups_after: dict[str, list[tuple[GroupKey, int]]] = {}
        for key, group in self.groups.items():
            sizes = space.widths[key]
            self.group_losses[key] = {group.units: 0.0} | {
                n: sum(space.widths[group.producer, consumer][n] for consumer in group.consumers) for n in sizes
            }
            through = {name: group.outputs[name] for name in group.between}
            for ends, channels in (
                (self.groups_before, {**group.inputs, **through}),
                (self.groups_after, group.outputs),
            ):
                for name, parts in channels.items():
                    ends.setdefault(name, []).append((key, len(parts[0])))
        self.costs: dict[tuple[object, ...], float] = {}

    def width(self, name: str, widths: dict[GroupKey, int], *, before: bool) -> int:
        """Return the channels of a layer's input (``before``) or output."""
        spec = self.specs[name]
        width = spec.in_channels if before else spec.out_channels
        for key, parts in (self.groups_before if before else self.groups_after).get(name, ()):
            full = self.groups[key].units
            width -= parts * (full - widths.get(key, full))
        return width

    def layer_cost(self, name: str, factorisation: Factorisation, widths: dict[GroupKey, int]) -> float:
        """Return the cost of one layer."""
        inputs, outputs = self.width(name, widths, before=True), self.width(name, widths, before=False)
        key = (name, factorisation, inputs, outputs)
        if key not in self.costs:
            self.costs[key] = self.cost(factorisation.layers(self.specs[name], inputs=inputs, outputs=outputs))
        return self.costs[key]

    def group_cost(
        self, key: GroupKey, units: int, factorisations: dict[str, Factorisation], widths: dict[GroupKey, int]
    ) -> float:
        """Return the cost of the layers that have a group's channels, with that many units left."""
        group = self.groups[key]
        trial = {**widths, key: units}
        touched = dict.fromkeys((*group.outputs, *group.inputs))
        layers = sum(self.layer_cost(name, factorisations[name], trial) for name in touched if name in self.specs)
        return layers + units * self.channel_costs.get(key, 0.0)

    def solution(self, factorisations: dict[str, Factorisation], widths: dict[GroupKey, int]) -> Solution:
        """Return the choices with their cost and loss."""
        cost = sum(self.layer_cost(name, factorisations[name], widths) for name in self.specs)
        for key, each in self.channel_costs.items():
            cost += each * widths.get(key, self.units[key])
        pruned = sum(self.width_loss(key, units) for key, units in widths.items())
        loss = sum(factorisation.loss for factorisation in factorisations.values()) + pruned
        return Solution(factorisations, widths, self.fixed_cost + cost, loss)

    def width_loss(self, key: GroupKey, units: int) -> float:
        """Return the loss of a group with that many units left; at most that, between two candidates."""
        losses = self.group_losses[key]
        return losses[max(n for n in losses if n <= units)]

    def consumer_losses(self, key: GroupKey, units: int) -> dict[str, float]:
        """Return the same of each consumer."""
        group = self.groups[key]
        if units == group.units:
            return dict.fromkeys(group.consumers, 0.0)
        losses = {name: self.space.widths[group.producer, name] for name in group.consumers}
        return {name: of_name[max(n for n in of_name if n <= units)] for name, of_name in losses.items()}

    def choices(self, name: str) -> tuple[Factorisation, ...]:
        """Return the factorisations that a layer can have, to keep it first."""
        return self.space.factorisations.get(name, (Factorisation(),))

    def unchanged(self) -> Solution:
        """Return the solution that keeps every layer as it is."""
        return self.solution({name: self.choices(name)[0] for name in self.specs}, {})

    def minimise(self, multiplier: float) -> Solution:
        """Return a solution of small ``loss + multiplier · cost``, by coordinate descent."""
        factorisations = dict(self.unchanged().factorisations)
        widths = {key: group.units for key, group in self.groups.items()}
        for _ in range(MAX_SWEEPS):
            before = dict(factorisations), dict(widths)
            for key, losses in self.group_losses.items():
                widths[key] = min(
                    losses, key=lambda n: losses[n] + multiplier * self.group_cost(key, n, factorisations, widths)
                )
            for name in self.specs:
                factorisations[name] = min(
                    self.choices(name), key=lambda f: f.loss + multiplier * self.layer_cost(name, f, widths)
                )
            if before == (factorisations, widths):
                break
        return self.solution(factorisations, widths)

    def cheapest(self) -> Solution:
        """Return the solution of least cost, whatever its loss."""
        return self.minimise(LARGEST_MULTIPLIER / self.unchanged().cost)

    def solve(self, budget: float) -> Solution:
        """Return the solution of least loss that costs at most ``budget``.

        Raises:
            UserError: none is as cheap; it says what can be reached.
        """
        steps = BISECTION_STEPS + 2
        self.on_step(0, steps)
        whole = self.unchanged()
        if whole.cost <= budget:
            return whole
        low, high = 1e-12 / whole.cost, LARGEST_MULTIPLIER / whole.cost
        best = self.cheapest()
        if best.cost > budget:
            raise UserError(
                f"the budget must be at least {best.cost / whole.cost:.3f} of the original, got "
                f"{budget / whole.cost:.3f}: no more can be left out of these layers"
            )
        for step in range(BISECTION_STEPS):
            self.on_step(step + 1, steps)
            middle = (low * high) ** 0.5
            solution = self.minimise(middle)
            if solution.cost <= budget:
                best, high = solution, middle
            else:
                low = middle
        self.on_step(steps - 1, steps)
        return self.spend_slack(best, budget)

    def spend_slack(self, solution: Solution, budget: float) -> Solution:
        """Return the solution with the rest of the budget spent greedily, on the most loss saved for its cost.

        Lagrange multipliers find the corners of the convex hull only, so that some of the budget is left. What is left
        in the end goes to choices that lose as much and cost more, the largest first: that a layer loses nothing on
        the calibration images does not mean that it loses nothing on others.
        """
        factorisations, widths, cost = dict(solution.factorisations), dict(solution.widths), solution.cost
        while True:
            affordable = [
                (saved / max(extra, 1e-9), extra, name, choice)
                for name, choice, saved, extra in self._improvements(factorisations, widths)
                if cost + extra <= budget
            ]
            if not affordable:
                return self.solution(factorisations, widths)
            _, extra, name, choice = max(affordable, key=lambda improvement: improvement[:2])
            if isinstance(name, str):
                assert isinstance(choice, Factorisation)
                factorisations[name] = choice
            else:
                assert isinstance(choice, int)
                widths[name] = choice
            cost += extra

    def _improvements(
        self, factorisations: dict[str, Factorisation], widths: dict[GroupKey, int]
    ) -> Iterator[tuple[str | GroupKey, Factorisation | int, float, float]]:
        """Yield every change of one choice that is for the better.

        It saves loss, or it costs more and loses as much; no factorisation costs more than the layer as it was.

        Yields:
            Of which layer or group, to what, the loss that it saves, the extra cost.
        """
        for name, current in factorisations.items():
            cost = self.layer_cost(name, current, widths)
            keep = self.layer_cost(name, self.choices(name)[0], widths)
            for other in self.choices(name):
                saved, other_cost = current.loss - other.loss, self.layer_cost(name, other, widths)
                if saved >= 0 and other_cost <= keep and (saved > 0 or other_cost > cost):
                    yield name, other, saved, other_cost - cost
        for key, losses in self.group_losses.items():
            width = widths[key]
            cost = self.group_cost(key, width, factorisations, widths)
            for n, loss in losses.items():
                saved, extra = losses[width] - loss, self.group_cost(key, n, factorisations, widths) - cost
                if saved > 0 or (saved == 0 and extra > 0):
                    yield key, n, saved, extra

    def grow(self, solution: Solution, budget: float) -> Solution:
        """Return the solution with larger ranks and widths, between the candidates', where much of the budget is left.

        A larger one loses no more, so the losses are not computed again. A network of few layers has few candidates:
        one convolution of 512 channels alone has a step of an eighth of its cost.
        """
        factorisations, widths, cost = dict(solution.factorisations), dict(solution.widths), solution.cost
        while cost < WELL_SPENT * budget:
            affordable = [
                (loss / max(extra, 1e-9), extra, name, choice)
                for name, choice, loss, extra in self._larger(factorisations, widths)
                if 0 < extra <= budget - cost
            ]
            if not affordable:
                break
            _, extra, name, choice = max(affordable, key=lambda larger: larger[:2])
            if isinstance(name, str):
                assert isinstance(choice, Factorisation)
                factorisations[name] = choice
            else:
                assert isinstance(choice, int)
                widths[name] = choice
            cost += extra
        return self.solution(factorisations, widths)

    def _larger(
        self, factorisations: dict[str, Factorisation], widths: dict[GroupKey, int]
    ) -> Iterator[tuple[str | GroupKey, Factorisation | int, float, float]]:
        """Yield every next larger rank and width: of which layer or group, the choice, the loss now, the extra cost."""
        for name, current in factorisations.items():
            spec, cost = self.specs[name], self.layer_cost(name, current, widths)
            keep = self.layer_cost(name, self.choices(name)[0], widths)
            inputs = self.width(name, widths, before=True) // spec.groups
            outputs = self.width(name, widths, before=False) // spec.groups
            outputs = min(outputs, (current.rank_in or inputs) * spec.taps)
            for field, most in (("rank_in", inputs), ("rank_out", outputs)):
                rank = getattr(current, field)
                if rank is None:
                    continue
                ranks = {"rank_in": current.rank_in, "rank_out": current.rank_out, field: _next_size(rank, most)}
                larger = Factorisation(current.form, loss=current.loss, **ranks)
                larger_cost = self.layer_cost(name, larger, widths)
                if larger_cost < keep:
                    yield name, larger, current.loss, larger_cost - cost
        for key, losses in self.group_losses.items():
            width, most = widths[key], max(losses)
            larger_width = _next_size(width, most)
            extra = self.group_cost(key, larger_width, factorisations, widths)
            extra -= self.group_cost(key, width, factorisations, widths)
            yield key, larger_width, self.width_loss(key, width), extra


def _next_size(size: int, most: int) -> int:
    """Return the next larger rank or width on the finest scale."""
    return min(size + max(1, min(8, most // FINEST_SIZES)), most)
