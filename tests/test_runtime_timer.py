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


def test_times_that_scatter_are_taken_again(monkeypatch):
    def scattering(high_ms):
        return {"a": timer.Timing(1.0, 1.0, 1.1, 15), "b": timer.Timing(2.0, 2.0, 2.0 * high_ms, 15)}

    attempts = [scattering(3.0), scattering(1.5), scattering(1.1), scattering(1.0)]
    monkeypatch.setattr(timer, "time_interleaved", lambda callables, warmup: attempts.pop(0))
    timings, is_steady = timer.time_until_steady({}, seconds=60)
    assert (timings["b"].high_ms, is_steady) == (2.2, True)
    assert len(attempts) == 1
    attempts[:] = [scattering(3.0), scattering(1.5)]
    timings, is_steady = timer.time_until_steady({}, seconds=-1)
    assert (timings["b"].high_ms, is_steady, len(attempts)) == (6.0, False, 1)
