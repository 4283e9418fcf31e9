"""Where sparse beats dense: the ratio of their times against the size of the input."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsifiner.svg import write_svg

_SIZE = (7.5, 4.5)  # inches
_LOSS_COLOUR = "#e4572e"
# parts of each benchmark that are ours and complete
_OURS = frozenset({"everything", "sparse"})
# what tells one line from another, and what may change along a line
_LINE = (
    *(
        "model",
        "measure",
        "way",
        "dtype",
        "scorer",
        "profile",
        "tile",
        "pool",
        "share",
        "min_tokens",
        "token_method",
    ),
    *("prefix", "heads", "head_dim", "backend", "device"),
)
_POINT = ("keep", "summary", "batch")

Row = Mapping[str, Any]


def write_break_even(file: Path, rows: Sequence[Row], benchmark: str) -> None:
    """Draws the ratio dense / ours, one line per setting, with losses below a line at 1 shaded.

    Dense is the fastest path of an operation, and of a model dense called the same way. Of rows that measured
    the same the latest counts.

    Args:
        file: an SVG; it is replaced.
        rows: rows of measurements, of any benchmark.
        benchmark: "ops" or "model": those that are drawn.
    """
    # matplotlib takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    lines = _lines([row for row in rows if row["benchmark"] == benchmark])
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for label, points in lines.items():
        axes.plot(
            [point["tokens"] for point in points], [point["ratio"] for point in points], "o-", label=label
        )
        for point in points:
            text = f"keep {_short(point['keep'])}, batch {point['batch']}"
            at = (point["tokens"], point["ratio"])
            axes.annotate(text, at, (4, 4), textcoords="offset points", fontsize=6)
    ratios = [point["ratio"] for points in lines.values() for point in points]
    axes.set_ylim(0, 1.15 * max([*ratios, 1.2]))
    axes.axhspan(0, 1, color=_LOSS_COLOUR, alpha=0.08, label="slower than dense")
    axes.axhline(1, color=_LOSS_COLOUR, linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({point["tokens"] for points in lines.values() for point in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.margins(x=0.12)
    axes.set_xlabel("tokens N")
    axes.set_ylabel("time of dense / ours")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")
    write_svg(file, figure)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Points of each line by its label, in the order of their tokens."""
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["part"] in _OURS and row["ratio"] is not None:
            latest[tuple(str(row.get(column)) for column in (*_LINE, *_POINT, "tokens"))] = row
    lines: dict[tuple[str, ...], list[Row]] = {}
    for key, row in latest.items():
        lines.setdefault(key[: len(_LINE)], []).append(row)
    shared = [index for index in range(len(_LINE)) if len({key[index] for key in lines}) == 1]
    labelled: dict[str, list[Row]] = {}
    for key, points in lines.items():
        told = [
            _named(_LINE[index], points[0][_LINE[index]])
            for index, text in enumerate(key)
            if text != "None" and _is_told(index, shared)
        ]
        apart = [column for column in _POINT if _differs_within_a_size(points, column)]
        for point in sorted(points, key=lambda each: each["tokens"]):
            label = ", ".join([*told, *(f"{column} {_short(point[column])}" for column in apart)])
            labelled.setdefault(label, []).append(point)
    return labelled


def _is_told(index: int, shared: list[int]) -> bool:
    """Whether a label names a column: always what is timed, how and where, others where lines differ."""
    return index not in shared or _LINE[index] in {"model", "measure", "way", "dtype", "scorer", "device"}


def _named(column: str, value: Any) -> str:
    """A value with its column's name where it does not speak for itself."""
    if isinstance(value, dict):
        return " ".join(_short(each) for each in value.values() if each is not None)
    return _short(value) if isinstance(value, str) else f"{column} {_short(value)}"


def _differs_within_a_size(points: list[Row], column: str) -> bool:
    """Whether points of one size differ in a column, so that they cannot be one line."""
    values: dict[Any, set[str]] = {}
    for point in points:
        values.setdefault(point["tokens"], set()).add(str(point[column]))
    return any(len(each) > 1 for each in values.values())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "by layer"
    return f"{value:g}" if isinstance(value, float) else str(value)
