"""A folder of results: all rows ever measured, a table of them, and where sparse breaks even."""

from pathlib import Path

from sparsifiner.measure.break_even import write_break_even
from sparsifiner.measure.records import Row, append_rows, read_rows, write_csv


def open_results(folder: Path) -> None:
    """Makes the folder if it is not there, and finds out before the work that it can be written to.

    Raises:
        OSError: it cannot be made.
        ValueError: its results.json holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    read_rows(folder / "results.json")


def save_results(folder: Path, rows: list[Row]) -> None:
    """Adds rows to results.json, and writes results.csv and the break-even plots of all of its rows.

    Args:
        folder: where to write.
        rows: new rows; earlier ones stay.
    """
    every = append_rows(folder / "results.json", rows)
    write_csv(folder / "results.csv", every)
    for benchmark in sorted({row["benchmark"] for row in rows}):
        write_break_even(folder / f"break_even_{benchmark}.svg", every, benchmark)
