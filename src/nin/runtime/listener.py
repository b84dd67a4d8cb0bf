"""A socket bound to a port; importing it is quick, so that a port that is taken is told before anything is loaded."""

import errno
import socket

from nin.errors import UserError

# Tried in order where no port was asked for.
FIRST_PORT, PORTS = 8646, 20

LAST_PORT = 65_535


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens on the port, or to the first free one of ours.

    Raises:
        UserError: it is taken, or the host is no address of this machine.
    """
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,)
    for candidate in ports:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, candidate))
            listener.listen()  # else another process may bind it as well, and a browser that comes early is refused
        except (OSError, OverflowError) as error:
            listener.close()
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE and candidate != ports[-1]:
                continue
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"cannot listen on {host}, port {candidate}: {reason}") from error
        return listener
    raise AssertionError("there is at least one port to try")
