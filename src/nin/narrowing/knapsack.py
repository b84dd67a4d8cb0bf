"""Which choice for which layer: a multiple-choice knapsack, solved by a price on the budget (Lagrange)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from nin.errors import UserError
from nin.models.layer_shape import LayerShape, factors
from nin.narrowing.candidates import Candidates, Form
from nin.narrowing.dependency_graph import Edge
from nin.narrowing.latency import Price

# Halvings of the interval in which the price lies, on a logarithmic scale.
HALVINGS = 40

# Times the cost of everything: at such a price of cost no loss counts.
HIGHEST_PRICE = 1e12

# Rounds over all layers at one price; two or three change something.
ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice for every layer and every edge.

    Attributes:
        forms: by layer.
        widths: channels left, by the number of the edge; edges that are not there keep all.
        cost: of the network, in units of the budget.
        loss: sum over the layers of the share of variance that each loses.
    """

    forms: dict[str, Form]
    widths: dict[int, int]
    cost: float
    loss: float


class Knapsack:
    """Chooses the forms and widths that lose least for what they cost.

    The loss adds up over layers and edges. The cost of a layer depends on its form and on the widths of the edges
    at both its ends, so at one price λ the choices are improved in turn until none changes; λ is found by bisection.

    Args:
        shapes: of all layers that cost something.
        candidates: the choices.
        edges: between which layers channels can be left out.
        price: of a chain of layers.
        fixed: what else the network costs, whatever is chosen.
    """

    def __init__(
        self,
        shapes: dict[str, LayerShape],
        candidates: Candidates,
        edges: tuple[Edge, ...],
        price: Price,
        fixed: float = 0.0,
    ) -> None:
        self.shapes, self.candidates, self.price, self.fixed = shapes, candidates, price, fixed
        self.edges = [edge for edge in edges if candidates.widths.get((edge.producer, edge.consumer))]
        self.edge_before: dict[str, int] = {}
        self.edge_after: dict[str, int] = {}
        for number, edge in enumerate(self.edges):
            self.edge_after[edge.producer] = self.edge_before[edge.consumer] = number
            for name in edge.between:
                self.edge_after[name] = self.edge_before[name] = number
        self.known: dict[tuple[object, ...], float] = {}

    def width(self, name: str, widths: dict[int, int], *, before: bool) -> int:
        """Return the channels of a layer's input (``before``) or output."""
        shape = self.shapes[name]
        number = (self.edge_before if before else self.edge_after).get(name)
        full = shape.in_channels if before else shape.out_channels
        return full if number is None else widths.get(number, full)

    def cost(self, name: str, form: Form, widths: dict[int, int]) -> float:
        """Return what one layer costs."""
        inputs, outputs = self.width(name, widths, before=True), self.width(name, widths, before=False)
        key = (name, form.form, form.rank_in, form.rank_out, inputs, outputs)
        if key not in self.known:
            chain = factors(self.shapes[name], form.form, form.rank_in, form.rank_out, inputs=inputs, outputs=outputs)
            self.known[key] = self.price(chain)
        return self.known[key]

    def total(self, forms: dict[str, Form], widths: dict[int, int]) -> float:
        """Return what the network costs."""
        return self.fixed + sum(self.cost(name, forms[name], widths) for name in self.shapes)

    def loss(self, forms: dict[str, Form], widths: dict[int, int]) -> float:
        """Return what a choice loses."""
        return sum(form.loss for form in forms.values()) + sum(self.edge_loss(i, n) for i, n in widths.items())

    def edge_loss(self, number: int, channels: int) -> float:
        """Return what an edge loses with that many channels left."""
        edge = self.edges[number]
        return self.candidates.widths[edge.producer, edge.consumer].get(channels, 0.0)

    def widths_of(self, number: int) -> list[int]:
        """Return the widths that an edge can have, all channels first."""
        edge = self.edges[number]
        return [self.shapes[edge.consumer].in_channels, *self.candidates.widths[edge.producer, edge.consumer]]

    def everything(self) -> Choice:
        """Return the choice that changes nothing."""
        forms = {name: self.candidates.forms.get(name, (Form(),))[0] for name in self.shapes}
        return Choice(forms, {}, self.total(forms, {}), 0.0)

    def at_price(self, price: float) -> Choice:
        """Return the choice that makes ``loss + price · cost`` small."""
        forms, widths = dict(self.everything().forms), dict[int, int]()
        for _ in range(ROUNDS):
            changed = False
            for number in range(len(self.edges)):
                best = min(self.widths_of(number), key=lambda n: self._edge_score(number, n, forms, widths, price))
                changed |= best != widths.get(number, self.widths_of(number)[0])
                widths[number] = best
            for name in self.shapes:
                best_form = min(
                    self.candidates.forms.get(name, (Form(),)),
                    key=lambda f: f.loss + price * self.cost(name, f, widths),
                )
                changed |= best_form != forms[name]
                forms[name] = best_form
            if not changed:
                break
        return Choice(forms, widths, self.total(forms, widths), self.loss(forms, widths))

    def _edge_score(self, number: int, n: int, forms: dict[str, Form], widths: dict[int, int], price: float) -> float:
        edge = self.edges[number]
        trial = {**widths, number: n}
        touched = (edge.producer, edge.consumer, *edge.between)
        cost = sum(self.cost(name, forms[name], trial) for name in touched if name in self.shapes)
        return self.edge_loss(number, n) + price * cost

    def cheapest(self) -> Choice:
        """Return the choice that costs least, whatever its loss."""
        return self.at_price(HIGHEST_PRICE / self.everything().cost)

    def choose(self, budget: float) -> Choice:
        """Return the choice of least loss that costs at most ``budget``.

        Raises:
            UserError: no choice is as cheap; it says what can be reached.
        """
        whole = self.everything()
        if whole.cost <= budget:
            return whole
        low, high = 1e-12 / whole.cost, HIGHEST_PRICE / whole.cost
        best = self.cheapest()
        if best.cost > budget:
            raise UserError(
                f"the budget must be at least {best.cost / whole.cost:.3f} of the original, got "
                f"{budget / whole.cost:.3f}: no more can be left out of these layers"
            )
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            choice = self.at_price(middle)
            if choice.cost <= budget:
                best, high = choice, middle
            else:
                low = middle
        return self.spend(best, budget)

    def spend(self, choice: Choice, budget: float) -> Choice:
        """Return the choice with what is left of the budget spent on the best single steps back."""
        forms, widths, cost = dict(choice.forms), dict(choice.widths), choice.cost
        while True:
            best: tuple[float, str | int, Form | int, float] | None = None
            for key, option, gain, extra in self._steps(forms, widths):
                if gain > 0 and cost + extra <= budget:
                    value = gain / max(extra, 1e-9)
                    if best is None or value > best[0]:
                        best = value, key, option, extra
            if best is None:
                return Choice(forms, widths, self.total(forms, widths), self.loss(forms, widths))
            _, key, option, extra = best
            if isinstance(option, Form):
                forms[str(key)] = option
            else:
                widths[int(key)] = option
            cost += extra

    def _steps(
        self, forms: dict[str, Form], widths: dict[int, int]
    ) -> Iterator[tuple[str | int, Form | int, float, float]]:
        """Yield every change of one choice: what, to what, how much less is lost, how much more it costs."""
        for name, form in forms.items():
            now = self.cost(name, form, widths)
            for other in self.candidates.forms.get(name, ()):
                if other.loss < form.loss:
                    yield name, other, form.loss - other.loss, self.cost(name, other, widths) - now
        for number in range(len(self.edges)):
            current = widths.get(number, self.widths_of(number)[0])
            now = self._edge_score(number, current, forms, widths, 1.0) - self.edge_loss(number, current)
            for n in self.widths_of(number):
                gain = self.edge_loss(number, current) - self.edge_loss(number, n)
                if gain > 0:
                    extra = self._edge_score(number, n, forms, widths, 1.0) - self.edge_loss(number, n) - now
                    yield number, n, gain, extra
