"""Milliseconds, compared fairly: in one run, in turns, medians with spread."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Timing:
    """Time of one function.

    Attributes:
        median_ms: median over the runs, in ms.
        low_ms: lower quartile.
        high_ms: upper quartile.
    """

    median_ms: float
    low_ms: float
    high_ms: float

    def __str__(self) -> str:
        return f"{self.median_ms:.1f} ms ({self.low_ms:.1f} to {self.high_ms:.1f})"


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    *,
    runs: int = 15,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    label: str | None = None,
) -> dict[str, Timing]:
    """Times functions round by round, so that whatever else the machine does meets all alike.

    Args:
        functions: what to time, by name.
        runs: rounds that count, at least 2.
        warmup: rounds before them.
        device: where they compute; a GPU is waited for.
        label: text of a progress bar on a terminal, None for none.

    Returns:
        The timing of each function.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(warmup + runs), desc=label, disable=True if label is None else None, leave=False):
        for name, function in functions.items():
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    result = {}
    for name, taken in times.items():
        low, _, high = quantiles(taken, n=4)
        result[name] = Timing(median(taken), low, high)
    return result


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
