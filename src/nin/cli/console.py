"""Terminal output of every verb: progress and messages on standard error, results on standard output."""

import contextlib
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from nin.display import progress_bar
from nin.display.progress_bar import PLAIN_TEXT
from nin.runtime import torchrun

messages = Console(stderr=True, soft_wrap=True, **PLAIN_TEXT)

# a file or a pipe has no width: 240 columns keep the lines of a table whole
results = Console(width=None if sys.stdout.isatty() else 240, **PLAIN_TEXT)


class ProgressBar(progress_bar.ProgressBar):
    """A progress bar on standard error, see `nin.display.progress_bar`."""

    def __init__(
        self, text: str, total: int | None = None, *, seconds_between_lines: float = progress_bar.SECONDS_BETWEEN_LINES
    ) -> None:
        super().__init__(text, total, console=messages, seconds_between_lines=seconds_between_lines)


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
