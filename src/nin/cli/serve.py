"""`nin serve`: serve the lesson and a run's page over HTTP."""

import contextlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import nin
from nin import folders
from nin.cli.console import messages, say_if_unfinished
from nin.errors import UserError
from nin.runtime.listener import LAST_PORT, listen


def serve(
    run: Path | None = None,
    /,
    *,
    beside: Path | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    browser: Annotated[bool, Parameter(negative=None)] = True,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Open the page where you look inside a 1×1 convolution, and inside your own network; with an HTTP API.

    Args:
        run: The folder that `nin train` made. Without it there is the lesson alone.
        beside: Another run folder of the same classes, such as the one that `nin narrow` made, to look at side by
            side.
        port: To listen on. 8646, or the next one that is free, if not given; 0 takes any.
        host: The address to listen on. The default is reached from this machine only.
        browser: Open the page in the browser.
        device: Where to compute: cpu, cuda, cuda:1, mps, or auto for a GPU where there is one.
        trust: Import the module that the run says its network is made by, where that is somebody's own code.
    """
    if beside is not None and run is None:
        raise UserError("--beside needs a run to be beside of: nin serve RUN --beside RUN")
    for folder in (run, beside):
        if folder is not None and not folder.is_dir():
            raise UserError(f"there is no folder {folder}. A run is made with: nin train DATA --out RUN")
        if folder is not None and not any(
            (folder / name).exists() for name in (folders.STATE_FILE, folders.PROGRESS_FILE)
        ):
            folders.check_is_run(folder)  # one that has begun is served as soon as it has a network
    if port is not None and not 0 <= port <= LAST_PORT:
        raise UserError(f"port must be 0 to {LAST_PORT}, got {port}")
    with contextlib.closing(listen(host, port)) as listener:
        from nin import server  # imports PyTorch, which what is wrong above need not wait for
        from nin.checkpoint import load_info
        from nin.runtime.device import choose_device
        from nin.server.training_status import is_begun

        choose_device(device)
        for folder in (run, beside):
            if folder is not None and not is_begun(folder):
                say_if_unfinished(folder, load_info(folder))
        messages.print("Loading …")

        def show_address(address: str) -> None:
            runs = " beside ".join(str(folder) for folder in (run, beside) if folder is not None)
            what = f"the lesson, and {runs} to look inside" if runs else "the lesson"
            if address.endswith("training"):
                what = f"the curves of {run}, which is not finished; beside them {what}"
            messages.print(
                f"{address}  {what}. The HTTP API is described at {address.removesuffix('training')}api. "
                "Ctrl-C ends it."
            )

        with nin.models.trust() if trust else contextlib.nullcontext():
            server.serve(
                run, beside=beside, host=host, browser=browser, device=device, listener=listener, on_start=show_address
            )
