"""The report of a narrowing as plain data and text tables: cost and accuracy before and after, layer by layer."""

import dataclasses
import html
import io
from typing import Any

import torch
from torch import nn

from nin.display.numbers import format_percent
from nin.display.tables import html_table, text_table
from nin.models.layer_spec import LayerSpec
from nin.models.surgery import planned_layers
from nin.narrowing.analysis import Analysis
from nin.narrowing.planner import PlannerResult
from nin.runtime.timer import Timing

# The keys of `NarrowReport.accuracy` in words.
STAGES = {"raw": "narrowed", "corrected": "recalibrated", "finetuned": "fine-tuned"}


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer before and after.

    Attributes:
        name: its path in the model.
        before: its channels and kernel, such as "64 → 3×3 → 64".
        after: the same of what replaced it; "" where nothing changed.
        macs_before: multiply-accumulates for one image.
        macs_after: the same of what replaced it.
        parameters_before: weights and biases.
        parameters_after: the same of what replaced it.
        latency_ms_before: of the layer alone (20th percentile), or None where it was not measured.
        latency_ms_after: the same of what replaced it.
        predicted_error: fraction of its variance, weighted by the Fisher information, that the plan expected to lose.
        measured_error: the same once fitted, with the errors of the layers before it; None where the layer was not
            fitted.
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
    """Cost and accuracy at one of several budgets.

    Attributes:
        share: of the original's cost that is left.
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
class ControlReport:
    """The control, a baseline for comparison: a uniformly thinner network, trained from scratch for as long.

    Attributes:
        ratio: of its channels to the original's.
        epochs: that it was trained for.
        macs: multiply-accumulates for one image.
        parameters: weights and biases.
        latency: for each batch size measured, the timing of the original and of it.
        accuracy: on the test images, from 0 to 1.
    """

    ratio: float
    epochs: int
    macs: int
    parameters: int
    latency: dict[int, tuple[Timing, Timing]]
    accuracy: float


@dataclasses.dataclass(frozen=True)
class NarrowReport:
    """Cost and accuracy of a network before and after narrowing.

    Attributes:
        layers: in the order of the calls, those that cannot be narrowed last.
        macs: multiply-accumulates of all convolutions and fully connected layers for one image, before and after.
        parameters: of the whole model, before and after.
        file_bytes: of its ``state_dict``, before and after.
        latency: for each batch size measured, the timing before and after.
        accuracy: what ``evaluate`` returned for "original", "raw" (narrowed, the layers fitted), "corrected" (BatchNorm
            measured again too, where that helped) and "finetuned", where there was one.
        predicted_loss: sum over the layers of their predicted errors.
        calibration_error: squared distance from the original's output as a fraction of its variance; None in a dry
            run.
        engine: that all times are of, in words.
        error_measured_on: which images, in words; "" where that is not known, or nothing was measured.
        notes: sentences about what was done or left.
        environment: versions, threads and what was measured on.
        curve: the budgets, largest first, where there were several.
        control: the baseline, where one was trained.
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
    control: ControlReport | None = None
    error_measured_on: str = ""
    engine: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NarrowReport":
        """Return the report that `to_dict` wrote, before or after JSON."""
        control = values["control"]
        return cls(
            **{
                **values,
                "layers": tuple(LayerReport(**layer) for layer in values["layers"]),
                **{name: tuple(values[name]) for name in ("macs", "parameters", "file_bytes", "notes")},
                "latency": _timings(values["latency"]),
                "curve": tuple(CurvePoint(**{**p, "latency": _timings(p["latency"])}) for p in values["curve"]),
                "control": control and ControlReport(**{**control, "latency": _timings(control["latency"])}),
            }
        )

    def tables(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """Return the tables with their titles, each with its header first; those without rows are left out."""
        titles = {
            "summary": "The whole",
            "curve": "Several budgets",
            "control": "Beside the control",
            "layers": "Each layer",
        }
        return [(titles[name], rows) for name, rows in self.tables_by_name().items() if rows]

    def tables_by_name(self) -> dict[str, list[tuple[str, ...]]]:
        """Return the rows of each table, its header first; of one that there is nothing to say in, none."""
        return {
            "summary": self._summary_rows(),
            "curve": self._curve_rows(),
            "control": self._control_rows(),
            "layers": self._layer_rows(),
        }

    def _time_label(self, batch: int) -> str:
        """Return the heading of the times at a batch size, with the engine that they are of."""
        return f"ms, batch {batch}{self.engine and f', in {self.engine}'}"

    def _summary_rows(self) -> list[tuple[str, ...]]:
        """Return the costs and the accuracy of the whole."""
        counts = (("MACs", self.macs), ("parameters", self.parameters), ("file, bytes", self.file_bytes))
        rows: list[tuple[str, ...]] = [("", "before", "after", "share or difference")]
        rows += [
            (name, f"{before:,}", f"{after:,}", format_percent(after / max(1, before)))
            for name, (before, after) in counts
        ]
        for batch, (before, after) in self.latency.items():
            ratio = format_percent(after.median_ms / before.median_ms)
            if before.low_ms <= after.high_ms and after.low_ms <= before.high_ms:
                ratio += ", equal within the spread"
            rows.append((self._time_label(batch), _milliseconds(before), _milliseconds(after), ratio))
        original = self.accuracy.get("original")
        for name, value in self.accuracy.items():
            if name != "original" and original is not None:
                difference = f"{100 * (value - original):+.2f} points"
                rows.append((f"accuracy, {STAGES[name]}", _accuracy(original), _accuracy(value), difference))
        if self.calibration_error is not None:
            images = self.error_measured_on and f", on {self.error_measured_on}"
            error = format_percent(self.calibration_error, 2)
            rows.append(("error of the result", "0", error, f"of its variance{images}"))
        return rows

    def _curve_rows(self) -> list[tuple[str, ...]]:
        """Return the costs and the accuracy at each of several budgets."""
        if not self.curve:
            return []
        sizes = list(self.latency)
        before = [_milliseconds(self.latency[n][0]) for n in sizes]
        rows: list[tuple[str, ...]] = [
            ("budget", "MACs", *map(self._time_label, sizes), "accuracy", "error"),
            (format_share(1), f"{self.macs[0]:,}", *before, _accuracy(self.accuracy.get("original")), "0"),
        ]
        for p in self.curve:
            after = [_milliseconds(p.latency[n][1]) for n in sizes]
            error = "" if p.calibration_error is None else format_percent(p.calibration_error, 2)
            accuracy = _accuracy(p.accuracy.get("corrected"))
            rows.append((format_share(p.share), f"{p.macs:,}", *after, accuracy, error))
        return rows

    def _control_rows(self) -> list[tuple[str, ...]]:
        """Return the narrowed network beside the control."""
        c = self.control
        if c is None:
            return []
        sizes = [n for n in self.latency if n in c.latency]
        best = self.accuracy.get("finetuned", self.accuracy.get("corrected"))
        name = f"control: {format_percent(c.ratio, 0)} of the channels, trained {c.epochs} epochs"
        rows: list[tuple[str, ...]] = [("", "MACs", "parameters", *map(self._time_label, sizes), "accuracy")]
        for network, macs, parameters, latency, accuracy in (
            ("narrowed", self.macs[1], self.parameters[1], self.latency, best),
            (name, c.macs, c.parameters, c.latency, c.accuracy),
        ):
            times = (_milliseconds(latency[n][1]) for n in sizes)
            rows.append((network, f"{macs:,}", f"{parameters:,}", *times, _accuracy(accuracy)))
        return rows

    def _layer_rows(self) -> list[tuple[str, ...]]:
        """Return what became of each layer."""
        rows: list[tuple[str, ...]] = [("layer", "before", "after", "MACs", "parameters", "ms", "error", "note")]
        for layer in self.layers:
            ms = ""
            if layer.latency_ms_before is not None and layer.latency_ms_after is not None:
                ms = f"{layer.latency_ms_before:.2f} → {layer.latency_ms_after:.2f}"
            error = format_percent(layer.predicted_error) if layer.after else ""
            if layer.measured_error is not None:
                error += f" → {format_percent(layer.measured_error)}"
            macs = _share_left(layer.macs_before, layer.macs_after)
            count = _share_left(layer.parameters_before, layer.parameters_after)
            rows.append((layer.name, layer.before, layer.after, macs, count, ms, error, layer.reason))
        return rows

    def __str__(self) -> str:
        """Return the tables as text."""
        return "\n\n".join([*(text_table(rows) for _, rows in self.tables()), "\n".join(self.notes)]).rstrip()

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return "".join(html_table(rows) for _, rows in self.tables()) + notes


def format_share(share: float) -> str:
    """Return a budget in percent, with the decimals that it has: 50 %, 62.5 %."""
    return f"{100 * share:.6g} %"


def _accuracy(value: float | None) -> str:
    return "" if value is None else format_percent(value, 2)


def _share_left(before: int, after: int) -> str:
    return format_percent(after / before, 0) if before else ""


def _milliseconds(t: Timing) -> str:
    return f"{t.median_ms:.2f} ({t.low_ms:.2f} to {t.high_ms:.2f})"


def _timings(values: dict[Any, Any]) -> dict[int, tuple[Timing, Timing]]:
    """Return timings by batch size; in JSON the sizes are text."""
    return {int(size): (Timing(**before), Timing(**after)) for size, (before, after) in values.items()}


def chain_notation(chain: tuple[LayerSpec, ...]) -> str:
    """Return the channels and kernels of a chain of layers, such as "64 → 1×1 → 16 → 3×3 → 64"."""
    text = str(chain[0].in_channels)
    for spec in chain:
        kernel = "×".join(map(str, spec.kernel_size)) if spec.kind == "conv" else "dense"
        text += f" → {kernel} → {spec.out_channels}"
    return text


def layer_reports(analysis: Analysis, planned: PlannerResult, measured: dict[str, float]) -> tuple[LayerReport, ...]:
    """Return the reports of the layers that are called, in that order, then of those that cannot be narrowed."""
    plans, reasons = {layer.name: layer for layer in planned.plan.layers}, analysis.reasons
    rows = []
    for name, spec in analysis.specs.items():
        after = planned_layers(spec, plans[name]) if name in plans else (spec,)
        changed = after != (spec,)
        ms_before, ms_after = planned.latency.get(name, (None, None))
        rows.append(
            LayerReport(
                name,
                before=chain_notation((spec,)),
                after=chain_notation(after) if changed else "",
                macs_before=spec.macs,
                macs_after=sum(s.macs for s in after),
                parameters_before=spec.parameters,
                parameters_after=sum(s.parameters for s in after),
                latency_ms_before=ms_before,
                latency_ms_after=ms_after,
                predicted_error=planned.predicted.get(name, 0.0),
                measured_error=measured.get(name),
                reason="" if changed else reasons.get(name, "not worth it at this budget"),
            )
        )
    left = [name for name in reasons if name not in analysis.specs]
    return (*rows, *(LayerReport(n, "", "", 0, 0, 0, 0, None, None, 0.0, None, reasons[n]) for n in left))


def file_bytes(model: nn.Module) -> int:
    """Return the size of a model's weights in a file."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()
