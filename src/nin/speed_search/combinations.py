"""The combinations that `nin.speed` compares: a form of the network, a number type and an engine."""

import dataclasses

from nin.engines.catalog import ENGINES

ORIGINAL = "original"


@dataclasses.dataclass(frozen=True)
class Combination:
    """A form of the network, a number type and an engine.

    Attributes:
        form: "original", or "narrowed 0.65" for a network of which that share of the multiplications is left,
            "narrowed 0.65 latency" of the time.
        number: "float32", "bfloat16" or "int8".
        engine: a name in `ENGINES`. With "nin" the network is one of `nin.fuse`.
    """

    form: str
    number: str
    engine: str

    @property
    def key(self) -> str:
        """A name that a file may have."""
        return f"{self.form}-{self.number}-{self.engine}".replace(" ", "-")

    def __str__(self) -> str:
        """Return the three in words."""
        return f"{self.form}, {self.number}, {ENGINES[self.engine].title}"


# what every other combination is compared with
REFERENCE = Combination(ORIGINAL, "float32", "eager")


def narrowed_form(share: float, narrow_by: str) -> str:
    """Return the name of a form with that share of the original's multiplications, or of its latency."""
    return f"narrowed {share:g}" if narrow_by == "macs" else f"narrowed {share:g} {narrow_by}"
