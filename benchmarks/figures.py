"""Pictures of docs/: curves from the rows of docs/results."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
_LABELS = {"impact": "impact, falling budgets", "pooled": "pooled, even", "random": "random, even"}


def write_curves(file: Path, rows: list[Row]) -> None:
    """Points of top-1 lost and KL of the logits against the key visits, one pair of panels per teacher."""
    teachers = sorted({(row["suite"], row["tokens"]) for row in rows})
    figure = Figure(figsize=(9, 3.6 * len(teachers)), layout="constrained")
    panels = figure.subplots(len(teachers), 2, squeeze=False)
    for (suite, tokens), (lost, divergence) in zip(teachers, panels, strict=True):
        own = [row for row in rows if (row["suite"], row["tokens"]) == (suite, tokens)]
        for scorer, label in _LABELS.items():
            points = sorted(
                (row for row in own if row["scorer"] == scorer), key=lambda row: row["key_visits"]
            )
            visits = [100 * point["key_visits"] for point in points]
            against = [point["against_dense"] for point in points]
            spread = [each["interval"] for each in against]
            lost.errorbar(visits, [each["difference"] for each in against], spread, fmt="o-", label=label)
            divergence.plot(visits, [each["logit_kl"] for each in against], "o-", label=label)
        lost.axhline(0, color="#888888", linewidth=1)
        lost.set_ylabel("top-1 against dense, points")
        divergence.set_yscale("log")
        divergence.set_ylabel("KL of the logits")
        for axes in (lost, divergence):
            axes.set_title(f"{suite}, N = {tokens}", fontsize=9)
            axes.set_xlabel("key visits, % of N (summary keys included)")
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    # without a date the same rows give the same file
    figure.savefig(file, format="svg", metadata={"Date": None})
