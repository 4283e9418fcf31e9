"""Calls that are timed: in turns, the host's share of them apart, and beside dense."""

from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from sparsifiner.measure import calls
from sparsifiner.measure.calls import CallTimes, compare_calls, kernel_milliseconds, time_calls

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A host and a GPU on which time passes only where a test says so."""
    state = SimpleNamespace(now=0.0, device_is_busy_until=0.0, waits=0)

    def launch(host, device=0.0):
        state.now += host
        state.device_is_busy_until = max(state.device_is_busy_until, state.now) + device

    def wait(device):
        assert device == CUDA
        state.waits += 1
        state.now = max(state.now, state.device_is_busy_until)

    monkeypatch.setattr("time.perf_counter", lambda: state.now / 1e3)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    state.launch = launch
    return state


def test_calls_take_turns_and_warm_up(machine):
    order = []

    def call(name, milliseconds):
        order.append(name)
        machine.launch(milliseconds + len(order))

    functions = {"a": lambda: call("a", 10), "b": lambda: call("b", 100)}
    times = time_calls(functions, runs=2, warmup=1, device=CPU)
    assert order == ["a", "b"] * 3
    assert times["a"].whole == times["a"].host == pytest.approx([13, 15])
    assert times["b"].whole == pytest.approx([104, 106])
    assert machine.waits == 0


def test_the_host_is_done_before_the_device_is(machine):
    machine.device_is_busy_until = 50.0  # with work of others, which is waited for
    times = time_calls({"a": lambda: machine.launch(3, device=20)}, runs=2, warmup=0, device=CUDA)["a"]
    assert times.host == pytest.approx([3, 3])
    assert times.whole == pytest.approx([23, 23])
    assert machine.waits == 4


def test_ratios_and_differences_are_of_rounds():
    dense, sparse = CallTimes([10.0, 20, 30, 40], [1.0] * 4), CallTimes([5.0, 20, 10, 80], [2.0, 3, 4, 9])
    row = compare_calls(sparse, dense, CUDA)
    assert (row["median_ms"], row["host_ms"]) == (15, 3.5)
    # of 2, 1, 3, 0.5
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == pytest.approx((1.5, 0.65, 2.7))
    assert row["difference_ms"] == -2.5  # of -5, 0, -20, 40
    assert row["difference_low_ms"] < -5 < 0 < row["difference_high_ms"]
    assert compare_calls(sparse, dense, CPU)["host_ms"] is None


def test_what_was_not_timed_has_no_figures():
    alone = compare_calls(CallTimes([1.0, 2], [1.0, 2]), None, CPU)
    assert alone["median_ms"] == 1.5
    assert alone["ratio"] is alone["difference_ms"] is None
    assert compare_calls(None, CallTimes([1.0], [1.0]), CPU) == dict.fromkeys(alone)


def test_kernels_are_summed_without_what_merely_names_them(monkeypatch, machine):
    events = [
        SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=False, device_time=2000.0),
        SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=False, device_time=4000.0),
        SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=True, device_time=6000.0),
        SimpleNamespace(device_type=DeviceType.CPU, is_user_annotation=False, device_time=9000.0),
    ]

    class Recorded:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *error):
            pass

    called = []
    monkeypatch.setattr(calls, "profile", Recorded)
    assert kernel_milliseconds(lambda: called.append(1), CUDA) == pytest.approx(6 / len(called))
    assert kernel_milliseconds(lambda: called.append(1), CPU) is None
