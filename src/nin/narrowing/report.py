"""What narrowing did, as plain data: each layer, and the whole before and after."""

from __future__ import annotations

import dataclasses
import html
import io
from typing import Any

import torch
from torch import nn

from nin.models.layer_shape import LayerShape
from nin.models.plan import Plan
from nin.models.surgery import chain_of
from nin.runtime.formatting import format_percent
from nin.runtime.tables import html_table, text_table
from nin.runtime.timer import Timing


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer before and after.

    Attributes:
        name: its path in the model.
        before: its channels and kernel, such as "64 → 64, 3×3".
        after: the same of what took its place; "" where nothing changed.
        macs_before: multiply-accumulates for one image.
        macs_after: the same of what took its place.
        parameters_before: weights and biases.
        parameters_after: the same of what took its place.
        latency_ms_before: of the layer alone (20th percentile), or None where it was not measured.
        latency_ms_after: the same of what took its place.
        predicted_error: share of its variance, weighted by what it matters, that the plan expected to lose.
        measured_error: the same once fitted, with the errors that come in from the layers before it; None where
            the layer was not fitted.
        reason: why it was left as it is, or "".
    """

    name: str
    before: str
    after: str
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    latency_ms_before: float | None
    latency_ms_after: float | None
    predicted_error: float
    measured_error: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """What one budget of several cost.

    Attributes:
        share: of the budget.
        macs: multiply-accumulates that are left, for one image.
        parameters: that are left.
        latency: for each batch size measured, the timing before and after.
        accuracy: as in `NarrowReport`.
        calibration_error: as in `NarrowReport`.
    """

    share: float
    macs: int
    parameters: int
    latency: dict[int, tuple[Timing, Timing]]
    accuracy: dict[str, float]
    calibration_error: float | None


@dataclasses.dataclass(frozen=True)
class Control:
    """A uniformly thinner network that was trained from the beginning, for comparison.

    Attributes:
        ratio: of its channels, hidden ones, to the original's.
        epochs: that it was trained for.
        macs: multiply-accumulates for one image.
        parameters: weights and biases.
        latency: for each batch size measured, the timing of the original and of it.
        accuracy: share of right answers.
    """

    ratio: float
    epochs: int
    macs: int
    parameters: int
    latency: dict[int, tuple[Timing, Timing]]
    accuracy: float


@dataclasses.dataclass(frozen=True)
class NarrowReport:
    """The whole before and after.

    Attributes:
        layers: in the order of the calls, those that are left out last.
        macs: multiply-accumulates of all convolutions and fully connected layers for one image, before and after.
        parameters: of the whole model, before and after.
        file_bytes: of its ``state_dict``, before and after.
        latency: for each batch size measured, the timing before and after.
        accuracy: what ``evaluate`` gave for "original", "raw", "corrected" and "finetuned", where there was one.
        predicted_loss: sum over the layers of their predicted errors.
        calibration_error: squared distance from the original's results as a share of their variance; None in a dry
            run.
        notes: sentences about what was done or left.
        environment: versions, threads and what was measured on.
        curve: the budgets, largest first, where there were several.
        control: a uniformly thinner network, where one was trained.
    """

    layers: tuple[LayerReport, ...]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    file_bytes: tuple[int, int]
    latency: dict[int, tuple[Timing, Timing]]
    accuracy: dict[str, float]
    predicted_loss: float
    calibration_error: float | None
    notes: tuple[str, ...]
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    control: Control | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NarrowReport:
        """Return the report that `to_dict` wrote, before or after JSON."""
        control = values["control"]
        return cls(
            **{
                **values,
                "layers": tuple(LayerReport(**layer) for layer in values["layers"]),
                **{name: tuple(values[name]) for name in ("macs", "parameters", "file_bytes", "notes")},
                "latency": _timings(values["latency"]),
                "curve": tuple(CurvePoint(**{**p, "latency": _timings(p["latency"])}) for p in values["curve"]),
                "control": control and Control(**{**control, "latency": _timings(control["latency"])}),
            }
        )

    def curve_rows(self) -> list[tuple[str, ...]]:
        """Return the table of the budgets, a header first; empty where there was one budget."""
        if not self.curve:
            return []
        sizes = list(self.latency)
        rows: list[tuple[str, ...]] = [("budget", "MACs", *(f"ms, batch {n}" for n in sizes), "accuracy", "error")]
        first = self.accuracy.get("original")
        before = [_milliseconds(self.latency[n][0]) for n in sizes]
        rows.append(("1", f"{self.macs[0]:,}", *before, "" if first is None else f"{first:.4f}", "0"))
        for p in self.curve:
            value = p.accuracy.get("corrected")
            rows.append(
                (
                    f"{p.share:g}",
                    f"{p.macs:,}",
                    *(_milliseconds(p.latency[n][1]) for n in sizes),
                    "" if value is None else f"{value:.4f}",
                    "" if p.calibration_error is None else f"{p.calibration_error:.3g}",
                )
            )
        return rows

    def control_rows(self) -> list[tuple[str, ...]]:
        """Return the narrowed network beside the control, a header first; empty where there is no control."""
        c = self.control
        if c is None:
            return []
        sizes = [n for n in self.latency if n in c.latency]
        best = self.accuracy.get("finetuned", self.accuracy.get("corrected"))
        header = ("", "MACs", "parameters", *(f"ms, batch {n}" for n in sizes), "accuracy")
        narrowed = (f"{self.macs[1]:,}", f"{self.parameters[1]:,}", *(_milliseconds(self.latency[n][1]) for n in sizes))
        control = (f"{c.macs:,}", f"{c.parameters:,}", *(_milliseconds(c.latency[n][1]) for n in sizes))
        name = f"control: {c.ratio:.2f} of the channels, trained {c.epochs} epochs"
        return [
            header,
            ("narrowed", *narrowed, "" if best is None else f"{best:.4f}"),
            (name, *control, f"{c.accuracy:.4f}"),
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the layers' table, a header first."""
        rows: list[tuple[str, ...]] = [("layer", "before", "after", "MACs", "parameters", "ms", "error", "note")]
        for layer in self.layers:
            ms = ""
            if layer.latency_ms_before is not None and layer.latency_ms_after is not None:
                ms = f"{layer.latency_ms_before:.2f} → {layer.latency_ms_after:.2f}"
            error = format_percent(layer.predicted_error) if layer.after else ""
            if layer.measured_error is not None:
                error += f" → {format_percent(layer.measured_error)}"
            macs = f"× {layer.macs_after / layer.macs_before:.2f}" if layer.macs_before else ""
            count = f"× {layer.parameters_after / layer.parameters_before:.2f}" if layer.parameters_before else ""
            rows.append((layer.name, layer.before, layer.after, macs, count, ms, error, layer.reason))
        return rows

    def summary(self) -> list[tuple[str, str, str, str]]:
        """Return the whole: what, before, after, and after as a share of before."""
        rows = [
            (name, f"{before:,}", f"{after:,}", f"{after / max(1, before):.3f}")
            for name, (before, after) in (
                ("MACs", self.macs),
                ("parameters", self.parameters),
                ("file, bytes", self.file_bytes),
            )
        ]
        for batch, (before, after) in self.latency.items():
            rows.append(
                (
                    f"ms, batch {batch}",
                    _milliseconds(before),
                    _milliseconds(after),
                    f"{after.median_ms / before.median_ms:.3f}",
                )
            )
        original = self.accuracy.get("original")
        for name, value in self.accuracy.items():
            if name != "original" and original is not None:
                rows.append((f"accuracy, {name}", f"{original:.4f}", f"{value:.4f}", f"{value - original:+.4f}"))
        if self.calibration_error is not None:
            rows.append(("error of the result", "0", f"{self.calibration_error:.3g}", "of its variance"))
        return rows

    def tables(self) -> list[list[tuple[str, ...]]]:
        """Return the rows of each table that is not empty, header first: the whole, the curve, the control, layers."""
        summary: list[tuple[str, ...]] = [("", "before", "after", "share"), *self.summary()]
        return [rows for rows in (summary, self.curve_rows(), self.control_rows(), self.rows()) if rows]

    def __str__(self) -> str:
        """Return the tables as text."""
        return "\n\n".join([*map(text_table, self.tables()), "\n".join(self.notes)]).rstrip()

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return "".join(map(html_table, self.tables())) + notes


