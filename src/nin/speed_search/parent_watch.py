"""Ends a process with the program that started it, whatever either is doing: its standard input is closed then."""

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def lifeline() -> Iterator[int]:
    """Yield a standard input for a process that calls `watch_parent`: it ends with the block, or with this program."""
    read, write = os.pipe()
    try:
        yield read
    finally:
        os.close(read)
        os.close(write)


def watch_parent() -> "queue.SimpleQueue[str]":
    """Return the lines of standard input as they come, and end this process where there are no more.

    To be called before anything that takes time is imported: a program that was killed before is noticed all the same.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    return lines


def _read(lines: "queue.SimpleQueue[str]") -> None:
    # not by sys.stdin, whose lock a thread that waits would hold when Python ends
    rest = b""
    while chunk := os.read(0, 65536):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            lines.put(line.decode())
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():  # a compiler that it has started, too
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
