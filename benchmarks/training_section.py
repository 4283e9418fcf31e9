"""What training reaches: sections of docs/results.md and a table of README.md."""

import itertools
import json
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from provenance import RESULTS
from tables import load, source_of, table

TRAINING_IMAGES = {
    "digits": 1437,
    "tiny_imagenet": 100_000,
    "tiny_imagenet_fast": 100_000,
    "scorer": 100_000,
    "cifar10": 50_000,
}
# The keep of rows that choose next to nothing: it leaves lists of the prefix token and one random key.
ONE_RANDOM_KEY = 1e-06
_ROOT = Path(__file__).parents[1]
# options of scorers as rows spell them that were measured before these were objects
_OLD = ("--basis", "--reduced-dim", "--coef-topk", "--basis-threshold", "--pool")


def _rows() -> list[dict[str, Any]]:
    """Suites in the order of the file; in each the controls first, then by keep, design and seed."""
    rows = load("training", "suite", "keep", "variant", "seed")
    suites = list(dict.fromkeys(row["suite"] for row in rows))

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        keep = row["keep"]
        design = "" if row["suite"] == "scorer" else row.get("variant") or ""
        return suites.index(row["suite"]), keep is not None, -(keep or 0), design, row["seed"]

    return sorted(rows, key=place)


def minutes_of(row: dict[str, Any]) -> float:
    """Time of the training steps, from their speed."""
    epochs, speed = row["epochs"], row["images_per_second"]
    return sum(TRAINING_IMAGES[row["suite"]] * float(epochs[stage] / speed[stage]) for stage in speed) / 60


def training() -> str:
    """A table for each suite."""
    rows = _rows()
    sections = [
        f"""## After training

The paper's two stages: the scorer learns the attention of the dense teacher, then the backbone learns to do
with what the scorer chooses; the suite tiny_imagenet_fast has the second alone. The control is the dense
teacher trained on by the second stage's recipe, equally long.

Rows of several seeds, each seed beside a control of its own; with random lists, and with summaries
and one random key per list, seed 0:

{seeds_table(rows)}

In the tables below, "before" is top-1 after the first stage, of the control that of the teacher; "to the
control" has the paired 95 % interval, and the top-1 of the control beside which the row was made; key
visits are (listed keys + summary keys) / N; recall is the share of the model's own dense attention on the
listed keys; images/s are those of the stages, measured beside up to as many other runs on the same device
as it says. Seed 0 unless it says another, last weights, all validation images. Settings and measurements of
runs are in `docs/results/runs/`: `sparsifiner train --config` with such a config.yaml, the names of data
and weights filled in, makes the run again.
"""
    ]
    for suite, own in itertools.groupby(rows, key=lambda row: row["suite"]):
        sections.append(_suite(suite, list(own)))
    return "\n".join(sections)


def _suite(suite: str, rows: list[dict[str, Any]]) -> str:
    compared = "control" if any(row["keep"] is None for row in rows) else "teacher"
    body = []
    for row in rows:
        before, against = row["top1_after_reconstruct"], row[f"against_{compared}"]
        beside = f" (beside {row['sharing'] - 1})" if row.get("sharing", 1) > 1 else ""
        body.append([
            ("dense control" if row["keep"] is None else f"{row['keep']:g}")
            + (f", {row['variant']}" if row.get("variant") else "")
            + (f", seed {row['seed']}" if row["seed"] else ""),
            "" if before is None and row["keep"] is not None else f"{before or row['dense_top1']:.2f}",
            f"{row['top1']:.2f}",
            "" if row["keep"] is None else _difference(against),
            f"{row['against_teacher']['agreement']:.1f} %",
            f"{row['against_teacher']['logit_kl']:.4f}" if "logit_kl" in row["against_teacher"] else "",
            "" if "key_visits" not in row else f"{100 * row['key_visits']:.1f} %",
            "" if row["mask_recall"] is None else f"{row['mask_recall']:.3f}",
            " / ".join(f"{value:.0f}" for value in row["images_per_second"].values()) + beside,
            f"{minutes_of(row):.0f}",
            f"`{row['command']}`",
        ])  # fmt: skip
    header = ["keep", "before", "after", f"to the {compared}", "agreement with the teacher"]
    header += ["KL to the teacher", "key visits", "recall", "images/s", "minutes", "command"]
    epochs = " + ".join(str(count) for count in rows[-1]["epochs"].values())
    precision = "fp32" if rows[0]["amp"] == "none" else rows[0]["amp"]
    said = ""
    if suite == "scorer":
        said = (
            'The first stage alone; each row but "nothing" changes one thing about keep 0.1 of\n'
            "tiny_imagenet (basis 32, reduced dim 32, 8 coefficients, threshold 0.02, a list for every\n"
            "query, even budgets, no summaries).\n\n"
        )
    by_layer = "" if suite != "scorer" else f"\nRecall of each layer:\n\n{_recall_table(rows)}\n"
    return (
        f"### {suite}: {epochs} epochs, {rows[0]['images']:,} validation images, {precision}\n\n"
        f"{said}`python benchmarks/training.py {suite}` ({source_of(rows)})\n\n{table(header, body)}\n"
        + by_layer
    )


