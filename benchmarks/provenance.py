"""Where the figures of the documentation are kept, and how."""

from pathlib import Path

from sparsifiner.measure.records import append_rows, provenance

__all__ = ["RESULTS", "append_rows", "provenance"]

RESULTS = Path(__file__).parents[1] / "docs" / "results"
