"""The figures of each epoch, as the CSV files of a run folder hold them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from nin.errors import UserError

# Of each epoch's row, what metrics.csv holds: it is the same for every run with the same settings. What the clock
# decides is in timings.csv.
METRICS = ("epoch", "step", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
TIMINGS = ("epoch", "seconds", "images_per_second")


def csv_text(rows: Sequence[dict[str, float]], columns: tuple[str, ...]) -> str:
    """Return the columns of the rows as CSV text with a header line."""
    lines = [[f"{row[c]:.6g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    return "".join(",".join(line) + "\n" for line in [list(columns), *lines])


def read_csv(path: Path) -> tuple[dict[str, float], ...]:
    """Return the rows that `csv_text` wrote; where there is no file, there are none.

    Raises:
        UserError: a line has other columns than the first one, or holds something else than numbers.
    """
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        try:
            rows = list(csv.DictReader(file, strict=True))
            return tuple({str(name): float(value) for name, value in row.items()} for row in rows)
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{path} is damaged: every line must hold one number for each column ({error})") from error
