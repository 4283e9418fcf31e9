"""Writes docs/results.md from the measurements in docs/results/*.json: no figure is typed by hand.

python benchmarks/report.py
"""

import json
from typing import Any

from provenance import RESULTS

HEADER = """# Results

Every figure here was written by `python benchmarks/report.py` from the measurements in
`docs/results/`; each section names the command that made them.
"""


def load(name: str, *setting: str) -> list[dict[str, Any]]:
    """The latest row of each setting."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())
    return list({tuple(str(row[key]) for key in setting): row for row in rows}.values())


def source_of(rows: list[dict[str, Any]]) -> str:
    seen = {(r["device"], f"torch {r['torch']}", f"timm {r['timm']}", f"commit {r['commit']}") for r in rows}
    return "; ".join(", ".join(names) for names in sorted(seen))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def training_free() -> str:
    rows = load("training_free", "teacher", "scorer", "tile", "keep", "summary")
    body = []
    for row in rows:
        against = row["against_dense"]
        body.append([
            str(row["tokens"]),
            row["scorer"],
            str(row["tile"]),
            f"{row['keep']:g}",
            "none" if row["summary"] is None else f"{row['summary']}x{row['summary']}",
            f"{100 * row['key_visits']:.1f} %",
            f"{row['top1']:.2f}",
            f"{against['difference']:+.2f} ± {against['interval']:.2f}",
            f"{against['agreement']:.1f} %",
            f"{against['logit_kl']:.3f}",
        ])  # fmt: skip
    header = [
        "N",
        "scorer",
        "tile",
        "keep",
        "summaries",
        "key visits",
        "top-1",
        "difference",
        "agreement",
        "KL",
    ]
    dense = {row["tokens"]: row["against_dense"]["dense_top1"] for row in rows}
    teachers = ", ".join(f"{top1:.2f} at N = {tokens}" for tokens, top1 in dense.items())
    return f"""## Accuracy without any training

Tiny-ImageNet, all {rows[0]["images"]:,} validation images, ViT-Ti teachers (dense top-1 {teachers}), fp32.
"Difference" is in points of top-1 to the dense teacher with the paired 95 % interval, KL is of the logits.
Key visits are (listed keys + summary keys) / N. Oracle ranks by the true attention: it shows what the
form of sparsity allows, not what a scorer reaches.

`python benchmarks/training_free.py --data DATA --teachers TEACHERS` ({source_of(rows)})

{table(header, body)}
"""


def memory() -> str:
    rows = load("memory", "backend")
    body = [[r["backend"], f"{r['forward_mib']:.0f} MiB", f"{r['peak_mib']:.0f} MiB"] for r in rows]
    sizes = {row["backend"]: row["forward_mib"] for row in rows}
    share = sizes["torch"] / sizes["reference"]
    row = rows[0]
    window = f"{row['summary']}x{row['summary']}"
    return f"""## Peak memory

DeiT-S, 1024 px (N = {row["tokens"]}), batch 1, fp32, keep {row["keep"]}, tile {row["tile"]},
summaries {window}; one forward, each in a fresh process. "Forward" is what the forward adds to the
process: the torch backend takes {100 * share:.0f} % of the reference.

`python benchmarks/memory.py` ({source_of(rows)})

{table(["backend", "forward", "whole process"], body)}
"""


def main() -> None:
    sections = [HEADER, training_free(), memory()]
    (RESULTS.parent / "results.md").write_text("\n".join(sections))


if __name__ == "__main__":
    main()
