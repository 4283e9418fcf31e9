"""Writes the pages of docs/ and the table of README.md from docs/results/*.json: no figure is typed by hand.

python benchmarks/report.py
"""

import itertools
from typing import Any

import numpy as np
from calls_section import ratios_table
from figures import write_curves
from peers_page import comparison
from performance_page import performance
from provenance import RESULTS
from published import rows as published_rows
from tables import load, source_of, table
from training_section import runs, seeds_table, training

HEADER = """# Results

Every figure here was written by `python benchmarks/report.py` from the measurements in
`docs/results/`; each section names the command that made them.
"""

GROUPS = {
    "floors": """### The preset fast

The preset `fast` with the tile and the summaries given here, and calibrated on 128 unlabelled images of the
training split.""",
    "baselines": """### Other key lists at the same key visits

Random, window and strided lists with the same summaries, summaries with the prefix token and one random key (keep
1e-06), and the oracle, which ranks by the true attention: it shows what the form of sparsity allows, not what a
scorer reaches.""",
    "designs": "### One choice changed at a time",
    "sweep": "### Budgets",
}
TRAINED = """Trained, beside dense controls trained equally long from the same teachers; the last columns have
what is left where nothing is chosen, trained likewise (one seed):"""
CALLED = """Calls of whole models on a GPU, random weights, as they are and compiled: how many times as fast as dense called
the same way, with what 8 of 10 rounds lie between:"""
SETTING = ("scorer", "tile", "pool", "profile", "summary", "share", "keep", "calibrated")


def training_free() -> str:
    rows = load("training_free", "suite", "teacher", "group", *SETTING)
    dense = {(row["suite"], row["tokens"]): row["against_dense"]["dense_top1"] for row in rows}
    teachers = ", ".join(f"{top1:.2f} on {suite} at N = {tokens}" for (suite, tokens), top1 in dense.items())
    sections = [
        f"""## Accuracy without any training

All {rows[0]["images"]:,} validation images, ViT-Ti teachers (dense top-1 {teachers}), fp32. "Difference" is in
points of top-1 to the dense teacher with the paired 95 % interval, KL is of the logits, tokens are the final
patch tokens: mean cosine with, and relative distance from, the dense ones. Key visits are (listed keys + summary
keys) / N, scoring is in MACs of QKᵀ; both are means over the layers.

`python benchmarks/training_free.py SUITE --data DATA --teachers TEACHERS` ({source_of(rows)})
"""
    ]
    for group, heading in GROUPS.items():
        own = [row for row in rows if row["group"] == group]
        picture = ""
        if group == "sweep":
            write_curves(RESULTS.parent / "training_free.svg", own)
            picture = "\n\n![Top-1 and KL against key visits](training_free.svg)"
        sections.append(f"{heading}{picture}\n\n{training_free_table(own)}\n")
    return "\n".join(sections)


