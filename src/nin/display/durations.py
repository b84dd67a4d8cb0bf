"""Durations in words."""


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes, or hours and minutes, as far as an estimate is worth.

    Example:
        >>> [duration(s) for s in (0.4, 75, 1000, 5400, 200_000)]
        ['1 s', '75 s', '17 min', '1 h 30 min', '2 d 7 h']
    """
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
