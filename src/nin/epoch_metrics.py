"""The figures of each epoch as metrics.csv and timings.csv; the range test of the learning rate."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from nin.errors import UserError
from nin.runtime.files import write_atomically

METRICS_FILE, TIMINGS_FILE = "metrics.csv", "timings.csv"
LEARNING_RATE_FILE = "learning_rate.csv"

# The columns of metrics.csv are the same for every run with the same settings; those of timings.csv are the clock's.
METRICS = ("epoch", "step", "learning_rate", "train_loss", "train_accuracy")
# each after "validation_" where images to validate on are set apart, else after "test_"
EVALUATED = ("loss", "accuracy", "balanced_accuracy", "macro_f1")
TIMINGS = ("epoch", "seconds", "images_per_second")


def evaluated_part(row: Mapping[str, float]) -> str:
    """Return which images the figures of an epoch are of: "validation", or "test" where none are set apart."""
    return "validation" if "validation_accuracy" in row else "test"


def save_metrics(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the rows of the epochs into ``metrics.csv`` and ``timings.csv``."""
    part = evaluated_part(rows[0] if rows else {})
    # a training that an older version began has fewer
    evaluated = [name for name in (f"{part}_{figure}" for figure in EVALUATED) if not rows or name in rows[0]]
    for name, columns in ((METRICS_FILE, (*METRICS, *evaluated)), (TIMINGS_FILE, TIMINGS)):
        lines = [[f"{row[c]:.6g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
        write_atomically(folder / name, "".join(",".join(line) + "\n" for line in [list(columns), *lines]))


def save_learning_rate_test(folder: Path, rates: Sequence[float], losses: Sequence[float]) -> None:
    """Write the learning rate and the smoothed loss of each step of a range test into ``learning_rate.csv``."""
    lines = [f"{rate:.6g},{loss:.6g}\n" for rate, loss in zip(rates, losses, strict=True)]
    write_atomically(folder / LEARNING_RATE_FILE, "".join(["learning_rate,loss\n", *lines]))


def read_csv(path: Path) -> tuple[dict[str, float], ...]:
    """Return the rows of a file that a function of this module wrote, none where there is no file.

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
