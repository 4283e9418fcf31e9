"""What was compared, as it is shown."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from sparsifiner.compare.run import unpack_bits
from sparsifiner.measure.pareto import bootstrap_interval, pareto_front

Row = dict[str, Any]
# cost of a row -> its name in tables and plots. What else a machine does changes its milliseconds from minute
# to minute, so time is told by the dense model's in the same run.
COSTS = {
    "attention": "attention, MMACs",
    "total": "total, MMACs",
    "cuda": "GPU time, % of dense",
    "cpu": "CPU time, % of dense",
    "bytes": "peak on a GPU, MiB",
}
_MERGED_BY = ("method", "keep", "token_keep", "trained")


def cost_of(row: Row, cost: str) -> float | None:
    """A cost of a row as `COSTS` names it, None if it was not measured.

    "attention" counts everything that replaces dense attention: choosing keys and tokens, too.
    """
    macs = row["macs"]
    if cost == "attention":
        return float(macs["attention"] + macs["scorer"] + macs.get("token_choice", 0)) * 1e-6
    if cost == "total":
        return float(macs["total"]) * 1e-6
    measured = row["costs"].get("cuda" if cost == "bytes" else cost)
    if measured is None:
        return None
    return float(
        measured["bytes"] / 2**20 if cost == "bytes" else 100 * measured["ms"] / measured["dense_ms"]
    )


def format_cost(row: Row, cost: str) -> str:
    """A cost in three figures, with the milliseconds of a time; "" if it was not measured."""
    value = cost_of(row, cost)
    if value is None:
        return ""
    if cost in row["costs"]:
        return f"{value:.0f} ({three_figures(row['costs'][cost]['ms'])} ms)"
    return three_figures(value)


def three_figures(value: float) -> str:
    """A positive number in three figures, whole from 100 on."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


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
        settings.setdefault(tuple(row[name] for name in _MERGED_BY), []).append(row)
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


def picture_rows(rows: Sequence[Row]) -> list[Row]:
    """One row per setting, as `sparsifiner.compare.pareto.write_pareto` draws it.

    Returns:
        Its "method", whether it is "ours", "is_bound" and "trained", "top1", how far its interval reaches
        "below" and "above", its "costs" by what an axis says, None where one was not measured, and those of
        them on whose "front" it lies.
    """
    merged = merge_seeds(rows)
    fronts = {cost: front_of(merged, cost) for cost in COSTS}
    drawn = []
    for index, row in enumerate(merged):
        told = {name: row[name] for name in ("method", "ours", "is_bound", "trained", "top1")}
        has_interval = row.get("low") is not None
        drawn.append({
            **told,
            "below": row["difference"] - row["low"] if has_interval else 0.0,
            "above": row["high"] - row["difference"] if has_interval else 0.0,
            "costs": {label: cost_of(row, cost) for cost, label in COSTS.items()},
            "front": [label for cost, label in COSTS.items() if index in fronts[cost]],
        })  # fmt: skip
    return drawn


def format_row(row: Row) -> str:
    """One new row, in a line."""
    costs = [f"{COSTS[cost]} {text}" for cost in COSTS if (text := format_cost(row, cost))]
    return f"{name_of(row)}, seed {row['seed']}: top-1 {row['top1']:.2f}, {', '.join(costs)}"


def comparison_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """All settings as the header and the cells of a table, the cheapest first.

    Stars mark those on the front of top-1 against a cost, lines of our own methods begin with a plus.
    """
    merged = sorted(merge_seeds(rows), key=lambda row: row["macs"]["total"])
    costs = [cost for cost in COSTS if any(cost_of(row, cost) is not None for row in merged)]
    stars = {cost: front_of(merged, cost) for cost in costs}
    lines = []
    for index, row in enumerate(merged):
        difference = ""
        if row["difference"] is not None and row["method"] != "dense":
            difference = f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
        cells = [format_cost(row, cost) + (" *" if index in stars[cost] else "") for cost in costs]
        name = ("+ " if row["ours"] else "") + name_of(row)
        visits = "" if row["key_visits"] is None else f"{100 * row['key_visits']:.1f} %"
        lines.append([name, str(row["seeds"]), f"{row['top1']:.2f}", difference, visits, *cells])
    return [
        "method",
        "seeds",
        "top-1",
        "to dense (95 %)",
        "key visits",
        *(COSTS[cost] for cost in costs),
    ], lines


def format_comparison(rows: Sequence[Row]) -> str:
    """All settings as a table for a terminal."""
    header, cells = comparison_lines(rows)
    lines = [header, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
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
