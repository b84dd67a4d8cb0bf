"""The result of `nin.speed`: what each combination costs and loses, which is kept, and how sure that is."""

import dataclasses
import math
from typing import Any

from nin.display.numbers import format_bytes
from nin.engines.catalog import ENGINES
from nin.speed_search.combinations import Combination
from nin.speed_search.quality import Quality
from nin.speed_search.runners import Setting
from nin.speed_search.timing import Interval


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a combination.

    Attributes:
        combination: form, number type and engine.
        latency: milliseconds of a call, by images at a time.
        quality: of its answers; None where there is no time either.
        file_bytes: of the files that it needs.
        peak_bytes: the most memory of its process, which has loaded it and answered once at each batch size.
        settings: threads and layout that were the fastest, by images at a time.
        reason: why there are no figures, or only those of the first rounds; else "".
    """

    combination: Combination
    latency: dict[int, Interval] = dataclasses.field(default_factory=dict)
    quality: Quality | None = None
    file_bytes: int = 0
    peak_bytes: int = 0
    settings: dict[int, Setting] = dataclasses.field(default_factory=dict)
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            **dataclasses.asdict(self.combination),
            "latency_ms": {str(n): dataclasses.asdict(i) for n, i in self.latency.items()},
            "quality": None if self.quality is None else dataclasses.asdict(self.quality),
            "file_bytes": self.file_bytes,
            "peak_memory_bytes": self.peak_bytes,
            "settings": {str(n): s.to_dict() for n, s in self.settings.items()},
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Row":
        """Return what `to_dict` gave."""
        return cls(
            Combination(values["form"], values["number"], values["engine"]),
            {int(n): Interval(**i) for n, i in values["latency_ms"].items()},
            None if values["quality"] is None else Quality(**values["quality"]),
            values["file_bytes"],
            values["peak_memory_bytes"],
            {int(n): Setting(**s) for n, s in values["settings"].items()},
            values["reason"],
        )


@dataclasses.dataclass(frozen=True)
class SpeedResult:
    """The result of `nin.speed`; prints as a table.

    Attributes:
        network: its name.
        images: the data set's name.
        labelled: whether accuracy was measured; else agreement with the original.
        lose: points of it that may be lost.
        batches: images at a time; the first one decides.
        rows: of every combination, the original first.
        chosen: the fastest combination within ``lose``; None where there is none.
        control: by images at a time, the original in the rounds and the original once more after them.
        machine: processor, versions, load and date.
        notes: sentences for the user.
    """

    network: str
    images: str
    labelled: bool
    lose: float
    batches: tuple[int, ...]
    rows: tuple[Row, ...]
    chosen: Combination | None
    control: dict[int, tuple[Interval, Interval]]
    machine: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def original(self) -> Row:
        """The original in PyTorch eager, with which all others are compared."""
        return self.rows[0]

    @property
    def winner(self) -> Row | None:
        """The row of the chosen combination."""
        return None if self.chosen is None else self.row(self.chosen)

    def row(self, combination: Combination) -> Row:
        """Return the row of a combination."""
        return next(row for row in self.rows if row.combination == combination)

    def speedup(self, row: Row, batch: int) -> float:
        """Return how many times as fast as the original a combination is."""
        return self.original.latency[batch].median / row.latency[batch].median

    def equals(self, batch: int) -> tuple[Row, ...]:
        """Return the other rows within ``lose`` whose time cannot be told from the chosen one's."""
        winner = self.winner
        if winner is None:
            return ()
        return tuple(
            row
            for row in within(self.rows, self.lose, batch)
            if row is not winner and row.latency[batch].overlaps(winner.latency[batch])
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        control = {
            str(n): {"original": dataclasses.asdict(a), "again": dataclasses.asdict(b)}
            for n, (a, b) in self.control.items()
        }
        return {
            "network": self.network,
            "images": self.images,
            "labelled": self.labelled,
            "lose": self.lose,
            "batches": list(self.batches),
            "rows": [row.to_dict() for row in self.rows],
            "chosen": None if self.chosen is None else dataclasses.asdict(self.chosen),
            "control": control,
            "machine": self.machine,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SpeedResult":
        """Return what `to_dict` gave."""
        control = {
            int(n): (Interval(**pair["original"]), Interval(**pair["again"])) for n, pair in values["control"].items()
        }
        chosen = values["chosen"] and Combination(**values["chosen"])
        changed = {
            "batches": tuple(values["batches"]),
            "rows": tuple(map(Row.from_dict, values["rows"])),
            "chosen": chosen,
            "control": control,
            "notes": tuple(values["notes"]),
        }
        return cls(**{**values, **changed})

    def table(self) -> list[tuple[str, ...]]:
        """Return the table's cells, a header first; the fastest combinations come first."""
        lost = "points lost" if self.labelled else "answers changed"
        header = ["form", "number", "engine"]
        for batch in self.batches:
            header += [f"ms, {batch} at a time", "×"]
        rows = [(*header, *(["accuracy"] if self.labelled else []), lost, "KL", "files", "memory")]
        first = self.batches[0]
        measured = sorted((row for row in self.rows if row.latency), key=lambda row: row.latency[first].median)
        return [*rows, *map(self._cells, measured)]

    def _cells(self, row: Row) -> tuple[str, ...]:
        mark = " ←" if row.combination == self.chosen else " =" if row in self.equals(self.batches[0]) else ""
        cells = [row.combination.form, row.combination.number, ENGINES[row.combination.engine].title + mark]
        for batch in self.batches:
            cells += [format_latency(row.latency[batch]), f"{self.speedup(row, batch):.2f}"]
        quality = row.quality
        assert quality is not None  # of what is timed, the answers are compared first
        if quality.accuracy is not None:
            cells.append(f"{100 * quality.accuracy:.2f} %")
        lost = f"{quality.lost:+.2f} ± {quality.lost_error:.2f}" if self.labelled else f"{quality.lost:.2f} %"
        return (
            *cells,
            lost,
            f"{quality.divergence:.1g}",
            format_bytes(row.file_bytes),
            format_bytes(row.peak_bytes),
        )

    def lines(self) -> list[str]:
        """Return what stands below the table: the choice, what is equal to it, the control, what is missing."""
        first, winner, lines = self.batches[0], self.winner, []
        unit = f"point{'' if self.lose == 1 else 's'} of accuracy" if self.labelled else "% of the answers"
        if winner is None:
            lines.append(f"None loses at most {self.lose:g} {unit}.")
        else:
            lines.append(
                f"← the fastest that loses at most {self.lose:g} {unit}: {winner.combination}, "
                f"{self.speedup(winner, first):.2f} × as fast as the original in PyTorch eager"
            )
            if self.equals(first):
                lines.append("= cannot be told from it: their intervals overlap, and it loses least of them")
        for batch, (before, after) in self.control.items():
            drift = f"{100 * (after.median / before.median - 1):+.1f}".replace("-", "−")
            sure = "within its interval" if before.overlaps(after) else "beyond its interval: take the times with care"
            lines.append(f"control: the original once more, {batch} at a time, differed by {drift} %, {sure}")
        missing: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason:
                missing.setdefault(row.reason, []).append(str(row.combination))
        lines += [f"{'; '.join(names)}: {reason}" for reason, names in missing.items()]
        return [*lines, *self.notes]

    def __str__(self) -> str:
        """Return the table, and what stands below it, as text."""
        from nin.display.tables import text_table

        return "\n".join([text_table(self.table(), left=3), *self.lines()])


def format_latency(interval: Interval) -> str:
    """Return a median and its interval.

    Example:
        >>> format_latency(Interval(12.345, 12.0, 13.0, 9)), format_latency(Interval(0.0123, 0.012, 0.0131, 9))
        ('12.3 (12.0 to 13.0)', '0.0123 (0.0120 to 0.0131)')
    """
    # three digits that count
    decimals = min(5, max(0, 2 - math.floor(math.log10(interval.median)))) if interval.median > 0 else 2
    return f"{interval.median:.{decimals}f} ({interval.low:.{decimals}f} to {interval.high:.{decimals}f})"


def within(rows: tuple[Row, ...], lose: float, batch: int) -> list[Row]:
    """Return the rows that are timed at a batch size and lose no more than so many points."""
    return [row for row in rows if batch in row.latency and row.quality is not None and row.quality.lost <= lose]


def choose(rows: tuple[Row, ...], lose: float, batch: int) -> Combination | None:
    """Return the fastest combination within ``lose``; of those that cannot be told from it, the least lossy."""
    allowed = within(rows, lose, batch)
    if not allowed:
        return None
    fastest = min(allowed, key=lambda row: row.latency[batch].median)
    equal = [row for row in allowed if row.latency[batch].overlaps(fastest.latency[batch])]

    def order(row: Row) -> tuple[float, float]:
        assert row.quality is not None
        return round(row.quality.lost, 2), row.latency[batch].median

    return min(equal, key=order).combination


def pareto(rows: tuple[Row, ...], batch: int) -> list[Row]:
    """Return the rows that no other is faster and loses less than, the fastest first."""
    best: list[Row] = []
    timed = [row for row in rows if batch in row.latency and row.quality is not None]
    for row in sorted(timed, key=lambda row: row.latency[batch].median):
        if not best or _lost(row) < _lost(best[-1]):
            best.append(row)
    return best


def _lost(row: Row) -> float:
    assert row.quality is not None
    return row.quality.lost
