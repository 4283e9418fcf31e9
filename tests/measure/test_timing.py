"""Timing in turns, and what becomes of candidates that do not run."""

import pytest
import torch

from sparsifiner.measure.candidates import Candidate, time_candidates
from sparsifiner.measure.memory import scratch_bytes
from sparsifiner.measure.timing import Timing, time_in_turns


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.seconds)

    def passes(self, milliseconds):
        self.seconds += milliseconds / 1e3


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_functions_take_turns_and_are_told_apart(clock):
    calls = []

    def slow():
        calls.append("slow")
        clock.passes(20 + len(calls))  # calls 1, 3, 5 and 7 of both functions

    def quick():
        calls.append("quick")
        clock.passes(1)

    times = time_in_turns({"slow": slow, "quick": quick}, runs=3, warmup=1)
    assert calls == ["slow", "quick"] * 4
    slow_ms, quick_ms = ((each.low_ms, each.median_ms, each.high_ms) for each in times.values())
    assert slow_ms == pytest.approx((23.4, 25, 26.6))
    assert quick_ms == pytest.approx((1, 1, 1))
    assert not times["slow"].graph


def test_median_and_tenths_of_known_times(monkeypatch):
    durations = iter([9.0, *range(1, 12)])  # the first is warm-up
    clock = iter(t for duration in durations for t in (0.0, duration / 1e3))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timing = time_in_turns({"one": lambda: None}, runs=11, warmup=1)["one"]
    assert (timing.median_ms, timing.low_ms, timing.high_ms) == pytest.approx((6, 2, 10))


def test_sets_of_inputs_are_taken_in_turn_and_averaged(clock):
    calls = []

    def call(name, milliseconds):
        calls.append(name)
        clock.passes(milliseconds)

    times = time_in_turns({"one": [lambda: call("a", 10), lambda: call("b", 20)]}, runs=2, warmup=0)
    assert calls == ["a", "b"] * 2
    assert times["one"].median_ms == pytest.approx(15)


def test_a_spread_needs_two_measurements():
    with pytest.raises(ValueError, match="runs must be at least 2, got 1"):
        time_in_turns({"one": lambda: None}, runs=1)


def test_memory_is_counted_on_a_gpu_only():
    assert scratch_bytes(lambda: torch.zeros(3), "cpu") is None


class TestCandidates:
    def times(self, monkeypatch, milliseconds):
        """Rows of candidates as if each took what is given."""
        timings = {name: Timing(ms, ms / 2, 100 * ms) for name, ms in milliseconds.items()}
        monkeypatch.setattr(
            "sparsifiner.measure.candidates.time_in_turns",
            lambda functions, **_: {name: timings[name] for name in functions},
        )

    def rows(self, candidates):
        device = torch.device("cpu")
        rows = time_candidates(candidates, runs=2, warmup=0, device=device, label="test")
        return {(row["part"], row["measure"]): row for row in rows}

    def test_the_fastest_dense_candidate_is_the_baseline_of_its_measure(self, monkeypatch):
        calls = [lambda: None]
        self.times(monkeypatch, {"a (x)": 6, "b (x)": 4, "ours (x)": 2, "part (x)": 1, "a (y)": 3})
        rows = self.rows(
            [
                Candidate("a", "x", calls, dense=True),
                Candidate("b", "x", calls, dense=True),
                Candidate("ours", "x", calls, required=True),
                Candidate("part", "x", calls, whole=False),
                Candidate("a", "y", calls, dense=True),
            ]
        )
        assert {row["baseline"] for key, row in rows.items() if key[1] == "x"} == {"b"}
        assert rows["a", "y"]["baseline"] == "a"
        assert rows["ours", "x"]["ratio"] == 4 / 2  # of medians: other percentiles give another
        assert rows["a", "x"]["ratio"] == 4 / 6
        assert rows["b", "x"]["ratio"] == 1
        assert rows["part", "x"]["ratio"] is None

    def test_what_does_not_run_is_left_out_and_named(self, monkeypatch):
        def fail():
            raise RuntimeError("no available kernel\nand a long story")

        self.times(monkeypatch, {"a (x)": 6})
        rows = self.rows(
            [
                Candidate("a", "x", [lambda: None], dense=True),
                Candidate("b", "x", [fail], dense=True),
                Candidate("c", "x", [], why_not="too large"),
            ]
        )
        assert rows["b", "x"]["left_out"] == "no available kernel"
        assert rows["c", "x"]["left_out"] == "too large"
        assert rows["b", "x"]["median_ms"] is rows["c", "x"]["ratio"] is None
        assert rows["a", "x"]["left_out"] is None

    def test_our_own_errors_are_not_hidden(self):
        def fail():
            raise RuntimeError("our kernel")

        with pytest.raises(RuntimeError, match="our kernel"):
            self.rows([Candidate("ours", "x", [fail], required=True)])
