"""Progress of long work that is started from Python: a bar in a notebook or on a terminal, unless somebody shows it."""

import contextlib
import html
import time
from collections.abc import Iterator
from typing import Any

from nin.runtime import torchrun
from nin.runtime.progress import ProgressCallback, ignore_progress

# A notebook's page needs no more.
SECONDS_BETWEEN_UPDATES = 0.5


@contextlib.contextmanager
def shown_progress(text: str, on_progress: ProgressCallback | None) -> Iterator[ProgressCallback]:
    """Yield the callback that is given, or one that shows the progress in a notebook or on a terminal.

    Args:
        text: what is being done, until the work says more.
        on_progress: the callback, or None.
    """
    if on_progress is not None or torchrun.rank() > 0:
        yield on_progress or ignore_progress
        return
    from rich.console import Console  # takes a moment, which whoever brings a callback is spared

    from nin.display.progress_bar import PLAIN_TEXT, ProgressBar

    console = Console(stderr=True, soft_wrap=True, **PLAIN_TEXT)
    bar = ProgressBar(text, console=console)
    if console.is_jupyter:
        notebook = _NotebookBar(bar)
        yield notebook.update
        notebook.clear()
    elif console.is_terminal:
        with bar:
            yield bar.on_progress
    else:
        yield ignore_progress


class _NotebookBar:
    """A bar under a notebook's cell, which is gone when the work is done.

    Not rich's, which needs ipywidgets in a notebook, and shows nothing without.

    Args:
        bar: counts, and says the time that is left; it is not shown itself.
    """

    def __init__(self, bar: Any) -> None:
        from IPython.display import HTML, display  # a notebook has it

        self.bar, self.html, self.shown_at = bar, HTML, 0.0
        self.handle: Any = display(HTML(""), display_id=True)

    def update(self, what: str, done: int, total: int) -> None:
        """Show how much is done, at most twice a second."""
        self.bar.on_progress(what, done, total)
        if time.monotonic() - self.shown_at < SECONDS_BETWEEN_UPDATES:
            return
        self.shown_at = time.monotonic()
        counts = f'max="{total}" value="{done}"' if total else ""
        line = f'<progress {counts} style="width: 20em"></progress> {html.escape(what)} {self.bar.count_text()}'
        self.handle.update(self.html(line))

    def clear(self) -> None:
        """Leave nothing."""
        self.handle.update(self.html(""))
