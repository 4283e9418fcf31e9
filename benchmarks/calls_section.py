"""Calls of whole models beside dense called the same way: a section of a page, a table of README.md."""

from typing import Any

from provenance import RESULTS
from tables import load, source_of, table

from sparsifiner.compare.table import three_figures

WAYS = {"eager": "eager", "compiled": "`torch.compile`", "reduce-overhead": "`reduce-overhead`"}

# rows of dense and sparse by how they were called
Case = dict[str, dict[str, dict[str, Any]]]


def _rows() -> list[dict[str, Any]]:
    if not (RESULTS / "calls.json").exists():
        return []
    return load("calls", "row", "batch", "way", "part")


def _cases(rows: list[dict[str, Any]]) -> dict[tuple[str, int], Case]:
    """Rows of every setting by way and part, those that ran."""
    cases: dict[tuple[str, int], Case] = {}
    for row in rows:
        of_way = cases.setdefault((row["row"], row["batch"]), {}).setdefault(row["way"], {})
        if row["median_ms"] is not None:
            of_way[row["part"]] = row
    return cases


def ratios_table() -> str:
    """How many times as fast as dense a model is, by how both are called; "" where none was measured."""
    body = []
    for (name, batch), ways in _cases(_rows()).items():
        sparse = [ways.get(way, {}).get("sparse") for way in WAYS]
        first = next((row for row in sparse if row is not None), None)
        if first is not None:
            cells = ["" if row is None else _ratio(row) for row in sparse]
            body.append([name, str(batch), f"{first['keep']:g}", str(first["tile"]), *cells])
    return table(["model", "batch", "keep", "tile", *WAYS.values()], body) if body else ""


def _ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return ""
    ratio = f"{row['ratio']:.2f}x"
    spread = f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    return f"**{ratio}** {spread}" if row["ratio"] >= 1 else f"{ratio} {spread}"


def calls() -> str:
    """The section; "" where no calls were measured."""
    rows = _rows()
    if not rows:
        return ""
    body = [
        [name, str(batch), WAYS[way], *_details(parts)]
        for (name, batch), ways in _cases(rows).items()
        for way, parts in ways.items()
        if parts
    ]
    header = ["model", "batch", "called", "dense, ms", "sparse, ms", "longer than dense, ms", "host, ms"]
    header += ["kernels, ms", "peak, MiB", "command"]
    return f"""## Calls of whole models

What a call takes, by the host's clock, until its result is there: nothing is replayed but by
`torch.compile(mode="reduce-overhead")` itself. Dense and sparse take turns, called the same way. In brackets
what 8 of 10 rounds lie between. {_setting(rows)}

How many times as fast as dense called the same way:

{ratios_table()}

Dense -> sparse: "longer than dense" is the median of the differences within a round, "host" how long it took
until the call returned, the GPU having been idle, "kernels" the sum of the kernels' times, "peak" the memory
of a call beyond its result; reduce-overhead keeps its memory between calls.

`python benchmarks/speed.py calls` ({source_of(rows)})

{table(header, body)}
"""


def _setting(rows: list[dict[str, Any]]) -> str:
    """What all rows share."""
    dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
    scorers = ", ".join(sorted({f"{row['scorer']} with pool {row['pool']}" for row in rows}))
    budgets = ", ".join(sorted({row["profile"] for row in rows}))
    return f"{dtypes}, {budgets} budgets, scorer {scorers}, every layer sparse."


def _details(parts: dict[str, dict[str, Any]]) -> list[str]:
    sparse, dense = parts.get("sparse"), parts.get("dense")
    longer = ""
    if sparse is not None and sparse["difference_ms"] is not None:
        low, high = sparse["difference_low_ms"], sparse["difference_high_ms"]
        longer = f"{sparse['difference_ms']:+.2f} ({low:+.2f} to {high:+.2f})"
    both = [dense, sparse]
    return [
        *("" if row is None else _spread(row) for row in both),
        longer,
        _arrow(both, "host_ms"),
        _arrow(both, "kernel_ms"),
        _arrow(both, "memory_bytes", 2**-20),
        f"`{next(row['command'] for row in both if row is not None)}`",
    ]


def _spread(row: dict[str, Any]) -> str:
    low, high = (three_figures(row[name]) for name in ("low_ms", "high_ms"))
    return f"{three_figures(row['median_ms'])} ({low} to {high})"


def _arrow(rows: list[dict[str, Any] | None], column: str, factor: float = 1) -> str:
    """A figure of dense and of sparse, "" where neither is known."""
    figures = [None if row is None else row[column] for row in rows]
    if all(figure is None for figure in figures):
        return ""
    return " -> ".join("?" if figure is None else three_figures(factor * figure) for figure in figures)
