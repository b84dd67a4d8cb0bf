"""Numbers as people read them: percentages, counts and bytes."""

from collections.abc import Sequence


def format_percent(fraction: float, decimals: int = 1, space: str = " ") -> str:
    """Return a fraction of 1 in percent.

    Example:
        >>> format_percent(0.9751, 2)
        '97.51 %'
    """
    return f"{100 * fraction:.{decimals}f}{space}%"


def format_percent_range(interval: Sequence[float], decimals: int = 1) -> str:
    """Return both ends of an interval of fractions in percent, without the sign: 95.0 to 97.5."""
    low, high = interval
    return f"{100 * low:.{decimals}f} to {100 * high:.{decimals}f}"


def format_count(number: int, space: str = " ") -> str:
    """Return a count with three digits: 222 M for 222,486,528."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            decimals = max(0, 3 - len(str(number // 10**power)))
            return f"{number / 10**power:,.{decimals}f}{space}{unit}"
    return str(number)


def format_number_of(number: int, noun: str) -> str:
    """Return a number of things, with the noun's regular plural.

    Example:
        >>> format_number_of(1, "image"), format_number_of(1234, "image")
        ('1 image', '1,234 images')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shorten(text: str, most: int = 80) -> str:
    """Return a text of at most so many characters, its end left out.

    Example:
        >>> shorten("Network in Network", 8)
        'Network…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def format_bytes(count: float) -> str:
    """Return a number of bytes: 1.5 MB for 1,500,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
