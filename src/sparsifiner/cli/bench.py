"""The commands that measure time: each prints a table while it runs and keeps rows in a folder."""

import json as json_format
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from sparsifiner.cli.options import SparsityOptions
from sparsifiner.measure.bench_model import ModelBenchmark, benchmark_model
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
    """Times a sparse model against its dense twin: throughput, latency and, if asked for, training steps.

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
    """The rows of one case as an aligned text table under a line that says what they have in common."""
    first = rows[0]
    if first["benchmark"] == "ops":
        case = f"N = {first['tokens']}, {first['heads']} heads of {first['head_dim']}, batch {first['batch']}"
    else:
        case = f"{first['model']}, {first['img_size']} px, N = {first['tokens']}, batch {first['batch']}"
    lines = [
        f"{case}, {first['dtype']}, keep {first['keep']}, tile {first['tile']}, summary {first['summary']}, "
        f"{first['scorer']}, on {first['device']}",
        f"{'ratio: fastest dense / own':40}{'ms':>9}{'p10':>9}{'p90':>9}{'ratio':>8}{'images/s':>10}",
    ]
    for row in rows:
        name = f"{row['part']} ({row['measure']})"
        if row["left_out"] is not None:
            lines.append(f"{name:40}left out: {row['left_out']}")
            continue
        times = "".join(f"{row[column]:9.4g}" for column in ("median_ms", "low_ms", "high_ms"))
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        notes = ["fastest dense"] if row["part"] == row["baseline"] else []
        if row["memory_bytes"] is not None:
            notes.append(f"{row['memory_bytes'] / 2**20:.1f} MiB beyond inputs and result")
        if row["cuda"] is not None and not row["graph"]:
            notes.append("launched every time")
        speed = row.get("images_per_second")
        shown = "" if speed is None else f"{speed:.1f}"
        lines.append(f"{name:40}{times}{ratio:>8}{shown:>10}  {', '.join(notes)}".rstrip())
    return "\n".join(lines)
