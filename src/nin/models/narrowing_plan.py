"""The plan of a narrowed network, as plain data and JSON: factorised layers and pruned channels."""

import dataclasses
import html
import json
from typing import Any

from nin.display.tables import html_table

FORMAT_VERSION = 1
FORMS = ("keep", "output", "input", "tucker")


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The factorisation of one layer and its channels after pruning.

    Attributes:
        name: its path in the model.
        form: "keep"; "output": k×k to ``rank_out`` channels, then 1×1; "input": 1×1 to ``rank_in``, then k×k;
            "tucker": 1×1 to ``rank_in``, k×k to ``rank_out``, 1×1.
        rank_in: output channels (per group) of the first 1×1, or None.
        rank_out: output channels (per group) of the k×k, or None.
        inputs: its input channels in the narrowed model.
        outputs: its output channels in the narrowed model.
        dtype: of its weights, such as "float32".
        reason: why it was left as it is, or "".
    """

    name: str
    form: str
    rank_in: int | None
    rank_out: int | None
    inputs: int
    outputs: int
    dtype: str = "float32"
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class ChannelPruning:
    """Channels that are pruned together.

    Attributes:
        producer: the first layer whose output channels they are.
        consumer: the first layer that takes them as input.
        between: BatchNorm and depthwise layers on the way, which lose the same channels; one that has them at several
            places of a concatenation is there as often.
        channels: how many are left.
        before: how many there were.
        readers: other layers that lose them as input, such as the first ones of squeeze-and-excitation.
        gates: other layers that lose them as output: last layers of squeeze-and-excitation, and those whose outputs
            are added to the producer's.
    """

    producer: str
    consumer: str
    between: tuple[str, ...]
    channels: int
    before: int
    readers: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings; what is empty as version 0.1 wrote it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value or name == "between"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ChannelPruning":
        """Return what `to_dict` gave."""
        names: dict[str, Any] = {
            name: tuple(values[name]) for name in ("between", "readers", "gates") if name in values
        }
        return cls(**{**values, **names})


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that `nin.apply_plan` needs to build the narrowed architecture again.

    Attributes:
        layers: the plan of each layer, in the order of the calls.
        pruned: where channels are pruned; "thinned" in JSON.
        budget: the cost that was limited: "macs", "latency" or "parameters".
        share: of the original's cost that is left.
        layout: memory layout of the weights, "contiguous" or "channels_last".

    Example:
        >>> Plan((LayerPlan("0", "output", None, 8, 16, 32),), (), "macs", 0.5).to_json()[:21]
        '{"format_version": 1,'
    """

    layers: tuple[LayerPlan, ...]
    pruned: tuple[ChannelPruning, ...]
    budget: str
    share: float
    layout: str = "contiguous"

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings."""
        names = {"pruned": "thinned"}  # as it was called when the format began
        values = {names.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        values["thinned"] = [pruning.to_dict() for pruning in self.pruned]
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Return the plan that `to_dict` wrote.

        Raises:
            ValueError: the values are not those of a plan, or of a newer version.
        """
        try:
            values = dict(values)
            version = values.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version must be {FORMAT_VERSION}, got {version}: update nin")
            layers = tuple(LayerPlan(**layer) for layer in values.pop("layers"))
            pruned = tuple(map(ChannelPruning.from_dict, values.pop("thinned")))
            plan = cls(layers, pruned, **values)
        except KeyError as error:
            raise ValueError(f"plan must be what Plan.to_dict or to_json wrote: it lacks {error.args[0]}") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"plan must be what Plan.to_dict or to_json wrote: {error}") from error
        for layer in plan.layers:
            if layer.form not in FORMS:
                raise ValueError(f"the form of {layer.name} must be one of {', '.join(FORMS)}, got {layer.form!r}")
        return plan

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table of the layers, its header first."""
        rows: list[tuple[str, ...]] = [("layer", "form", "channels", "ranks", "note")]
        for layer in self.layers:
            ranks = ", ".join(str(rank) for rank in (layer.rank_in, layer.rank_out) if rank is not None)
            rows.append((layer.name, layer.form, f"{layer.inputs} → {layer.outputs}", ranks, layer.reason))
        return rows

    def _repr_html_(self) -> str:
        pruned = [
            ("thinned from", "to", "channels"),
            *((p.producer, p.consumer, f"{p.before} → {p.channels}") for p in self.pruned),
        ]
        text = f"<p>{self.share:g} of the original's {html.escape(self.budget)}</p>"
        return text + html_table(self.rows()) + (html_table(pruned) if self.pruned else "")

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan that `to_json` wrote.

        Raises:
            ValueError: the text is no JSON, or no plan.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"plan must be the JSON that Plan.to_json wrote: {error}") from error
        return cls.from_dict(values)
