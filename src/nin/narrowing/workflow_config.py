"""The settings of `nin narrow`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nin.config import check_seed
from nin.engines.catalog import check_narrowing_engine
from nin.errors import UserError
from nin.runtime import distributed
from nin.value_checks import check_share, check_value


@dataclasses.dataclass(frozen=True)
class WorkflowConfig:
    """The settings of `nin narrow`.

    Attributes:
        budget: one of "macs", "latency" and "parameters", with the share of the original's that is left.
        budgets: more shares of it, for the report's curve.
        skip: layers to leave alone, by name or pattern.
        images: training images to calibrate with; no labels are used.
        finetune: epochs of distillation from the original network, with the labels; 0 trains nothing.
        control: train the control, a uniformly thinner network, for as long as the original and the narrowed one.
        batch: images at a time when it is timed; those of a calibration batch if not given.
        channels_last: keep the weights in that memory layout, and measure it.
        dry_run: plan only, write nothing but the cache of the analysis.
        seed: chooses the images, their order and their augmentation, as in `TrainConfig`.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1": where everything is computed and timed.
        revert_slower: avoid layers that are measured slower than before, see `NarrowOptions`.
        engine: that is timed, see `NarrowOptions`.
        threads: that it is timed with, see `NarrowOptions`.
        measure_latency: time layers and the whole network for the report; a budget in milliseconds does so anyway.
    """

    budget: Mapping[str, float]
    budgets: tuple[float, ...] = ()
    skip: tuple[str, ...] = ()
    images: int = 512
    finetune: int = 0
    control: bool = False
    batch: int | None = None
    channels_last: bool = False
    dry_run: bool = False
    seed: int = 0
    device: str = "auto"
    revert_slower: bool = False
    engine: str = "pytorch"
    threads: int | None = None
    measure_latency: bool = True

    def __post_init__(self) -> None:
        """Check the ranges, so that a mistake shows before anything is loaded."""
        given = {name: value for name, value in self.budget.items() if value is not None}
        if len(given) != 1:
            raise UserError(f"give one of --latency, --macs and --parameters, got {', '.join(given) or 'none'}")
        for name, value in [*given.items(), *(("budgets", share) for share in self.budgets)]:
            check_share(name, value)
        check_value("images", self.images, int, lambda x: x >= 1, "at least 1")
        check_value("finetune", self.finetune, int, lambda x: x >= 0, "at least 0")
        if distributed.world_size() > 1 and (self.finetune or self.control):
            raise UserError(
                "--finetune and --control train in one process: under torchrun leave them out, or run without torchrun"
            )
        check_seed(self.seed)
        check_narrowing_engine(self.engine)
        if self.batch is not None and self.batch < 1:
            raise UserError(f"batch must be at least 1, got {self.batch}")

    @property
    def layout(self) -> str:
        """The memory layout of the weights, as in `NarrowOptions`."""
        return "channels_last" if self.channels_last else "contiguous"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**dataclasses.asdict(self), "budgets": list(self.budgets), "skip": list(self.skip)}
