"""The commands that measure time: each prints a table while it runs and keeps rows in a folder."""

import json as json_format
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from sparsifiner.cli.options import SparsityOptions
from sparsifiner.measure.bench_model import SPARSE, ModelBenchmark, benchmark_model
from sparsifiner.measure.bench_ops import OpsBenchmark, benchmark_operations
from sparsifiner.measure.records import Row
from sparsifiner.measure.results import open_results, save_results


def bench_ops(settings: OpsBenchmark, *, output: Path | None = None, json: bool = False) -> None:
    """Times one attention operation, part by part, against the fastest dense path of the same run.

    Args:
        settings: what to time.
        output: folder for results.json, to which rows are added, results.csv and break_even_ops.svg.
        json: print JSON.
    """
    _report(benchmark_operations(settings), output, json)


def bench_model(
    settings: ModelBenchmark, sparsity: SparsityOptions, *, output: Path | None = None, json: bool = False
) -> None:
    """Times calls of a sparse model against its dense twin, called the same way: forward or training steps.

    Args:
        settings: what to time.
        sparsity: how sparse.
        output: folder for results.json, to which rows are added, results.csv and break_even_model.svg.
        json: print JSON.
    """
    config = sparsity.to_config()
    if config is None:
        raise ValueError("preset='dense' leaves nothing to compare; use --preset fast or paper")
    _report(benchmark_model(settings, config), output, json)


def _report(cases: Iterator[list[Row]], output: Path | None, json: bool) -> None:
    """Keeps and prints the rows of each case as soon as it is measured."""
    if output is not None:
        open_results(output)
    every: list[Row] = []
    for rows in cases:
        every += rows
        if output is not None:
            save_results(output, rows)
        if not json:
            tqdm.write(format_table(rows) + "\n")  # above the progress bars
    if json:
        print(json_format.dumps(every))
    elif output is not None:
        print(f"rows, table and plot are in {output}")


def format_table(rows: list[Row]) -> str:
    """Rows that were measured together as an aligned text table under a line that says what they share."""
    first = rows[0]
    of_model = first["benchmark"] == "model"
    if of_model:
        case = f"{first['model']}, {first['img_size']} px, N = {first['tokens']}, batch {first['batch']}"
    else:
        case = f"N = {first['tokens']}, {first['heads']} heads of {first['head_dim']}, batch {first['batch']}"
    shared = (
        f"{case}, {first['dtype']}, keep {first['keep']}, tile {first['tile']}, summary {first['summary']}, "
        f"{first['scorer']}, on {first['device']}"
    )
    return "\n".join([shared, *(_lines_of_calls(rows) if of_model else _lines_of_operations(rows))])


def _lines_of_operations(rows: list[Row]) -> list[str]:
    lines = [f"{'ratio: fastest dense / own':40}{'ms':>9}{'p10':>9}{'p90':>9}{'ratio':>8}{'relL2':>8}"]
    for row in rows:
        name = f"{row['part']} ({row['measure']})"
        if row["left_out"] is not None:
            lines.append(f"{name:40}left out: {row['left_out']}")
            continue
        figures = _cells(row, ("median_ms", "low_ms", "high_ms")) + _cell(row["ratio"], "8.2f")
        notes = ["fastest dense"] if row["part"] == row["baseline"] else []
        if row["memory_bytes"] is not None:
            notes.append(f"{row['memory_bytes'] / 2**20:.1f} MiB beyond inputs and result")
        if row["cuda"] is not None and not row["graph"]:
            notes.append("launched every time")
        figures += _cell(row.get("relative_l2"), "8.3f")
        lines.append(f"{name:40}{figures}  {', '.join(notes)}".rstrip())
    return lines


def _lines_of_calls(rows: list[Row]) -> list[str]:
    header = "".join(f"{title:>9}" for title in ("ms", "p10", "p90", "+ ms", "host ms", "kernels"))
    heading = f"{'ratio: dense called the same way / own':40}"
    lines = [f"{heading}{header}{'ratio':>8}{'p10':>6}{'p90':>6}{'images/s':>10}"]
    for row in rows:
        name = f"{row['part']}, {row['way']} ({row['measure']})"
        if row["left_out"] is not None:
            lines.append(f"{name:40}left out: {row['left_out']}")
            continue
        figures = _cells(row, ("median_ms", "low_ms", "high_ms", "difference_ms", "host_ms", "kernel_ms"))
        figures += _cell(row["ratio"], "8.2f") + _cell(row["ratio_low"], "6.2f")
        figures += _cell(row["ratio_high"], "6.2f") + _cell(row["images_per_second"], "10.1f")
        notes = [f"{row['sparse_layers']} of {row['layers']} layers sparse"] if row["part"] == SPARSE else []
        if row["memory_bytes"] is not None:
            notes.append(f"{row['memory_bytes'] / 2**20:.1f} MiB beyond the result")
        lines.append(f"{name:40}{figures}  {', '.join(notes)}".rstrip())
    return lines


def _cells(row: Row, columns: tuple[str, ...]) -> str:
    return "".join(_cell(row[column], "9.4g") for column in columns)


def _cell(value: float | None, form: str) -> str:
    """A number, or as much space where there is none."""
    return " " * len(format(0.0, form)) if value is None else format(value, form)
