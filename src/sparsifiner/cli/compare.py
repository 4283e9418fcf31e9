"""The command that compares sparse attention with its peers."""

import json as json_format
import sys
from pathlib import Path
from typing import Literal

from sparsifiner.cli.options import DataOptions, ModelOptions, WeightOptions, build_model
from sparsifiner.compare import Comparison
from sparsifiner.compare import compare as compare_methods
from sparsifiner.compare.pareto import write_pareto
from sparsifiner.compare.table import format_comparison, format_row, picture_rows
from sparsifiner.convert import why_not
from sparsifiner.measure.records import write_csv
from sparsifiner.training import Recipe
from sparsifiner.training.data import seed_generators


def compare(
    model: ModelOptions,
    weights: WeightOptions,
    data: DataOptions,
    recipe: Recipe,
    comparison: Comparison,
    *,
    output: Path = Path("runs/compare"),
    device: Literal["auto", "cpu"] = "auto",
    json: bool = False,
) -> None:
    """Compares sparse attention with its peers: one data set, one dense model, one recipe; resumes itself.

    Args:
        model: the dense model.
        weights: what all methods start and learn from.
        data: the images.
        recipe: how every method is trained.
        comparison: what is compared.
        output: folder of results.json, results.csv, pareto.svg and the runs.
        device: where to train and to evaluate: "auto" takes a GPU if there is one.
        json: print all rows as JSON.
    """
    images, validation = data.open()
    seed_generators(recipe.seed)
    dense = build_model(model, weights, None, images.num_classes)
    reasons = why_not(dense)
    if reasons:
        raise ValueError(f"model={model.model!r} cannot be compared: {'; '.join(reasons)}")
    rows = compare_methods(
        dense,
        images,
        validation,
        recipe,
        comparison,
        output,
        device=device,
        report=lambda row: print(format_row(row), file=sys.stderr, flush=True),
    )
    write_csv(output / "results.csv", [{name: row[name] for name in row if name != "right"} for row in rows])
    write_pareto(output / "pareto.svg", picture_rows(rows))
    print(json_format.dumps(rows) if json else format_comparison(rows))
    print(f"rows, table and plot are in {output}", file=sys.stderr)
