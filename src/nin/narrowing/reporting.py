"""What narrowing did, as plain data: each layer, and the whole before and after."""

from __future__ import annotations

import dataclasses
import html
import io
from typing import Any

import torch
from torch import nn

from nin.narrowing.plan import Plan
from nin.narrowing.structure import LayerShape, factors
from nin.tables import html_table
from nin.timing import Timing


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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the layers' table, a header first."""
        rows: list[tuple[str, ...]] = [("layer", "before", "after", "MACs", "ms", "error", "note")]
        for layer in self.layers:
            share = layer.macs_after / max(1, layer.macs_before)
            ms = ""
            if layer.latency_ms_before is not None and layer.latency_ms_after is not None:
                ms = f"{layer.latency_ms_before:.2f} → {layer.latency_ms_after:.2f}"
            error = f"{100 * layer.predicted_error:.1f} %" if layer.after else ""
            if layer.measured_error is not None:
                error += f" → {100 * layer.measured_error:.1f} %"
            macs = f"× {share:.2f}" if layer.macs_before else ""
            rows.append((layer.name, layer.before, layer.after, macs, ms, error, layer.reason))
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
                    f"{before.median_ms:.2f} ({before.low_ms:.2f} to {before.high_ms:.2f})",
                    f"{after.median_ms:.2f} ({after.low_ms:.2f} to {after.high_ms:.2f})",
                    f"{after.median_ms / before.median_ms:.3f}",
                )
            )
        original = self.accuracy.get("original")
        for name, value in self.accuracy.items():
            if name != "original" and original is not None:
                rows.append((f"accuracy, {name}", f"{original:.4f}", f"{value:.4f}", f"{value - original:+.4f}"))
        return rows

    def __str__(self) -> str:
        """Return the tables as text."""
        header = ("", "before", "after", "share")
        parts = [_text([header, *self.summary()]), _text(self.rows())]
        return "\n\n".join([*parts, "\n".join(self.notes)]).rstrip()

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return html_table([("", "before", "after", "share"), *self.summary()]) + html_table(self.rows()) + notes


def _text(rows: list[Any]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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
            p = planned[name]
            after = factors(shape, p.form, p.rank_in, p.rank_out, inputs=p.inputs, outputs=p.outputs)  # type: ignore[assignment]
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
