"""Milliseconds, compared fairly: in one run, in turns, medians with spread."""

import copy
import functools
import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

# Written before each measurement on a GPU: more than its caches hold, long enough for the host to be ahead.
_FLUSH_BYTES = 256 * 2**20
# Calls before a capture: kernels compile, libraries choose theirs.
_CALLS_BEFORE_CAPTURE = 3

_Interval = tuple[torch.cuda.Event, torch.cuda.Event]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Time of one call of one function.

    Attributes:
        median_ms: median over the runs, in ms.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        graph: its kernels were replayed as a CUDA graph, so that launching them does not count.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    graph: bool = False

    def __str__(self) -> str:
        return f"{self.median_ms:.1f} ms ({self.low_ms:.1f} to {self.high_ms:.1f})"


def time_in_turns(
    functions: Mapping[str, Callable[[], object] | Sequence[Callable[[], object]]],
    *,
    runs: int = 15,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    graphs: bool = False,
    label: str | None = None,
) -> dict[str, Timing]:
    """Times functions round by round, so that whatever else the machine does meets all alike.

    On a GPU a measurement lies between two events, and its caches are overwritten before it.

    Args:
        functions: what to time, by name: a function, or one per set of inputs, which are then called one
            after the other and counted as their mean, so that no call finds its inputs in the caches.
        runs: rounds that count, at least 2.
        warmup: rounds before them.
        device: where they compute.
        graphs: on a GPU, capture what each launches in a CUDA graph; what cannot be captured is launched
            anew every time.
        label: text of a progress bar on a terminal, None for none.

    Returns:
        The timing of each function.

    Raises:
        ValueError: `runs` is below 2, which has no spread.
    """
    if runs < 2:
        raise ValueError(f"runs must be at least 2, got {runs}; a spread needs two measurements")
    device = torch.device(device)
    calls = {
        name: [given] if callable(given) else list(given) for name, given in functions.items()
    }  # one function or several
    if device.type == "cuda":
        stopwatch: _Stopwatch | _GpuStopwatch = _GpuStopwatch(device, calls, graphs)
    else:
        stopwatch = _Stopwatch(calls)
    for turn in tqdm(range(warmup + runs), desc=label, disable=True if label is None else None, leave=False):
        if turn == warmup:
            stopwatch.forget()
        for name in calls:
            stopwatch.measure(name)
        stopwatch.wait()
    result = {}
    for name, measured in stopwatch.times().items():
        taken = [milliseconds / len(calls[name]) for milliseconds in measured]
        result[name] = Timing(*spread_of(taken), name in stopwatch.graphs)
    return result


def spread_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of at least two values."""
    tenths = quantiles(values, n=10, method="inclusive")
    return median(values), tenths[0], tenths[-1]


def forward_calls(models: Mapping[str, nn.Module], images: Tensor) -> dict[str, Callable[[], object]]:
    """Forward passes to time: copies of models, on the device and in the dtype of images [B, 3, H, W]."""

    def forward(model: nn.Module) -> object:
        with torch.inference_mode():
            return model(images)

    copies = {name: copy.deepcopy(model).to(images.device, images.dtype) for name, model in models.items()}
    return {name: functools.partial(forward, model) for name, model in copies.items()}


class _Stopwatch:
    """Times by the host's clock.

    Args:
        calls: the functions of each name.
    """

    def __init__(self, calls: dict[str, list[Callable[[], object]]]) -> None:
        self.calls = calls
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.forget()

    def forget(self) -> None:
        self.taken: dict[str, list[float]] = {name: [] for name in self.calls}

    def measure(self, name: str) -> None:
        start = time.perf_counter()
        for function in self.calls[name]:
            function()
        self.taken[name].append(1e3 * (time.perf_counter() - start))

    def wait(self) -> None:
        """There is nothing to wait for."""

    def times(self) -> dict[str, list[float]]:
        return self.taken


class _GpuStopwatch:
    """Times by the GPU's clock, between events.

    Args:
        device: a GPU.
        calls: the functions of each name.
        graphs: capture them.
    """

    def __init__(
        self, device: torch.device, calls: dict[str, list[Callable[[], object]]], graphs: bool
    ) -> None:
        self.device = device
        self.calls = calls
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        if graphs:
            # results are thrown away, so that all graphs may share their memory
            pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            captured = {name: _capture(name, each, stream, pool) for name, each in calls.items()}
            self.graphs = {name: graph for name, graph in captured.items() if graph is not None}
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.forget()

    def forget(self) -> None:
        self.events: dict[str, list[_Interval]] = {name: [] for name in self.calls}

    def measure(self, name: str) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(self.device)
        # while the GPU writes this, the host launches what is measured
        self.flush.zero_()
        start.record(stream)
        if name in self.graphs:
            self.graphs[name].replay()
        else:
            for function in self.calls[name]:
                function()
        end.record(stream)
        self.events[name].append((start, end))

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def times(self) -> dict[str, list[float]]:
        return {
            name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in self.events.items()
        }


def _capture(
    name: str, functions: list[Callable[[], object]], stream: torch.cuda.Stream, pool: Any
) -> torch.cuda.CUDAGraph | None:
    """One graph of all functions, None where they cannot be captured."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        for _ in range(_CALLS_BEFORE_CAPTURE):
            for function in functions:
                function()
    torch.cuda.current_stream(stream.device).wait_stream(stream)
    torch.cuda.synchronize(stream.device)
    gc.collect()  # what the collector frees during a capture may break it
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for function in functions:
                function()
    except Exception as error:
        reason = str(error).partition("\n")[0]
        _logger.warning("%s cannot be captured in a CUDA graph and is launched every time: %s", name, reason)
        return None
    return graph
