"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# called with what is being done, how much of it is done, and how much there is in all
ProgressCallback = Callable[[str, int, int], None]
