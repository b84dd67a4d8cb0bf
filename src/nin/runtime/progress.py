"""The type of the callback that reports progress."""

from collections.abc import Callable

# called with (what is being done, number done, number of all or 0 where it is not known)
ProgressCallback = Callable[[str, int, int], None]


def ignore_progress(what: str, done: int, total: int) -> None:
    """Report nothing: the callback where none is given."""
