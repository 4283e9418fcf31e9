"""Top-1 against what it costs, method by method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsifiner.svg import write_svg

_OURS_COLOUR = "#2e86de"
_PANEL = (4.6, 3.8)  # inches
_COLUMNS = 3
# costs that span more than this factor are drawn on a logarithmic axis
_LINEAR_SPAN = 6.0

Row = dict[str, Any]


def write_pareto(file: Path, rows: Sequence[Row]) -> None:
    """Draws one panel per cost: a line per method, error bars from the bootstrap, the front as a step.

    Ours are blue and bold, each with a mark of its own; untrained points are open and their lines dashed,
    bounds are dotted.

    Args:
        file: an SVG; it is replaced.
        rows: one per setting, as `sparsifiner.compare.table.picture_rows` gives them.
    """
    # matplotlib takes a second to import
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import LogLocator, ScalarFormatter  # noqa: PLC0415

    costs = [cost for cost in (rows[0]["costs"] if rows else ()) if _priced(rows, cost)]
    columns = min(_COLUMNS, len(costs) + 1)
    height = -(-(len(costs) + 1) // columns)  # a place for the legend, too
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * height), layout="constrained")
    *panels, last = figure.subplots(height, columns, squeeze=False).flat[: len(costs) + 1]
    for axes in figure.axes[len(costs) :]:
        axes.set_axis_off()
    lines: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["trained"]), []).append(row)
    peers = sorted({row["method"] for row in rows if not row["ours"]})
    ours_marks = dict(zip(sorted({row["method"] for row in rows if row["ours"]}), "D^vPX*", strict=False))
    colours = [colormaps["tab20"](index) for index in range(2, 20)]  # the first two are blue
    shown = {}  # method -> how it is drawn, trained where it is
    for axes, cost in zip(panels, costs, strict=True):
        for (method, trained), line in lines.items():
            points = _priced(line, cost)
            if not points:
                continue
            ours = line[0]["ours"]
            colour = _OURS_COLOUR if ours else colours[peers.index(method) % len(colours)]
            error = [
                [row["below"] for _, row in points],
                [row["above"] for _, row in points],
            ]
            drawn = axes.errorbar(
                [value for value, _ in points],
                [row["top1"] for _, row in points],
                error,
                fmt=ours_marks.get(method, "o") + (":" if line[0]["is_bound"] else "-" if trained else "--"),
                color=colour,
                linewidth=2 if ours else 1,
                markerfacecolor=colour if trained else "none",
                elinewidth=0.7,
            )
            if trained or method not in shown:
                shown[method] = drawn
        front = _priced([row for row in rows if cost in row["front"]], cost)
        (steps,) = axes.step(
            [value for value, _ in front],
            [row["top1"] for _, row in front],
            where="post",
            color="#999999",
            linewidth=5,
            alpha=0.35,
        )
        shown["front"] = steps
        axes.set_xlabel(cost)
        axes.set_ylabel("top-1, %")
        axes.grid(alpha=0.3)
        prices = [value for value, _ in _priced(rows, cost)]
        if max(prices) > _LINEAR_SPAN * min(prices) > 0:
            axes.set_xscale("log", subs=[])
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
    last.legend(shown.values(), shown.keys(), loc="center", ncols=2, title="open marks: not trained")
    write_svg(file, figure)


def _priced(rows: Sequence[Row], cost: str) -> list[tuple[float, Row]]:
    """Rows with their cost, the cheapest first, without those that have none."""
    priced = [(row["costs"][cost], row) for row in rows if row["costs"][cost] is not None]
    return sorted(priced, key=lambda point: point[0])
