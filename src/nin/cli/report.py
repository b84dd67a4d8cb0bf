"""`nin report`: write the report of a run folder, or a static copy of the page of `nin serve`."""

import contextlib
from pathlib import Path

from nin import folders
from nin.cli.console import ProgressBar, messages, results
from nin.cli.train import write_report
from nin.errors import UserError


def report(run: Path, /, *, page: Path | None = None, beside: Path | None = None, trust: bool = False) -> None:
    """Write the report of a run folder again.

    Args:
        run: The folder that `nin train` made.
        page: Write into this folder instead a copy of the page of `nin serve`, with some of the run's test images: it
            opens from the disk, or from any web host.
        beside: With --page: another run folder to look at beside it, as for `nin serve`.
        trust: Import the module that the run says its network is made by, where that is somebody's own code.
    """
    if beside is not None and page is None:
        raise UserError("--beside is for the page: nin report RUN --page DIR --beside RUN")
    for folder in (run, beside):
        if folder is not None:
            folders.check_is_run(folder)
    if page is not None:
        folders.check_page(page)
    from nin import models

    with models.trust() if trust else contextlib.nullcontext():
        if page is None:
            results.print(str(write_report(run, None)))
            return
        write_page(run, page, beside)


def write_page(run: Path, page: Path, beside: Path | None) -> None:
    """Write a copy of the page of `nin serve` with a progress bar."""
    from nin import server

    with ProgressBar("Writing the page") as bar:
        index = server.export_page(run, page, beside=beside, on_progress=bar.on_progress)
    size = sum(path.stat().st_size for path in page.rglob("*") if path.is_file())
    messages.print(f"{size / 2**20:.1f} MiB: open index.html in a browser, or put the folder on any web host.")
    results.print(str(index), soft_wrap=True)