def training_free_table(rows: list[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        against, side = row["against_dense"], row["summary"]
        budgets = row["profile"]
        if row["calibrated"]:
            budgets = "calibrated" + (" from even" if budgets == "even" else "")
        body.append([
            row["suite"],
            str(row["tokens"]),
            row["scorer"] + (f", pool {row['pool']}" if row["pool"] else ""),
            str(row["tile"]),
            f"{row['keep']:g}, {budgets}" + (f", share {row['share']}" if row["share"] > 1 else ""),
            "none" if side is None else f"{side}x{side}",
            f"{100 * row['key_visits']:.1f} %",
            f"{100 * row['scoring_share']:.1f} %",
            f"{row['top1']:.2f}",
            f"{against['difference']:+.2f} ± {against['interval']:.2f}",
            f"{against['agreement']:.1f} %",
            f"{against['logit_kl']:.4f}",
            f"{against['token_cosine']:.4f}, {against['token_error']:.3f}",
        ])  # fmt: skip
    header = ["data", "N", "scorer", "tile", "keep", "summaries", "key visits", "scoring", "top-1"]
    return table([*header, "difference", "agreement", "KL", "tokens"], body)


def readme_table() -> str:
    """The preset fast on Tiny-ImageNet, without training and calibrated."""
    settings: dict[int, dict[bool, dict[str, Any]]] = {}
    times: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in load("training_free", "suite", "teacher", "group", *SETTING):
        if row["group"] == "floors" and row["suite"].startswith("tiny_imagenet"):
            settings.setdefault(row["tokens"], {})[row["calibrated"]] = row
        if row["group"] == "sweep":
            times[row["tokens"], *(row[name] for name in SETTING)] = row["milliseconds"]
    body = []
    for tokens, rows in sorted(settings.items()):
        row = rows[False]
        options = [f"keep={row['keep']:g}", f"tile={row['tile']}", f"summary={row['summary']}"]
        options += [f"scorer=Impact(pool={row['pool']})"] if row["pool"] else []
        lost = [rows[calibrated]["against_dense"] for calibrated in (False, True)]
        timed = times.get((tokens, *(row[name] for name in SETTING)))
        body.append([
            f"`{', '.join(options)}`",
            str(tokens),
            f"{100 * row['key_visits']:.1f} %",
            *(f"{each['difference']:+.2f} ± {each['interval']:.2f}" for each in lost),
            "" if timed is None or not timed["sparse"]["graph"] else f"{timed['dense']['median_ms'] / timed['sparse']['median_ms']:.2f}x",
        ])  # fmt: skip
    header = ["setting", "tokens", "key visits", "without training", "calibrated, no labels"]
    return table([*header, "speed on an H200, bf16, replayed"], body)


def published() -> str:
    """The paper's table of MACs beside our counts."""
    body = []
    for row in published_rows():
        runs = [f"{len(list(group))} x {count}" for count, group in itertools.groupby(row["tokens"])]
        body.append([
            row["name"],
            ", ".join(runs),
            "" if row["published"] is None else f"{row['published']:.1f}",
            f"{row['ours']:.1f}" + (" (does not follow)" if row["agrees"] is False else ""),
            f"{row['exact']:.1f}",
        ])  # fmt: skip
    return f"""## Published MACs

Millions of multiply-accumulates of QKᵀ, AV and predictor at 224 px, by the paper's accounting and exactly as this
package computes them. Where the published figure follows from no way of counting that was found, ours stands
beside it. The published DynamicViT rows have EViT's places (behind the attention of the blocks at the quarters);
as released it drops tokens before these blocks.

`python benchmarks/published.py`

{table(["model, share of tokens / of keys", "layers x tokens", "published", "ours", "exact"], body)}
"""


def memory() -> str:
    rows = load("memory", "backend")
    body = [[r["backend"], f"{r['forward_mib']:.0f} MiB", f"{r['peak_mib']:.0f} MiB"] for r in rows]
    sizes = {row["backend"]: row["forward_mib"] for row in rows}
    shares = {name: f"{100 * sizes[name] / sizes['reference']:.0f} %" for name in ("torch", "cpu")}
    row = rows[0]
    window = f"{row['summary']}x{row['summary']}"
    return f"""## Peak memory

DeiT-S, 1024 px (N = {row["tokens"]}), batch 1, fp32, keep {row["keep"]}, {row["profile"]}, scorer {row["scorer"]},
tile {row["tile"]}, summaries {window}; one forward, each in a fresh process. "Forward" is what the forward adds to
the process: of the reference the torch backend takes {shares["torch"]}, native code {shares["cpu"]}.

`python benchmarks/memory.py` ({source_of(rows)})

{table(["backend", "forward", "whole process"], body)}
"""


def training_memory() -> str:
    if not (RESULTS / "training_memory.json").exists():
        return ""
    rows = load("training_memory", "stage", "backend", "tokens", "keep")
    body = [
        [
            row["stage"],
            "dense" if row["backend"] == "dense" else f"{row['keep']:g}",
            str(row["tokens"]),
            str(row["keys"]),
            f"{row['tokens'] * row['keys']:,}",
            f"{row['step_mib']:.0f} MiB",
        ]
        for row in rows
    ]
    row = rows[0]
    sparse = [each for each in rows if each["stage"] == "distil" and each["backend"] == "torch"]
    design = np.array([[1, each["tokens"], each["tokens"] * each["keys"]] for each in sparse])
    measured = np.array([each["step_mib"] for each in sparse])
    fit, *_ = np.linalg.lstsq(design, measured, rcond=None)
    worst = np.abs(design @ fit / measured - 1).max()
    return f"""## Peak memory of training

One step with ViT-Ti's width, {row["depth"]} layers, batch {row["batch"]}, fp32, one key list per query; what the
step adds to the process, each in a fresh one. The first stage grows with N alone. The second is
{fit[0]:.0f} MiB + {1024 * fit[1]:.1f} KiB · N + {1024 * fit[2]:.2f} KiB · N·k, a least-squares fit that misses no
row by more than {100 * worst:.0f} %: linear in N·k. At these sizes it takes more memory than dense attention.

`python benchmarks/training_memory.py` ({source_of(rows)})

{table(["stage", "keep", "N", "k", "N·k", "step"], body)}
"""


def main() -> None:
    sections = [HEADER, training_free(), training(), runs(), published(), memory(), training_memory()]
    (RESULTS.parent / "results.md").write_text("\n".join(sections))
    (RESULTS.parent / "performance.md").write_text(performance())
    if any(RESULTS.glob("compare_*.json")):
        (RESULTS.parent / "peers.md").write_text(comparison())
    readme = RESULTS.parents[1] / "README.md"
    before, begin, rest = readme.read_text().partition("<!-- written by benchmarks/report.py -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not begin or not end:
        raise SystemExit(f"{readme} has lost the marks around its table; put them back")
    tables = [readme_table(), TRAINED, seeds_table()]
    called = ratios_table()
    tables += [CALLED, called] if called else []
    written = "\n\n".join(tables)
    readme.write_text(f"{before}{begin}\n{written}\n\n{end}{after}")


if __name__ == "__main__":
    main()