def _milliseconds(t: Timing) -> str:
    return f"{t.median_ms:.2f} ({t.low_ms:.2f} to {t.high_ms:.2f})"


def _timings(values: dict[Any, Any]) -> dict[int, tuple[Timing, Timing]]:
    """Return timings by batch size; JSON makes the sizes text and the timings mappings."""

    def timing(value: Any) -> Timing:
        return value if isinstance(value, Timing) else Timing(**value)

    return {int(size): (timing(a), timing(b)) for size, (a, b) in values.items()}


def describe(chain: tuple[LayerShape, ...]) -> str:
    """Return layers as people write them: "64 → 1×1 → 16 → 3×3 → 64"."""
    text = str(chain[0].in_channels)
    for shape in chain:
        kernel = "×".join(map(str, shape.kernel_size)) if shape.kind == "conv" else "dense"
        text += f" → {kernel} → {shape.out_channels}"
    return text


def layer_reports(
    shapes: dict[str, LayerShape],
    plan: Plan,
    reasons: dict[str, str],
    predicted: dict[str, float],
    measured: dict[str, float],
    latency: dict[str, tuple[float, float]],
) -> tuple[LayerReport, ...]:
    """Return one line for each layer that was called, then for those that were left out."""
    planned = {layer.name: layer for layer in plan.layers}
    rows = []
    for name, shape in shapes.items():
        before = after = (shape,)
        if name in planned:
            after = chain_of(shape, planned[name])  # type: ignore[assignment]
        changed = after != before
        ms_before, ms_after = latency.get(name, (None, None))
        rows.append(
            LayerReport(
                name,
                describe(before),
                describe(after) if changed else "",
                sum(s.macs for s in before),
                sum(s.macs for s in after),
                sum(s.parameters for s in before),
                sum(s.parameters for s in after),
                ms_before,
                ms_after,
                predicted.get(name, 0.0),
                measured.get(name),
                "" if changed else reasons.get(name, "not worth it at this budget"),
            )
        )
    left = [name for name in reasons if name not in shapes]
    return (*rows, *(LayerReport(n, "", "", 0, 0, 0, 0, None, None, 0.0, None, reasons[n]) for n in left))


def file_bytes(model: nn.Module) -> int:
    """Return the size of a model's weights in a file."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()
