"""Numbers as people read them."""

import pytest

from nin.display.numbers import format_bytes, format_count, format_percent, format_percent_range


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1_500_000, "1.5 MB"), (1e9, "1.0 GB"), (5e12, "5000.0 GB")]
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (957_386, "957 k"), (2_020_000, "2.02 M"), (12_345_678_901, "12.3 G")]
)
def test_format_count(count, text):
    assert format_count(count) == text


def test_percentages():
    assert format_percent(0.9751) == "97.5 %"
    assert format_percent(0.9751, 2, "_") == "97.51_%"
    assert format_percent_range((0.95, 0.975), 2) == "95.00 to 97.50"
