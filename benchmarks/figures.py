"""Pictures of docs/: curves from the rows of docs/results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsifiner.svg import write_svg

Row = dict[str, Any]
_LABELS = {"impact": "impact, falling budgets", "pooled": "pooled, even", "random": "random, even"}
# what a row costs -> of the sparse model and of the dense one
_COSTS: dict[str, Callable[[Row], tuple[float, float]]] = {
    "key visits, % of N (summary keys included)": lambda row: (100 * row["key_visits"], 100.0),
    "MACs of the model, millions": lambda row: (row["macs"]["total"] / 1e6, row["dense_macs"]["total"] / 1e6),
    "ms of 100 images, bf16, replayed": lambda row: (
        row["milliseconds"]["sparse"]["median_ms"],
        row["milliseconds"]["dense"]["median_ms"],
    ),
}


def write_curves(file: Path, rows: list[Row]) -> None:
    """Points of top-1 lost against every cost and KL against key visits, a line of panels per teacher."""
    teachers = sorted({(row["suite"], row["tokens"]) for row in rows})
    figure = Figure(figsize=(15, 3.4 * len(teachers)), layout="constrained")
    panels = figure.subplots(len(teachers), len(_COSTS) + 1, squeeze=False)
    for (suite, tokens), line in zip(teachers, panels, strict=True):
        own = [row for row in rows if (row["suite"], row["tokens"]) == (suite, tokens)]
        for axes, (name, cost) in zip(line, _COSTS.items(), strict=False):
            for label, points in _curves(own).items():
                if "ms" in name.split() and not points[0]["milliseconds"]["sparse"]["graph"]:
                    continue  # launched by the host: other than the rest
                against = [point["against_dense"] for point in points]
                axes.errorbar(
                    [cost(point)[0] for point in points],
                    [each["difference"] for each in against],
                    [each["interval"] for each in against],
                    fmt="o-",
                    label=label,
                )
            axes.plot(cost(own[0])[1], 0, "k*", markersize=9, label="dense")
            axes.axhline(0, color="#888888", linewidth=1)
            axes.set_ylabel("top-1 against dense, points")
            _finish(axes, name, f"{suite}, N = {tokens}")
        divergence, (visits, cost) = line[-1], next(iter(_COSTS.items()))
        for label, points in _curves(own).items():
            divergences = [point["against_dense"]["logit_kl"] for point in points]
            divergence.plot([cost(point)[0] for point in points], divergences, "o-", label=label)
        divergence.set_yscale("log")
        divergence.set_ylabel("KL of the logits")
        _finish(divergence, visits, f"{suite}, N = {tokens}")
        for axes in (line[0], divergence):
            axes.set_xscale("log")
    write_svg(file, figure)


def _curves(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by scorer, the cheapest first."""
    return {
        label: sorted((row for row in rows if row["scorer"] == scorer), key=lambda row: row["key_visits"])
        for scorer, label in _LABELS.items()
    }


def _finish(axes: Axes, cost: str, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(cost)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
