"""What every verb shows with: progress and words on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nin.runtime import distributed
from nin.runtime.formatting import format_percent, format_percent_range

# what is shown is shown as it is: files and classes are called "[red]" and ":cat:" too
AS_IT_IS: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}

words = Console(stderr=True, soft_wrap=True, **AS_IT_IS)

# a file or a pipe has no width: its lines are not broken
results = Console(width=None if sys.stdout.isatty() else 240, **AS_IT_IS)

# A log file gets a line about something that takes long no more often than this.
SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """A progress bar on a terminal; plain lines elsewhere, so that a log stays readable.

    Args:
        total: steps to be done; None where it is known later.
        text: what is being done.
    """

    def __init__(self, text: str, total: int | None = None) -> None:
        self.text, self.total, self.told = text, total, time.monotonic()
        self.task: TaskID | None = None
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=words,
            transient=True,
        )

    def __enter__(self) -> Bar:
        """Start to show."""
        if words.is_terminal:
            self.progress.start()
            self.task = self.progress.add_task(self.text, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self.task is not None:
            self.progress.stop()

    def update(self, done: int, total: int, text: str | None = None) -> None:
        """Say that ``done`` of ``total`` steps are done, or ``done`` steps where the total is not known and 0."""
        text = text or self.text
        if self.task is not None:
            self.progress.update(self.task, completed=done, total=total or None, description=text)
        elif time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            words.print(f"{text}: {done} of {total}" if total else f"{text}: {done}")

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.told = time.monotonic()
        words.print(text)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is not torn; a second one ends the program at once.

    Where torchrun watches, it does not: the terminal and torchrun both pass a Ctrl-C on, and torchrun kills who does
    not end in time.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if distributed.world_size() == 1:
            signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def percent(value: float, interval: Sequence[float]) -> str:
    """Return a share with its interval, in percent."""
    return f"{format_percent(value, 2)} (95 % interval {format_percent_range(interval, 2)})"


def print_json(value: Any) -> None:
    """Print JSON on standard output, in ASCII: a file's name that is no valid Unicode can be written down too."""
    print(json.dumps(value, indent=2))
