"""Terminal output of every verb: progress and messages on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from nin.display import progress_bar
from nin.display.progress_bar import PLAIN_TEXT
from nin.runtime import torchrun

if TYPE_CHECKING:
    from nin.checkpoint import RunInfo

messages = Console(stderr=True, soft_wrap=True, **PLAIN_TEXT)

# a file or a pipe has no width: 240 columns keep the lines of a table whole
results = Console(width=None if sys.stdout.isatty() else 240, **PLAIN_TEXT)


class ProgressBar(progress_bar.ProgressBar):
    """A progress bar on standard error, see `nin.display.progress_bar`."""

    def __init__(
        self,
        text: str,
        total: int | None = None,
        *,
        seconds_between_lines: float = progress_bar.SECONDS_BETWEEN_LINES,
        percent: bool = False,
    ) -> None:
        super().__init__(text, total, console=messages, seconds_between_lines=seconds_between_lines, percent=percent)


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


def say_if_unfinished(run: Path, info: RunInfo) -> None:
    """Say so where a run is not finished, whose network is used all the same."""
    from nin.checkpoint import unfinished_note

    if note := unfinished_note(run, info):
        messages.print(note)


def print_table(
    rows: Iterable[Sequence[str]], *, left: int | None = None, title: str = "", total: bool = False, middle: int = 0
) -> None:
    """Print a table on standard output.

    Args:
        rows: of cells, the header first.
        left: number of columns flush left, the others are flush right; all are left if not given.
        title: above the table.
        total: whether a line is drawn above the last row.
        middle: number of columns, from the first, whose cells are cut in the middle where the terminal is narrow, so
            that both ends of a path are seen. The others are folded, never cut.
    """
    header, *body = rows
    table = Table(title=title)
    # what the other columns leave of the width; each column has two spaces and a line around it
    widths = [max(cell_len(row[i]) for row in (header, *body)) for i in range(len(header))]
    spare = results.width - sum(min(width, 30) for width in widths[middle:]) - 3 * len(header) - 1
    most = max(16, spare // middle) if middle else 0
    body = [(*(cut_middle(cell, most) for cell in row[:middle]), *row[middle:]) for row in body]
    for i, name in enumerate(header):
        side: Literal["left", "right"] = "left" if left is None or i < left else "right"
        least = min(widths[i], most) if i < middle else None
        table.add_column(name, justify=side, overflow="fold", min_width=least)
    for i, row in enumerate(body):
        if total and i == len(body) - 1:
            table.add_section()
        table.add_row(*row)
    results.print(table)


def fit_columns(rows: Sequence[tuple[str, ...]], less_needed: Iterable[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return a table without the columns that the terminal has no room for, and the headings of these.

    Args:
        rows: of cells, the header first.
        less_needed: headings in the order in which they are left out.
    """
    kept, left_out = list(rows), list[str]()
    for name in less_needed:
        # each column has two spaces and a line around it
        if sum(max(map(cell_len, column)) + 3 for column in zip(*kept, strict=True)) + 1 <= results.width:
            break
        if name in kept[0]:
            index = kept[0].index(name)
            kept = [row[:index] + row[index + 1 :] for row in kept]
            left_out.append(name)
    return kept, left_out


def say_left_out(columns: Sequence[str]) -> None:
    """Say which columns of a table were left out, if any were."""
    if columns:
        names = ", ".join(columns)
        messages.print(f"left out, as the terminal is {results.width} columns wide: {names}; --json has all")


def cut_middle(text: str, most: int) -> str:
    """Return a text of at most so many characters, its middle left out: both ends of a path tell more.

    Example:
        >>> cut_middle("photos/2024/summer/IMG_0001.jpg", 20)
        'photos/20…G_0001.jpg'
    """
    if len(text) <= most:
        return text
    end = most // 2
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def same_command(without: Sequence[str] = ()) -> str:
    """Return the command that this program was started with, as it can be typed again, without some options."""
    return shlex.join(["nin", *(argument for argument in sys.argv[1:] if argument not in without)])


def print_json(value: Any) -> None:
    """Print JSON on standard output, in ASCII: a file's name that is no valid Unicode can be printed, too.

    Where the reader has enough and leaves, such as `head`, the program ends without a word, as rich ends it for tables.
    """
    try:
        print(json.dumps(value, indent=2), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed there
        sys.exit(1)
