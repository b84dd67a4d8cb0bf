"""What a training prints: lines for a terminal or a log, and the same in a notebook or a terminal from Python."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from nin.display.durations import duration
from nin.display.numbers import format_number_of, format_percent
from nin.epoch_metrics import evaluated_part
from nin.runtime import torchrun
from nin.training.progress import TrainProgress

# A hundred short epochs get so many lines.
EPOCH_LINES = 20

# An end that is nearer is not announced.
SECONDS_WORTH_SAYING = 30.0

# The expected end is said again where it has moved by more than this share of the time that is left.
MOVED = 0.25

# Before an epoch has ended, the end is estimated after so many seconds.
SECONDS_TO_ESTIMATE = 60.0

# A notebook's page needs no more.
SECONDS_BETWEEN_UPDATES = 0.5


class ProgressLines:
    """The lines of one training: its size, its expected end, its epochs, and what else should be known."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.said_end: float | None = None  # in seconds of the monotonic clock

    def text(self, p: TrainProgress) -> str:
        """Return what stands beside the bar, which says the steps and the time that is left."""
        return p.phase or f"epoch {p.epoch}/{p.epochs}  loss {p.loss:.3f}"

    def after(self, p: TrainProgress) -> list[str]:
        """Return the lines that are to be printed now."""
        lines: list[str] = []
        if p.phase:
            return lines
        if self.started is None:
            self.started = time.monotonic()
            if p.steps > 1:  # else the class layer alone is fitted
                lines.append(_size_text(p))
        is_last = p.step == p.steps
        if p.row and (p.epoch % max(1, p.epochs // EPOCH_LINES) == 0 or is_last):
            part = evaluated_part(p.row)
            lines.append(
                f"epoch {p.epoch:3d}/{p.epochs}  train loss {p.row['train_loss']:.3f}  "
                f"{part} accuracy {format_percent(p.row[f'{part}_accuracy'], 2)}  {p.row['seconds']:.0f} s"
            )
        if p.seconds_left is not None and not is_last:
            lines += self._expected_end(p.epochs, p.seconds_left, has_row=p.row is not None)
        if p.note:
            lines.append(f"epoch {p.epoch:3d}/{p.epochs}  {p.note}")
        return lines

    def _expected_end(self, epochs: int, seconds_left: float, *, has_row: bool) -> list[str]:
        """Return a line with the expected end where it is not said yet, or has become another after an epoch."""
        now = time.monotonic()
        end, is_near = now + seconds_left, seconds_left <= SECONDS_WORTH_SAYING
        if self.said_end is None:
            if not has_row and (self.started is None or now - self.started <= SECONDS_TO_ESTIMATE):
                return []
            self.said_end = end
            return [] if is_near else [f"All {epochs} epochs are expected to end {end_text(seconds_left)}"]
        moved = abs(end - self.said_end)
        if not has_row or moved <= max(SECONDS_WORTH_SAYING, MOVED * seconds_left):
            return []
        self.said_end = end
        return [f"The end is now expected {end_text(seconds_left)}"]


def _size_text(p: TrainProgress) -> str:
    """Return how large a training is, and where it goes on, from its first progress."""
    steps = p.steps // p.epochs
    text = f"{format_number_of(p.epochs, 'epoch')} of {format_number_of(steps, 'step')}"
    if p.step < 2:
        return text
    if p.row is not None:  # it was stopped between the last step of an epoch and its test
        return f"{text}; going on after epoch {p.epoch} of {p.epochs}"
    of_epoch = (p.step - 1) % steps  # done before this session
    after = f", after step {of_epoch:,} of it" if of_epoch else ""
    return f"{text}; going on in epoch {p.epoch} of {p.epochs}{after}"


def end_text(seconds_left: float) -> str:
    """Return when something ends, such as "in 20 min, at 16:40"."""
    end = time.localtime(time.time() + seconds_left)
    is_today = end[:3] == time.localtime()[:3]
    return f"in {duration(seconds_left)}, at {time.strftime('%H:%M' if is_today else '%H:%M on %A, %d %B', end)}"


@contextlib.contextmanager
def shown_progress(
    progress: bool | None, on_progress: Callable[[TrainProgress], None] | None
) -> Iterator[Callable[[TrainProgress], None]]:
    """Yield a callback that shows a training in a notebook or on a terminal, and calls another one.

    Args:
        progress: whether to show it; None shows it in a notebook and on a terminal, and nowhere else, and not where
            there is another callback. True prints lines where there is neither.
        on_progress: the other callback.
    """
    if torchrun.rank() > 0 or progress is False or (progress is None and on_progress is not None):
        yield on_progress or (lambda p: None)
        return
    from rich.console import Console  # takes a moment, which a silent training is spared

    from nin.display.progress_bar import PLAIN_TEXT, ProgressBar

    console = Console(stderr=True, soft_wrap=True, **PLAIN_TEXT)
    if console.is_jupyter:
        yield _both(NotebookProgress().show, on_progress)
    elif progress or console.is_terminal:
        lines = ProgressLines()
        with ProgressBar("Training", console=console) as bar:

            def show(p: TrainProgress) -> None:
                for line in lines.after(p):
                    bar.line(line)
                bar.update(p.step, p.steps, lines.text(p), seconds_left=p.seconds_left)

            yield _both(show, on_progress)
    else:
        yield on_progress or (lambda p: None)


def _both(
    first: Callable[[TrainProgress], None], second: Callable[[TrainProgress], None] | None
) -> Callable[[TrainProgress], None]:
    def call(p: TrainProgress) -> None:
        first(p)
        if second is not None:
            second(p)

    return call


class NotebookProgress:
    """A bar under a notebook's cell, which is updated, and the lines above it.

    Not rich's, which needs ipywidgets in a notebook, and shows nothing without.
    """

    def __init__(self) -> None:
        from IPython.display import HTML, display  # a notebook has it

        self.lines, self.html = ProgressLines(), HTML
        self.printed: list[str] = []
        self.shown_at = time.monotonic()
        self.handle: Any = display(HTML(""), display_id=True)

    def show(self, p: TrainProgress) -> None:
        """Update the bar, at most twice a second, and with every new line."""
        lines = self.lines.after(p)
        self.printed += lines
        if not lines and time.monotonic() - self.shown_at < SECONDS_BETWEEN_UPDATES:
            return
        self.shown_at = time.monotonic()
        text = "<br>".join(line.replace("&", "&amp;").replace("<", "&lt;") for line in self.printed)
        bar = f'<progress max="{p.steps}" value="{p.step}" style="width: 20em"></progress>'
        left = "" if p.seconds_left is None else f", {duration(p.seconds_left)} left"
        self.handle.update(self.html(f'<pre style="margin: 0">{text}</pre>{bar} {self.lines.text(p)}{left}'))
