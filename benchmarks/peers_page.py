"""docs/peers.md and its pictures: what `sparsifiner compare` measured."""

import json

import yaml
from provenance import RESULTS
from tables import source_of, table

from sparsifiner.compare.methods import METHODS
from sparsifiner.compare.pareto import write_pareto
from sparsifiner.compare.table import comparison_lines, picture_rows

CONFIGS = RESULTS.parents[1] / "configs" / "compare"
DTYPES = {"cuda": "bf16", "cpu": "fp32"}


def comparison() -> str:
    """Peers beside this package, one section per file that `sparsifiner compare` left in docs/results."""
    sections = [
        "# Peers\n\nWritten by `python benchmarks/report.py` from what `sparsifiner compare` measured.\n"
    ]
    for file in sorted(RESULTS.glob("compare_*.json")):
        rows = json.loads(file.read_text())
        picture = RESULTS.parent / f"{file.stem}.svg"
        write_pareto(picture, picture_rows(rows))
        header, lines = comparison_lines(rows)
        body = [[f"**{line[0][2:]}**" if line[0].startswith("+ ") else line[0], *line[1:]] for line in lines]
        settings = yaml.safe_load(
            (CONFIGS / f"{file.stem.replace('compare', 'tiny_imagenet')}.yaml").read_text()
        )
        geometry = ", ".join(
            f"{name} {settings[name]}" for name in ("tile", "summary", "pool") if name in settings
        )
        timed = sorted({
            f"{cost['device']} with batch {cost['batch']} in {DTYPES[place]}{', as replayed CUDA graphs' if cost['graph'] else ''} (torch {cost['torch']}, commit {cost['commit']})"
            for row in rows for place, cost in row["costs"].items()
        })  # fmt: skip
        absent = sorted(set(METHODS) - {row["method"] for row in rows}) if "methods" not in settings else []
        untimed = sorted(name for name in {row["method"] for row in rows} if not METHODS[name].is_timed)
        sections.append(
            f"""## N = {rows[0]["tokens"]}, {rows[0]["images"]:,} validation images

Every method starts from one dense model and is trained alike; "dense" is that model trained on alike, or, among
untrained rows, as it is. Differences to it are of top-1 points, with the bootstrap interval over images, right
answers averaged over seeds. Ours, in bold, have {geometry} and
budgets that fall with depth; patterns, oracle and "paper" are as published: even budgets and no summaries, which is
why even the oracle, which computes dense attention to choose, is no bound of ours. Key visits are (listed keys +
summary keys) / N. A star marks what no other row beats in top-1 at the same cost or less, intervals aside; the oracle
does not compete.

Each setting was timed alone and beside the dense model, not compiled: on {"; ".join(timed)}.{
                f" Not measured yet: {', '.join(absent)}." if absent else ""
            }{
                f" Not timed: {', '.join(untimed)}, which this package computes by a reference that was not written for speed."
                if untimed
                else ""
            } An empty cell was not measured.

`sparsifiner compare --config configs/compare/{file.stem.replace("compare", "tiny_imagenet")}.yaml` ({
                source_of(rows)
            })

![Top-1 against costs]({picture.name})

{table(header, body)}
"""
        )
    return "\n".join(sections)
