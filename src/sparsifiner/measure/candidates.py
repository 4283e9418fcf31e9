"""Candidates of a benchmark: tried first, timed in turns, told apart in rows."""

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from sparsifiner.measure.memory import scratch_bytes
from sparsifiner.measure.records import Row
from sparsifiner.measure.timing import Timing, time_in_turns

_REASON_LENGTH = 160


@dataclass(frozen=True)
class Candidate:
    """One way to compute.

    Attributes:
        part: what it is.
        measure: in which comparison it takes part, such as "forward".
        calls: a function for each set of inputs.
        dense: it may be the baseline: the fastest dense candidate of a comparison is.
        whole: it computes all that a dense candidate does, so that their ratio means something.
        required: an error of it is one of this package; others are left out and named.
        why_not: the reason why it is not even tried, None if it is.
        needs: a function whose memory is this candidate's, None if it is not asked for.
        details: more columns of its row.
    """

    part: str
    measure: str
    calls: Sequence[Callable[[], object]]
    dense: bool = False
    whole: bool = True
    required: bool = False
    why_not: str | None = None
    needs: Callable[[], object] | None = None
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tells it from all others of its case."""
        return f"{self.part} ({self.measure})"


def time_candidates(
    candidates: Sequence[Candidate],
    *,
    runs: int,
    warmup: int,
    device: torch.device,
    label: str,
) -> list[Row]:
    """Calls every candidate once, then times in turns those that run.

    Args:
        candidates: what to compare.
        runs: rounds that count.
        warmup: rounds before them.
        device: where they compute.
        label: text of the progress bars.

    Returns:
        A row for each: `part`, `measure`, its details and, in ms, the median and the 10th and 90th
        percentile; `ratio` is the median of the fastest dense candidate of the same measure, `baseline`,
        over its own; `memory_bytes` is what it needs beyond its inputs and its result. Where it did not run,
        `left_out` says why.
    """
    reasons = _try_each(candidates, device, label)
    running = [each for each in candidates if each.name not in reasons]
    memory = {each.name: scratch_bytes(each.needs, device) for each in running if each.needs is not None}
    timings = time_in_turns(
        {each.name: each.calls for each in running},
        runs=runs,
        warmup=warmup,
        device=device,
        graphs=True,
        label=label,
    )
    return _rows(candidates, timings, memory, reasons)


def _rows(
    candidates: Sequence[Candidate],
    timings: Mapping[str, Timing],
    memory: Mapping[str, int | None],
    reasons: Mapping[str, str],
) -> list[Row]:
    rows = []
    for each in candidates:
        timing = timings.get(each.name)
        dense = [one for one in candidates if one.dense and one.measure == each.measure]
        rivals = [one for one in dense if one.name in timings]
        fastest = min(rivals, key=lambda one: timings[one.name].median_ms, default=None)
        ratio = None
        if timing is not None and fastest is not None and each.whole:
            ratio = timings[fastest.name].median_ms / timing.median_ms
        rows.append(
            {
                "part": each.part,
                "measure": each.measure,
                "median_ms": None if timing is None else timing.median_ms,
                "low_ms": None if timing is None else timing.low_ms,
                "high_ms": None if timing is None else timing.high_ms,
                "ratio": ratio,
                "baseline": None if fastest is None else fastest.part,
                "memory_bytes": memory.get(each.name),
                "graph": None if timing is None else timing.graph,
                "left_out": reasons.get(each.name),
                **each.details,
            }
        )
    return rows


def _try_each(candidates: Sequence[Candidate], device: torch.device, label: str) -> dict[str, str]:
    """Why some do not run."""
    reasons = {}
    for each in tqdm(candidates, desc=f"{label}: preparing", disable=None, leave=False):
        if each.why_not is not None:
            reasons[each.name] = each.why_not
            continue
        reason = why_it_fails(each.calls[0], device, required=each.required)
        if reason is not None:
            reasons[each.name] = reason
    return reasons


def why_it_fails(call: Callable[[], object], device: torch.device, *, required: bool) -> str | None:
    """Calls a function, for which kernels and compiled code are made.

    Args:
        call: the function.
        device: where it computes.
        required: an error other than of missing memory is one of this package, and raised.

    Returns:
        The first line of its error, None if there was none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every reason before it raises
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        if required and not isinstance(error, torch.OutOfMemoryError):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0][:_REASON_LENGTH]
    else:
        return None
    # what the failed call held is free once its error is
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return reason
