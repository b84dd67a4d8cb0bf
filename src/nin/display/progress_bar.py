"""A progress bar on a terminal, and lines elsewhere."""

import datetime
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from nin.display.pace import Pace

# files and classes have names such as "[red]" and ":cat:", which rich would take for markup
PLAIN_TEXT: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}

# of a log file, so that a long job does not fill it
SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """A progress bar on a terminal; plain lines elsewhere, so that a log stays readable.

    It shows what is being done, how much of it is done, of how much, and the time left. The time goes by the later half
    of this stage's steps: a stage ends where the total becomes another, or fewer steps are done than before.

    Args:
        text: what is being done.
        total: its steps; None where they are known later.
        console: that it is printed on.
        seconds_between_lines: where there is no terminal, at least; a job that takes less prints none.
        percent: show what is done as a percentage: the steps are of no use to people.
    """

    def __init__(
        self,
        text: str,
        total: int | None = None,
        *,
        console: Console,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
        percent: bool = False,
    ) -> None:
        self.console, self.percent = console, percent
        self.text, self.done, self.total = text, 0, total or 0
        self.last_line_s = self.updated_s = time.monotonic()
        self.pace = Pace()  # of this stage
        self.known_left: float | None = None  # as the caller knows it, at the last update
        self.seconds_between_lines = seconds_between_lines
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            _CountColumn(self),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(text, total=total)

    def __enter__(self) -> Self:
        if not self.progress.disable:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.progress.disable:  # before 14.3, rich prints an empty line all the same
            self.progress.stop()

    def update(self, done: int, total: int, text: str | None = None, *, seconds_left: float | None = None) -> None:
        """Show that ``done`` of ``total`` steps are done; ``total`` is 0 where it is not known.

        Args:
            done: steps.
            total: steps.
            text: what is being done.
            seconds_left: where that is known better than by the steps.
        """
        text, now = text or self.text, time.monotonic()
        if total != self.total or done < self.done:
            self.pace = Pace()
            # a new task: rich takes a total of None as one that stays as it was
            self.progress.remove_task(self.task)
            self.task = self.progress.add_task(text, total=total or None)
        self.pace.add(done, now)
        self.done, self.total, self.updated_s, self.known_left = done, total, now, seconds_left
        self.progress.update(self.task, completed=done, description=text)
        if self.progress.disable and now - self.last_line_s > self.seconds_between_lines:
            self.line(": ".join(part for part in (text, self.count_text()) if part))

    def count_text(self) -> str:
        """Return how much is done, of how much, and the time left where it is known."""
        if not self.total:
            return f"{self.done:,}" if self.done else ""
        left = self.seconds_left()
        time_text = "" if left is None else f", {datetime.timedelta(seconds=round(left))} left"
        done = f"{self.done / self.total:.0%}" if self.percent else f"{self.done:,} of {self.total:,}"
        return f"{done}{time_text}"

    def seconds_left(self) -> float | None:
        """Return the seconds until this stage ends; None where that is not known."""
        left, per_step = self.known_left, self.pace.seconds_per_step
        if left is None and self.total and per_step is not None:
            left = (self.total - self.done) * per_step
        return None if left is None else max(0.0, left - (time.monotonic() - self.updated_s))

    def on_progress(self, text: str, done: int, total: int) -> None:
        """Update the bar; this is a `nin.runtime.progress.ProgressCallback`."""
        self.update(done, total, text)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.last_line_s = time.monotonic()
        self.console.print(text)


class _CountColumn(ProgressColumn):
    """Shows `ProgressBar.count_text`, with a time left that goes on between two updates."""

    def __init__(self, bar: ProgressBar) -> None:
        super().__init__(Column(no_wrap=True))
        self.bar = bar

    def render(self, task: Task) -> Text:
        return Text(self.bar.count_text())
