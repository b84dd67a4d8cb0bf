"""Choose the engine of a group of layers: as ``NIN_GPU`` says, as measured here, or by a table measured on an H100.

Engines are "triton" (this package's kernels), "cudnn" (PyTorch's convolutions) and "cublas" (PyTorch's matrix products,
forward, where pixels are rows).
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from nin.errors import UserError
from nin.ops.gpu import h100_timings, timing_cache
from nin.ops.gpu.problem import ChainProblem


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an environment variable may ask for.

    Attributes:
        variable: its name.
        values: the possible ones.
        default: where it is not set.
    """

    variable: str
    values: tuple[str, ...]
    default: str

    def read(self) -> str:
        """Return the value now.

        Raises:
            UserError: it is none of the possible ones.
        """
        value = os.environ.get(self.variable, self.default)
        if value not in self.values:
            *others, last = self.values
            raise UserError(f"{self.variable} must be {', '.join(others)} or {last}, got {value!r}")
        return value


ENGINE = Setting("NIN_GPU", ("auto", "triton", "reference"), default="auto")
# by the table, measured within a second, measured without a limit
TUNING = Setting("NIN_GPU_TUNE", ("0", "1", "full"), default="1")
LIBRARY = "cudnn"
TABLE = "table (H100)"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The engine of a group of layers, and why it.

    Attributes:
        engine: "triton", "cudnn" or "cublas".
        source: "measured", "table (H100)", or what forced it.
        microseconds: of each engine that was measured, or that the table expects.
        tiles: the tiles to take, as text, by kernel.
    """

    engine: str
    source: str
    microseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    tiles: dict[str, str] = dataclasses.field(default_factory=dict)

    def figures(self) -> str:
        """Return the choice and its reason in a line.

        Example:
            >>> from nin.ops.gpu.engine_choice import Choice
            >>> Choice("triton", "measured", {"triton": 177.0, "cudnn": 828.0}).figures()
            'triton 177 µs, cudnn 828 µs, measured'
        """
        others = sorted(self.microseconds.items(), key=lambda item: (item[0] != self.engine, item[1]))
        return ", ".join([*([f"{name} {us:.0f} µs" for name, us in others] or [self.engine]), self.source])


# measures the engines of a group: returns their times, the tiles chosen, and what was left out for want of time
Measure = Callable[[], tuple[dict[str, float], dict[str, str], list[str]]]

MAX_SHOWN = 3
_chosen: dict[str, Choice] = {}  # the latest choices of this process, for `mode_summary`

# (problem, backward, engine) that failed here, so that the library takes their place
_unavailable: set[tuple[ChainProblem, bool, str]] = set()


def exclude(problem: ChainProblem, *, backward: bool, engine: str = "triton") -> None:
    """Have an engine not chosen again for a problem: it does not compile there, or does not fit."""
    _unavailable.add((problem, backward, engine))


def choose(problem: ChainProblem, *, backward: bool, platform: str = "", measure: Measure | None = None) -> Choice:
    """Choose the engine of a group of layers.

    Args:
        problem: of the group.
        backward: whether its gradients are to be computed.
        platform: the GPU and the versions, that a measurement holds for; without one, none is looked for.
        measure: measures the engines now; None where that is not possible.
    """
    name, timing = "", None
    # a symbolic number of pixels has the engine of the table, for the number that it is traced with
    if platform and isinstance(problem.pixels, int):
        name = f"{'backward' if backward else 'forward'} {problem.name()}"
        if TUNING.read() != "0":
            timing = timing_cache.read_timing(platform, name)
    if not problem.uses_matrix_units and TUNING.read() != "full":
        measure = None  # compiling one such kernel took 42 s, and it would hardly win
    available = (problem, backward, "triton") not in _unavailable
    wanted = timing is None or (TUNING.read() == "full" and timing["left_out"])
    if wanted and measure is not None and available and problem.engine == "auto":
        microseconds, tiles, left_out = measure()
        if microseconds:
            fastest = min(microseconds, key=microseconds.__getitem__)
            timing = {"fastest": fastest, "us": microseconds, "tiles": tiles, "left_out": left_out}
            timing_cache.keep_timing(platform, name, timing)
    choice = _choice(problem, timing, available=available, backward=backward)
    if name:
        _chosen.pop(name, None)
        _chosen[name] = choice
        while len(_chosen) > MAX_SHOWN:
            _chosen.pop(next(iter(_chosen)))
    return choice


def _choice(problem: ChainProblem, timing: dict[str, Any] | None, *, available: bool, backward: bool) -> Choice:
    """Return the choice by what is known: whether the kernels are to be had, and what was measured."""
    if not available:
        return Choice(LIBRARY, "no kernel fits")
    if problem.engine == "triton":
        return Choice("triton", f"{ENGINE.variable}=triton", tiles=timing["tiles"] if timing else {})
    if timing is not None:
        return Choice(timing["fastest"], "measured", timing["us"], timing["tiles"])
    if not problem.uses_matrix_units:
        return Choice(LIBRARY, "float32 without TF32")
    expected = h100_timings.estimate_us(problem, backward=backward)
    return Choice(min(expected, key=expected.__getitem__, default=LIBRARY), TABLE, expected)


def mode_summary() -> str:
    """Return how engines are chosen, and the latest choices of this process, for ``nin.backends()``."""
    how = {"0": f"by a {TABLE}", "1": "as timed here", "full": "as timed here, all tiles"}[TUNING.read()]
    latest = "".join(f"; {name}: {choice.figures()}" for name, choice in _chosen.items())
    return f"nin Triton kernels, cuDNN or cuBLAS, whichever is fastest {how}{latest}"
