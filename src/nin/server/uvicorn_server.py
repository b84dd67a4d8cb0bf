"""Run the application: bind a socket, start uvicorn, open the browser."""

import errno
import socket
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

import uvicorn

from nin.errors import UserError
from nin.server.app import create_app

# Tried in order where no port was asked for.
FIRST_PORT, PORTS = 8646, 20


def serve(
    run: Path | None = None,
    *,
    beside: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
    device: str = "cpu",
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
        on_start: called with the page's address once it answers.

    Raises:
        UserError: a run folder cannot be read, the runs do not fit, or the port is taken.
    """
    app = create_app(run, beside=beside, host=host, device=device)
    listener = listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)

    listener.listen()  # from here on a browser waits for the server, which is about to start, and is not refused
    if on_start is not None:
        on_start(address)
    if browser:
        # some browsers do not return before they are closed
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket bound to the port, or to the first free one of ours.

    Raises:
        UserError: it is taken, or the host is no address of this machine.
    """
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,)
    for candidate in ports:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, candidate))
        except (OSError, OverflowError) as error:
            listener.close()
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE and candidate != ports[-1]:
                continue
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"cannot listen on {host}, port {candidate}: {reason}") from error
        return listener
    raise AssertionError("there is at least one port to try")
