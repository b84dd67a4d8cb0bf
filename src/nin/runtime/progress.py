"""The type of the callback that reports progress."""

from __future__ import annotations

from collections.abc import Callable

# called with (what is being done, number done, number of all)
ProgressCallback = Callable[[str, int, int], None]
