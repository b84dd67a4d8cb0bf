"""Terminal output of every verb: progress and messages on standard error, results on standard output."""

import contextlib
import datetime
import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from nin.runtime import torchrun

# files and classes have names such as "[red]" and ":cat:", which rich would take for markup
PLAIN_TEXT: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}

messages = Console(stderr=True, soft_wrap=True, **PLAIN_TEXT)

# a file or a pipe has no width: 240 columns keep the lines of a table whole
results = Console(width=None if sys.stdout.isatty() else 240, **PLAIN_TEXT)

# of a log file, so that a long job does not fill it
SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """A progress bar on a terminal; plain lines elsewhere, so that a log stays readable.

    It shows what is being done, how much of it is done, of how much, and the time left. The time is that of the steps
    of this stage so far: a stage ends where the total becomes another, or fewer steps are done than before.

    Args:
        text: what is being done.
        total: its steps; None where they are known later.
        seconds_between_lines: where there is no terminal, at least; a job that takes less prints none.
    """

    def __init__(
        self, text: str, total: int | None = None, *, seconds_between_lines: float = SECONDS_BETWEEN_LINES
    ) -> None:
        self.text, self.done, self.total = text, 0, total or 0
        self.last_line_s = self.updated_s = time.monotonic()
        self.stage_start: tuple[int, float] | None = None  # steps done and time at its first update
        self.seconds_between_lines = seconds_between_lines
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            _CountColumn(self),
            console=messages,
            transient=True,
            expand=True,
            disable=not messages.is_terminal,
        )
        self.task = self.progress.add_task(text, total=total)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, done: int, total: int, text: str | None = None) -> None:
        """Show that ``done`` of ``total`` steps are done; ``total`` is 0 where it is not known."""
        text, now = text or self.text, time.monotonic()
        if total != self.total or done < self.done:
            self.stage_start = None
            # a new task: rich takes a total of None as one that stays as it was
            self.progress.remove_task(self.task)
            self.task = self.progress.add_task(text, total=total or None)
        self.stage_start = self.stage_start or (done, now)
        self.done, self.total, self.updated_s = done, total, now
        self.progress.update(self.task, completed=done, description=text)
        if self.progress.disable and now - self.last_line_s > self.seconds_between_lines:
            self.line(f"{text}: {self.count_text()}")

    def count_text(self) -> str:
        """Return how much is done, of how much, and the time left where it is known."""
        if not self.total:
            return f"{self.done:,}" if self.done else ""
        left = self.seconds_left()
        time_text = "" if left is None else f", {datetime.timedelta(seconds=round(left))} left"
        return f"{self.done:,} of {self.total:,}{time_text}"

    def seconds_left(self) -> float | None:
        """Return the seconds until this stage ends, at its pace so far; None where that is not known."""
        if not self.total or self.stage_start is None:
            return None
        steps, seconds = self.done - self.stage_start[0], self.updated_s - self.stage_start[1]
        if steps <= 0:
            return None
        return max(0.0, (self.total - self.done) * seconds / steps - (time.monotonic() - self.updated_s))

    def on_progress(self, text: str, done: int, total: int) -> None:
        """Update the bar; this is a `nin.runtime.progress.ProgressCallback`."""
        self.update(done, total, text)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.last_line_s = time.monotonic()
        messages.print(text)


class _CountColumn(ProgressColumn):
    """Shows `ProgressBar.count_text`, with a time left that goes on between two updates."""

    def __init__(self, bar: ProgressBar) -> None:
        super().__init__(Column(no_wrap=True))
        self.bar = bar

    def render(self, task: Task) -> Text:
        return Text(self.bar.count_text())


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[list[int]]:
    """Yield a list that SIGINT and SIGTERM are added to, so that the work stops between two steps.

    A second signal ends the program at once. Not under torchrun: the terminal sends a Ctrl-C to each process and
    torchrun sends it again, and torchrun kills a process that does not end in time. A KeyboardInterrupt that follows
    SIGTERM becomes the shell's exit status for it, 143.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if torchrun.world_size() == 1:
            signal.signal(number, handlers[signal.Signals(number)])

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, receive)
    try:
        yield received
    except KeyboardInterrupt:
        if received[:1] == [signal.SIGTERM]:
            sys.exit(128 + signal.SIGTERM)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def silence_other_ranks() -> None:
    """Print from the first of the processes that torchrun started only."""
    if torchrun.rank() > 0:
        messages.quiet = results.quiet = True


def print_table(
    rows: Iterable[Sequence[str]], *, left: int | None = None, title: str = "", total: bool = False
) -> None:
    """Print a table on standard output.

    Args:
        rows: of cells, the header first.
        left: number of columns flush left, the others are flush right; all are left if not given.
        title: above the table.
        total: whether a line is drawn above the last row.
    """
    header, *body = rows
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if left is None or i < left else "right")
    for i, row in enumerate(body):
        if total and i == len(body) - 1:
            table.add_section()
        table.add_row(*row)
    results.print(table)


def print_json(value: Any) -> None:
    """Print JSON on standard output, in ASCII: a file's name that is no valid Unicode can be printed, too."""
    print(json.dumps(value, indent=2))
