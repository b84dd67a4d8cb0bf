"""LoadOptions: how images are read from a folder or from shards."""

from dataclasses import dataclass

from nin.errors import UserError
from nin.runtime.progress import ProgressCallback


@dataclass(frozen=True)
class LoadOptions:
    """How to read images; `nin.data.load` documents each field.

    Raises:
        UserError: test_fraction or size is out of range.
    """

    size: int | None = None
    test_fraction: float | None = None
    seed: int = 0
    strict: bool = False
    workers: int | None = None
    memory_limit_bytes: int = 0
    on_progress: ProgressCallback | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise UserError(f"test_fraction: expected a number between 0 and 1, got {self.test_fraction}")
        if self.size is not None and self.size < 1:
            raise UserError(f"size: expected at least 1 pixel, got {self.size}")
