"""What was compared, as text."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from sparsifiner.compare.run import unpack_bits
from sparsifiner.measure.pareto import bootstrap_interval, pareto_front

Row = dict[str, Any]
# cost of a row -> its name in tables and plots and what a unit is of the stored one
COSTS = {
    "attention": ("attention MMACs", 1e-6),
    "total": ("total MMACs", 1e-6),
    "cuda_ms": ("GPU ms", 1.0),
    "cpu_ms": ("CPU ms", 1.0),
    "cuda_bytes": ("peak MiB", 2.0**-20),
}
_SETTING = ("method", "keep", "token_keep", "trained")


def cost_of(row: Row, cost: str) -> float | None:
    """A cost of a row in the unit of `COSTS`, None if it was not measured."""
    macs = row["macs"]
    value = {"attention": macs["attention"] + macs["scorer"], "total": macs["total"]}.get(cost)
    if value is None:
        place, _, measured = cost.partition("_")
        value = row["costs"].get(place, {}).get(measured)
    return None if value is None else float(value * COSTS[cost][1])


def name_of(row: Row) -> str:
    """A row's setting in a few words."""
    shares = [f"keep {row['keep']:g}"] if row["keep"] is not None else []
    shares += [f"tokens {row['token_keep']:g}"] if row["token_keep"] is not None else []
    return ", ".join([row["method"], *shares, *([] if row["trained"] else ["untrained"])])


def merge_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row per setting, with what its seeds give.

    Returns:
        The first row of each setting with "top1" as the mean, "seeds", and the difference to the dense model
        that was trained alike, "difference", with its bootstrap interval "low" and "high" (points of top-1,
        over images, right answers averaged over seeds); rows without training are compared with the dense
        model without training.
    """
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(tuple(row[name] for name in _SETTING), []).append(row)
    merged = []
    for own in settings.values():
        controls = {row["seed"]: row for row in settings.get(("dense", None, None, own[0]["trained"]), [])}
        paired = [(row, controls[row["seed"]]) for row in own if row["seed"] in controls]
        row = {**own[0], "top1": mean(each["top1"] for each in own), "seeds": len(own), "difference": None}
        if paired:
            difference = 100 * np.mean([_right(each) - _right(control) for each, control in paired], axis=0)
            row["difference"] = float(difference.mean())
            row["low"], row["high"] = bootstrap_interval(difference)
        merged.append(row)
    return merged


def format_row(row: Row) -> str:
    """One new row, in a line."""
    costs = [f"{value:,.4g} {COSTS[cost][0]}" for cost in COSTS if (value := cost_of(row, cost)) is not None]
    return f"{name_of(row)}, seed {row['seed']}: top-1 {row['top1']:.2f}, {', '.join(costs)}"


def format_comparison(rows: Sequence[Row]) -> str:
    """All settings as a table, the cheapest first; stars mark those on the front of top-1 against a cost."""
    merged = sorted(merge_seeds(rows), key=lambda row: row["macs"]["total"])
    costs = [cost for cost in COSTS if any(cost_of(row, cost) is not None for row in merged)]
    stars = {cost: front_of(merged, cost) for cost in costs}
    lines = [["method", "seeds", "top-1", "to dense (95 %)", *(COSTS[cost][0] for cost in costs)]]
    for index, row in enumerate(merged):
        difference = ""
        if row["difference"] is not None and row["method"] != "dense":
            difference = f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
        cells = []
        for cost in costs:
            value = cost_of(row, cost)
            cells.append("" if value is None else f"{value:,.4g}{' *' if index in stars[cost] else '  '}")
        lines.append([name_of(row), str(row["seeds"]), f"{row['top1']:.2f}", difference, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def front_of(rows: Sequence[Row], cost: str) -> set[int]:
    """Indices of the rows that no other beats in top-1 against a cost; bounds do not compete."""
    priced = [
        (index, value)
        for index, row in enumerate(rows)
        if not row["is_bound"] and (value := cost_of(row, cost)) is not None
    ]
    front = pareto_front([value for _, value in priced], [rows[index]["top1"] for index, _ in priced])
    return {priced[place][0] for place in front}


def _right(row: Row) -> np.ndarray:
    return unpack_bits(row["right"], row["images"])
