"""The settings of `nin.speed`."""

import dataclasses
from typing import Any

from nin.config import check_seed
from nin.engines.catalog import ENGINES, check_engines
from nin.errors import UserError
from nin.value_checks import check_share, check_value

# Shares that are left in the narrowed forms, where none are given.
SHARES = (0.8, 0.65, 0.5)

# Images of the training part: that layers are fitted to, and that ranges of int8 are measured on. Test images at most.
NARROWING_IMAGES, CALIBRATION_IMAGES, TEST_IMAGES = 512, 128, 2000


@dataclasses.dataclass(frozen=True)
class SpeedSettings:
    """The settings of `speed`; they are documented there."""

    lose: float = 1.0
    batches: tuple[int, ...] = (1,)
    shares: tuple[float, ...] = SHARES
    narrow_by: str = "macs"
    finetune: int = 0
    engines: tuple[str, ...] = tuple(ENGINES)
    threads: int | None = None
    test_images: int = TEST_IMAGES
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges, so that a mistake shows before anything is loaded."""
        check_value("lose", self.lose, float, lambda x: 0 <= x <= 100, "at least 0 and at most 100 points")
        for name in ("batches", "engines"):
            if not getattr(self, name):
                raise UserError(f"{name} must hold at least one, got none")
        for batch in self.batches:
            check_value("batch", batch, int, lambda x: x >= 1, "at least 1")
        for share in self.shares:
            check_share("budgets", share)
        if self.narrow_by not in ("macs", "latency"):
            raise UserError(f"narrow_by must be macs or latency, got {self.narrow_by!r}")
        check_engines(self.engines)
        check_value("finetune", self.finetune, int, lambda x: x >= 0, "at least 0")
        check_value("test_images", self.test_images, int, lambda x: x >= 1, "at least 1")
        if self.threads is not None:
            check_value("threads", self.threads, int, lambda x: x >= 1, "at least 1")
        check_seed(self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}
