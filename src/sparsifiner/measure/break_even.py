"""Where sparse beats dense: the ratio of their times against the size of the input."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsifiner.svg import write_svg

_SIZE = (7.5, 4.5)  # inches
_LOSS_COLOUR = "#e4572e"
# parts of each benchmark that are ours and complete
_OURS = frozenset({"everything", "sparse", "sparse compiled"})
# what sizes are of each benchmark: its column and its name
_SIZES = {"ops": ("tokens", "tokens N"), "model": ("img_size", "image side, px")}
# what tells one line from another, and what may change along a line
_LINE = (
    *(
        "model",
        "measure",
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
    """Draws the ratio fastest dense / ours, one line per setting, with losses below a line at 1 shaded.

    Of rows that measured the same the latest counts; of sparse and compiled sparse the faster.

    Args:
        file: an SVG; it is replaced.
        rows: rows of measurements, of any benchmark.
        benchmark: "ops" or "model": those that are drawn.
    """
    # matplotlib takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    size, title = _SIZES[benchmark]
    lines = _lines([row for row in rows if row["benchmark"] == benchmark], size)
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for label, points in lines.items():
        axes.plot([point[size] for point in points], [point["ratio"] for point in points], "o-", label=label)
        for point in points:
            text = f"keep {_short(point['keep'])}, batch {point['batch']}"
            at = (point[size], point["ratio"])
            axes.annotate(text, at, (4, 4), textcoords="offset points", fontsize=6)
    ratios = [point["ratio"] for points in lines.values() for point in points]
    axes.set_ylim(0, 1.15 * max([*ratios, 1.2]))
    axes.axhspan(0, 1, color=_LOSS_COLOUR, alpha=0.08, label="slower than dense")
    axes.axhline(1, color=_LOSS_COLOUR, linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({point[size] for points in lines.values() for point in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.margins(x=0.12)
    axes.set_xlabel(title)
    axes.set_ylabel("time of the fastest dense path / ours")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")
    write_svg(file, figure)


def _lines(rows: Sequence[Row], size: str) -> dict[str, list[Row]]:
    """Points of each line by its label, in the order of their sizes."""
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["part"] in _OURS and row["ratio"] is not None:
            columns = (*_LINE, *_POINT, "part", size)
            latest[tuple(str(row.get(column)) for column in columns)] = row
    fastest: dict[tuple[str, ...], Row] = {}
    for key, row in latest.items():
        place = (*key[:-2], key[-1])  # the same but for the part
        fastest[place] = max(row, fastest.get(place, row), key=lambda each: float(each["ratio"]))
    lines: dict[tuple[str, ...], list[Row]] = {}
    for key, row in fastest.items():
        lines.setdefault(key[: len(_LINE)], []).append(row)
    shared = [index for index in range(len(_LINE)) if len({key[index] for key in lines}) == 1]
    labelled: dict[str, list[Row]] = {}
    for key, points in lines.items():
        told = [
            _named(_LINE[index], points[0][_LINE[index]])
            for index, text in enumerate(key)
            if text != "None" and _is_told(index, shared)
        ]
        apart = [column for column in _POINT if _differs_within_a_size(points, column, size)]
        for point in sorted(points, key=lambda each: each[size]):
            label = ", ".join([*told, *(f"{column} {_short(point[column])}" for column in apart)])
            labelled.setdefault(label, []).append(point)
    return labelled


def _is_told(index: int, shared: list[int]) -> bool:
    """Whether a label names a column: always what is timed, how and where, others where lines differ."""
    return index not in shared or _LINE[index] in {"model", "measure", "dtype", "scorer", "device"}


def _named(column: str, value: Any) -> str:
    """A value with its column's name where it does not speak for itself."""
    if isinstance(value, dict):
        return " ".join(_short(each) for each in value.values() if each is not None)
    return _short(value) if isinstance(value, str) else f"{column} {_short(value)}"


def _differs_within_a_size(points: list[Row], column: str, size: str) -> bool:
    """Whether points of one size differ in a column, so that they cannot be one line."""
    values: dict[Any, set[str]] = {}
    for point in points:
        values.setdefault(point[size], set()).add(str(point[column]))
    return any(len(each) > 1 for each in values.values())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "by layer"
    return f"{value:g}" if isinstance(value, float) else str(value)
