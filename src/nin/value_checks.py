"""Checks of single settings: their type and range, in one line for a person. Importing it does not import PyTorch."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from nin.errors import UserError

# the types whose values count as one, and what they are called
_KINDS: dict[type, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a name"),
}


def check_value(name: str, value: Any, kind: type, is_valid: Callable[[Any], bool], requirement: str) -> Any:
    """Return a setting as a Python value: whole and real numbers are those of NumPy, too, and no truth values.

    Args:
        name: of the setting, for the message.
        value: that was given.
        kind: int, float, bool or str.
        is_valid: whether a value of that type is in range.
        requirement: what it must be, for the message.

    Raises:
        UserError: the type or the value is another.
    """
    is_truth_value = type(value).__name__ in ("bool", "bool_")  # NumPy's too, without importing it
    fits = is_truth_value if kind is bool else isinstance(value, _KINDS[kind][0]) and not is_truth_value
    if not fits:
        raise UserError(f"{name} must be {_KINDS[kind][1]}, got {value!r}")
    if not is_valid(value):
        raise UserError(f"{name} must be {requirement}, got {value}")
    return kind(value)


def check_share(name: str, share: object) -> float:
    """Return a share of the original's cost as a float.

    Raises:
        UserError: it is no number above 0 and below 1.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(f"{name} must be a share of the original's, above 0 and below 1, got {share!r}")
    return float(share)


def check_mean_std(mean: Sequence[float], std: Sequence[float], channels: int | None = None) -> None:
    """Check what images are normalised with; either may be empty, where it is not given.

    Args:
        mean: of each channel.
        std: the same.
        channels: of the images; None where that is not known yet.

    Raises:
        UserError: a value is not finite, a standard deviation is not above 0, or there is not one for each channel.
    """
    for name, values in (("mean", mean), ("std", std)):
        if not all(math.isfinite(value) for value in values):
            raise UserError(f"{name} must be finite, got {', '.join(map(str, values))}")
        if values and channels is not None and len(values) != channels:
            count = "1 number" if channels == 1 else f"{channels} numbers, one for each channel"
            raise UserError(f"{name} must be {count}, got {len(values)}")
    if std and min(std) <= 0:
        raise UserError(f"std must be above 0, got {min(std)}")
    if mean and std and len(mean) != len(std):
        raise UserError(f"mean and std must be as many numbers as each other, got {len(mean)} and {len(std)}")
