"""Times calls as whoever makes them meets them: one after the other, launched by the host."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from sparsifiner.measure.records import Row
from sparsifiner.measure.timing import spread_of

Call = Callable[[], object]

_PROFILED_CALLS = 3
_COLUMNS = (
    *("median_ms", "low_ms", "high_ms"),
    *("host_ms", "ratio", "ratio_low", "ratio_high"),
    *("difference_ms", "difference_low_ms", "difference_high_ms"),
)


@dataclass(frozen=True)
class CallTimes:
    """What the calls of one function took, round by round.

    Attributes:
        whole: ms from the call until its result is there, nothing being under way before.
        host: ms until the call returned; on a CPU the same.
    """

    whole: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


def time_calls(
    functions: Mapping[str, Call],
    *,
    runs: int,
    warmup: int,
    device: torch.device,
    label: str | None = None,
) -> dict[str, CallTimes]:
    """Calls functions in turns and waits for each result, so that what else the machine does meets all alike.

    Args:
        functions: what to call, by name.
        runs: rounds that count.
        warmup: rounds before them.
        device: where they compute.
        label: text of a progress bar on a terminal, None for none.

    Returns:
        The times of each function; those of one round have the same index.
    """
    times = {name: CallTimes() for name in functions}
    disabled = True if label is None else None
    for turn in tqdm(range(warmup + runs), desc=label, disable=disabled, leave=False):
        for name, function in functions.items():
            whole, host = _time_call(function, device)
            if turn >= warmup:
                times[name].whole.append(whole)
                times[name].host.append(host)
    return times


def kernel_milliseconds(function: Call, device: torch.device) -> float | None:
    """Sum of the times of all kernels and copies of one call, as the profiler tells them.

    Args:
        function: called a few times.
        device: where it computes.

    Returns:
        The mean over these calls in ms; None on a CPU, which has no kernels.
    """
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(_PROFILED_CALLS):
            function()
        torch.cuda.synchronize(device)
    microseconds = sum(
        event.device_time
        for event in recorded.events()
        # annotations span the kernels of what they name
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    return 1e-3 * float(microseconds) / _PROFILED_CALLS


def compare_calls(own: CallTimes | None, dense: CallTimes | None, device: torch.device) -> Row:
    """Columns of a function's times beside those of dense, called in turns with it.

    Args:
        own: its times, None if it was not timed.
        dense: those of dense, None if it was not timed.
        device: where both computed.

    Returns:
        In ms `median_ms`, the 10th and 90th percentile `low_ms` and `high_ms`, and the median `host_ms` until
        the call returned (None on a CPU, where that is all of it). Of each round by itself, as median and
        percentiles: `ratio`, `ratio_low` and `ratio_high`, dense over its own; `difference_ms`,
        `difference_low_ms` and `difference_high_ms`, what it took longer than dense. What is not known is
        None.
    """
    columns: Row = dict.fromkeys(_COLUMNS)
    if own is None:
        return columns
    columns |= zip(_COLUMNS[:3], spread_of(own.whole), strict=True)
    if device.type == "cuda":
        columns["host_ms"] = median(own.host)
    if dense is not None:
        rounds = list(zip(own.whole, dense.whole, strict=True))
        columns |= zip(_COLUMNS[4:7], spread_of([theirs / ours for ours, theirs in rounds]), strict=True)
        columns |= zip(_COLUMNS[7:], spread_of([ours - theirs for ours, theirs in rounds]), strict=True)
    return columns


def _time_call(function: Call, device: torch.device) -> tuple[float, float]:
    """Milliseconds until the result is there, and until the call returned."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    returned = time.perf_counter()
    if on_gpu:
        torch.cuda.synchronize(device)
    end = time.perf_counter() if on_gpu else returned
    del result  # which is not freed while time is taken
    return 1e3 * (end - start), 1e3 * (returned - start)
