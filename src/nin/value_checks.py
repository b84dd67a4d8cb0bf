"""Checks of single settings: their type and range, in one line for a person. Importing it does not import PyTorch."""

import numbers
from collections.abc import Callable
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
