"""Run the application: start uvicorn on a socket, open the browser."""

import socket
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

import uvicorn

from nin.checkpoint import load_info
from nin.runtime.listener import listen
from nin.server.app import create_app
from nin.server.training_status import is_begun, is_unfinished


def serve(
    run: Path | None = None,
    *,
    beside: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
    device: str = "cpu",
    listener: socket.socket | None = None,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serve the page and the HTTP API until Ctrl-C.

    Args:
        run: the folder that `nin.train` made; None serves the lesson alone.
        beside: another one to look at beside it.
        host: the address to listen on. Other machines reach it only where this is not a loopback address.
        port: to listen on; 0 takes any that is free. The default is 8646, or the next one that is free.
        browser: whether to open the page.
        device: where to compute.
        listener: a socket that is bound already, in place of host and port.
        on_start: called with the page's address once it answers.

    Raises:
        UserError: a run folder cannot be read, the runs do not fit, or the port is taken.
    """
    # what is quickly found wrong is said before a network is loaded
    for folder in (run, beside):
        if folder is not None and not is_begun(folder):
            load_info(folder)
    listener = listen(host, port) if listener is None else listener
    try:
        app = create_app(run, beside=beside, host=host, device=device)
    except BaseException:
        listener.close()
        raise
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)

    if run is not None and is_unfinished(run):
        address += "training"
    if on_start is not None:
        on_start(address)
    if browser:
        # some browsers do not return before they are closed
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    uvicorn.Server(config).run(sockets=[listener])
