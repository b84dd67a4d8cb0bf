"""Terminal output of every verb: progress and messages on standard error, results on standard output."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

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

    Args:
        text: what is being done.
        total: its steps; None where they are known later.
        seconds_between_lines: where there is no terminal, at least; a job that takes less prints none.
    """

    def __init__(
        self, text: str, total: int | None = None, *, seconds_between_lines: float = SECONDS_BETWEEN_LINES
    ) -> None:
        self.text, self.last_line_s = text, time.monotonic()
        self.seconds_between_lines = seconds_between_lines
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=messages,
            transient=True,
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
        text = text or self.text
        self.progress.update(self.task, completed=done, total=total or None, description=text)
        if self.progress.disable and time.monotonic() - self.last_line_s > self.seconds_between_lines:
            self.line(f"{text}: {done} of {total}" if total else f"{text}: {done}")

    def on_progress(self, text: str, done: int, total: int) -> None:
        """Update the bar; this is a `nin.runtime.progress.ProgressCallback`."""
        self.update(done, total, text)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.last_line_s = time.monotonic()
        messages.print(text)


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
