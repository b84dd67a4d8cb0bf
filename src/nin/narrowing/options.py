"""The options of `nin.narrow` beside the budget."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nin.engines.catalog import check_narrowing_engine
from nin.errors import UserError
from nin.runtime.progress import ProgressCallback
from nin.value_checks import check_share, check_value


@dataclasses.dataclass(frozen=True)
class NarrowOptions:
    """The options of `nin.narrow` beside the budget.

    Attributes:
        thin: prune channels, where the dependency graph shows all layers that give and take them.
        factorise: replace layers by two or three of lower rank.
        passes: times that the images are run through both networks for the reconstruction, at most.
        matching_passes: passes over the images, mixed with each other, in which all weights are fitted together to the
            original's outputs, see `nin.narrowing.function_matching`; as many as take about a minute of one core, or
            none where that is too few, if not given. It is done where it brings the network nearer to the original on
            images left apart.
        renormalise: recalibrate BatchNorm, and keep that where the result comes nearer to the original's.
        revert_slower: for a budget of multiply-accumulates or parameters, give layers that were measured slower than
            before fewer channels, or keep them as they were, where the budget is spent all the same and little more is
            lost. The clock then has a say: without it the same network, images and options give the same plan.
        measure_latency: time the whole model before and after.
        batch: images at a time when measuring; that of the first batch if not given.
        layout: memory layout of the weights: "contiguous", or "channels_last", which is often faster.
        engine: in which layers and the whole model are timed, one that the model will run in: "pytorch" (eager), "nin"
            (`nin.fuse`), "onnxruntime" or "openvino" (both on the CPU in float32). The result is a model of PyTorch all
            the same.
        threads: of the engine while it is timed; as many as PyTorch uses if not given. The rest uses those.
        budgets: more shares of the same budget; the network is narrowed to each of them too, for the report's curve.
        cache: a file that keeps the analysis of the network, so that another budget takes less time, and so that
            an interrupted run goes on where it was; milliseconds of layers are kept in a file beside it.
        dry_run: make the plan only; the result's ``model`` has fresh weights where the plan changes it.
        held_out: batches of other images than those that are fitted to: the report's error of the result is measured on
            them. With fewer than 16 images it is measured on those of the fit, and the report says so.
        on_progress: called with what is being done, the number done, and the number of all, 0 where it is not known; if
            not given, a bar is shown in a notebook and on a terminal.
    """

    thin: bool = True
    factorise: bool = True
    passes: int = 32
    matching_passes: int | None = None
    renormalise: bool = True
    revert_slower: bool = False
    measure_latency: bool = True
    batch: int | None = None
    layout: str = "contiguous"
    engine: str = "pytorch"
    threads: int | None = None
    budgets: tuple[float, ...] = ()
    cache: Path | None = None
    dry_run: bool = False
    held_out: Iterable[Any] = ()
    on_progress: ProgressCallback | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.layout not in ("contiguous", "channels_last"):
            raise ValueError(f"layout must be 'contiguous' or 'channels_last', got {self.layout!r}")
        check_narrowing_engine(self.engine)
        check_value("passes", self.passes, int, lambda x: x >= 1, "at least 1")
        if self.matching_passes is not None:
            check_value("matching_passes", self.matching_passes, int, lambda x: x >= 0, "at least 0")
        for name, value in (("batch", self.batch), ("threads", self.threads)):
            if value is not None:
                check_value(name, value, int, lambda x: x >= 1, "at least 1")
        if isinstance(self.cache, str):
            object.__setattr__(self, "cache", Path(self.cache))
        if not isinstance(self.budgets, Iterable) or isinstance(self.budgets, str):
            raise UserError(f"budgets must be shares of the original's, got {self.budgets!r}")
        for share in self.budgets:
            check_share("budgets", share)