def _difference(against: dict[str, Any]) -> str:
    """With the top-1 that it is to: rows keep the control of their own run."""
    return f"{against['difference']:+.2f} ± {against['interval']:.2f} ({against['dense_top1']:.2f})"


def _recall_table(rows: list[dict[str, Any]]) -> str:
    layers = len(rows[0]["mask_recall_by_layer"])
    body = [[row["variant"], *(f"{share:.2f}" for share in row["mask_recall_by_layer"])] for row in rows]
    return table(["changed", *map(str, range(1, layers + 1))], body)


def seeds_table(rows: list[dict[str, Any]] | None = None) -> str:
    """Designs that were trained with several seeds, and what they lose to their controls.

    Beside them stands what is left without any choice: random lists with the same summaries, and
    summaries beside one random key whose visits come nearest.
    """
    body = []
    rows = rows or _rows()
    several = [row for row in rows if row["keep"] is not None and row["suite"] != "scorer"]
    for _, group in itertools.groupby(
        several, key=lambda row: (row["suite"], row["keep"], row.get("variant"))
    ):
        own = list(group)
        if len(own) < 2:
            continue
        lost = [row["against_control"]["difference"] for row in own]
        config, options = _setting_of(own[0]["command"])
        settings = yaml.safe_load((_ROOT / config).read_text())
        side = settings["img_size"] // settings["model_args"]["patch_size"]
        body.append([
            f"`{config}`" + (f" with `{options}`" if options else ""),
            str(side**2 + 1),
            f"{100 * own[0]['key_visits']:.1f} %",
            " + ".join(str(count) for count in own[0]["epochs"].values()),
            f"{mean(row['top1'] for row in own):.2f}",
            f"{mean(lost):+.2f}",
            ", ".join(f"{each:+.2f}" for each in lost),
            *_without_choice(own[0], rows),
        ])  # fmt: skip
    header = ["setting", "tokens", "key visits", "epochs", "top-1", "to the control", "of each seed"]
    header += ["random lists", "summaries + 1 random key (key visits)"]
    return table(header, body)


def _without_choice(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, str]:
    """What rows of the same suite lose to their control with random lists, and with one random key."""
    random = [each for each in rows if each["suite"] == row["suite"] and "--scorer random" in each["command"]]
    (lists,) = (
        each for each in random if (each["keep"], each["key_visits"]) == (row["keep"], row["key_visits"])
    )
    one_key = min(
        (each for each in random if each["keep"] == ONE_RANDOM_KEY),
        key=lambda each: abs(each["key_visits"] - row["key_visits"]),
    )
    return (
        f"{lists['against_control']['difference']:+.2f}",
        f"{one_key['against_control']['difference']:+.2f} ({100 * one_key['key_visits']:.1f} %)",
    )


def _setting_of(command: str) -> tuple[str, str]:
    """Configuration of a training command, and what was given beside it but for data, weights and seed."""
    words = shlex.split(command)[2:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    config = given.pop("--config")
    for name in ("--data", "--weights", "--seed", "--workers"):
        given.pop(name, None)
    now = {name.replace("--", "--scorer.") if name in _OLD else name: value for name, value in given.items()}
    return config, shlex.join(word for pair in now.items() for word in pair)


def runs() -> str:
    """The last validation of every saved run, beside that of its control."""
    last = {}
    for file in sorted((RESULTS / "runs").glob("*/metrics.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        last[file.parent.name] = [record for record in records if record["kind"] == "validation"][-1]
    body = []
    for name, record in last.items():
        suite, seed = name.partition("_control_")[0].partition("_keep_")[0], name.rpartition("_")[2]
        control = last.get(f"{suite}_control_{seed}")
        row = [name, record["stage"], f"{record['epoch']:.0f}"]
        for kind in ("top1", "top1_ema"):
            value, compared = record.get(kind), (control or {}).get(kind)
            lost = "" if None in (value, compared) or control is record else f" ({value - compared:+.2f})"
            row.append("" if value is None else f"{value:.2f}{lost}")
        row.append("" if record.get("mask_recall") is None else f"{record['mask_recall']:.3f}")
        body.append(row)
    header = [
        "run",
        "stage",
        "epoch",
        "top-1 (to the control)",
        "of the averaged weights",
        "recall",
    ]
    return f"""## Saved runs

The last validation within each run of `docs/results/runs/`, all validation images, in the dtype that it
trained in, with the difference to the control of the same suite and seed, not paired. Each folder holds
settings and measurements; weights are not shipped: `sparsifiner train --config` makes them again, as above.

{table(header, body)}
"""
