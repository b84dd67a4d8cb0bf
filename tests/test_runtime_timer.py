"""time_interleaved: in turn, after a warm-up, with honest percentiles."""

import time

import pytest

from nin.runtime import timer


def test_the_calls_take_turns():
    calls = []
    result = timer.time_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=4, warmup=2)
    assert "".join(calls) == "ab" * 6
    assert list(result) == ["a", "b"]
    assert result["a"].runs == 4


def test_median_and_percentiles(monkeypatch):
    clock, durations_ms = [0], iter([1000, 10, 20, 30, 40, 50, 60])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock[0])

    def work():
        clock[0] += next(durations_ms) * 1_000_000

    result = timer.time_interleaved({"work": work}, runs=6, warmup=1)["work"]
    assert result == timer.Timing(median_ms=35, low_ms=20, high_ms=50, runs=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"runs": 1}, "runs must be at least 2, got 1"), ({"warmup": -1}, "warmup must be at least 0, got -1")],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        timer.time_interleaved({}, **options)
