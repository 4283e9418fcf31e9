"""The paper's curve: top-1 against keep after training, beside a dense control trained equally long.

    python benchmarks/training.py digits
    python benchmarks/training.py tiny_imagenet --data DATA --teacher TEACHER
    python benchmarks/training.py cifar10 --data DATA
    python benchmarks/training.py tiny_imagenet_fast --data DATA --teacher TEACHER --seeds 0 1 2
    python benchmarks/training.py scorer --data DATA --teacher TEACHER

Every model is trained and evaluated by the commands that users have; a row keeps its command. Runs are
resumed where they stopped, rows of finished ones are written at once. Rows may be divided among GPUs (`--rows
control 0.5` on one, `--rows 0.1` on another, each with an --output of its own) once the control is trained.
Other designs are rows of their own, by a name of VARIANTS: `--variants oracle`. The suite "scorer" changes
one thing about the low-rank scorer at a time and trains nothing else.
"""

import argparse
import contextlib
import io
import itertools
import json
import shlex
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from provenance import RESULTS, append_rows, provenance

from sparsifiner.cli import main as sparsifiner
from sparsifiner.cli.options import SparsityOptions

CONFIGS = Path(__file__).parents[1] / "configs"
KEEPS = (0.5, 0.25, 0.1, 0.05, 0.01)
# suite -> configuration of the sparse runs, of the dense teacher where none is shared, keeps
SUITES: dict[str, tuple[str, str | None, tuple[float, ...]]] = {
    "digits": ("digits", "digits_dense", KEEPS),
    "tiny_imagenet": ("tiny_imagenet_paper_keep25", None, KEEPS),
    "cifar10": ("cifar10_paper_keep25", "cifar10_dense", (0.25,)),
    "tiny_imagenet_fast": ("tiny_imagenet_fast_1025", None, (0.06,)),
    "scorer": ("tiny_imagenet_scorer", None, (0.1,)),
}
JOINT = "[{name: reconstruct, epochs: 2, warmup_epochs: 0.2, lr: 5.0e-3, min_lr: 2.0e-4}, " + (
    "{name: joint, epochs: 8, warmup_epochs: 1, lr: 5.0e-4, min_lr: 2.0e-6}]"
)
FALLING_SUMMARY4_BASIS64: list[object] = [
    *("--profile", "falling", "--summary", 4),
    *("--scorer.basis", 64, "--scorer.coef-topk", 16),
]
# design -> options that make it different
VARIANTS: dict[str | None, list[object]] = {
    None: [],
    "oracle": ["--scorer", "oracle"],
    "basis64": ["--scorer.basis", 64, "--scorer.coef-topk", 16],
    "basis64_joint": ["--scorer.basis", 64, "--scorer.coef-topk", 16, "--stages", JOINT],
    "falling_summary8": ["--profile", "falling", "--summary", 8],
    "falling_summary4_basis64": FALLING_SUMMARY4_BASIS64,
    "falling_summary4_basis64_no_features": [*FALLING_SUMMARY4_BASIS64, "--loss_weights.token", 0],
    # what lists of no thought reach beside the same summaries; "--rows 1e-06" leaves 1 random key
    "random": ["--scorer", "random"],
    "random_falling_summary4": ["--scorer", "random", "--profile", "falling", "--summary", 4],
    **{f"random_summary{side}": ["--scorer", "random", "--summary", side] for side in (2, 3, 4)},
}
# the suite "scorer": one choice changed at a time
ABLATIONS: dict[str | None, list[object]] = {
    "nothing": [],
    **{f"basis {size}": ["--scorer.basis", size] for size in (8, 16, 64, 128)},
    **{f"{kept} coefficients": ["--scorer.coef-topk", kept] for kept in (1, 4, 16, 32)},
    **{f"threshold {least:g}": ["--scorer.basis-threshold", least] for least in (0.0, 0.01, 0.05, 0.1)},
    **{f"reduced dim {size}": ["--scorer.reduced-dim", size] for size in (8, 16, 64)},
    **{f"tile {side}": ["--tile", side] for side in (2, 4, 8)},
    **{f"{side}x{side} summaries": ["--summary", side] for side in (8, 4, 2)},
    "falling": ["--profile", "falling"],
}


def run(*arguments: object) -> str:
    """Runs a command of sparsifiner here; returns what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = sparsifiner([str(argument) for argument in arguments])
    if code:
        raise SystemExit(f"sparsifiner {shlex.join(map(str, arguments))} failed")
    return printed.getvalue()


def train(config: str, output: Path, data: list[str], *options: object) -> tuple[list[dict[str, Any]], str]:
    """Trains, or resumes; returns the measurements and the command with names in the place of paths."""
    arguments = ["train", "--config", CONFIGS / f"{config}.yaml", *data, *options]
    run(*arguments, "--output", output, "--resume")
    shown = [f"configs/{config}.yaml" if word == CONFIGS / f"{config}.yaml" else word for word in arguments]
    if "--data" in shown:
        shown[shown.index("--data") + 1] = "DATA"
    if "--weights" in shown:
        shown[shown.index("--weights") + 1] = "TEACHER"
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return records, shlex.join(["sparsifiner", *map(str, shown)])


def _model_of(config: str) -> tuple[list[object], dict[str, Any]]:
    """The options that name the model of a configuration, and all its settings."""
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    named = ["--model", settings["model"], "--img-size", settings["img_size"]]
    return [*named, "--model-args", json.dumps(settings["model_args"])], settings


def evaluate(config: str, weights: Path, data: list[str], *options: object) -> dict[str, Any]:
    """Evaluates weights with the model of a configuration."""
    model, settings = _model_of(config)
    model += ["--crop-pct", settings["crop_pct"], "--workers", settings["workers"], "--batch-size", 100]
    report: dict[str, Any] = json.loads(run("eval", *model, *data, "--weights", weights, *options, "--json"))
    return report


def count(config: str, sparsity: list[object]) -> dict[str, Any]:
    """MACs and key visits of the model of a configuration."""
    report: dict[str, Any] = json.loads(run("macs", *_model_of(config)[0], *sparsity, "--json"))
    return report


def _written(value: object) -> object:
    return json.dumps(value) if isinstance(value, list) else value


def sparsity_of(settings: dict[str, Any]) -> list[object]:
    """The options that make a model as sparse as in a run."""
    given = {field.name: settings[field.name] for field in fields(SparsityOptions)}
    return [
        word
        for name, value in given.items()
        if value is not None and value is not False
        for word in ([f"--{name}"] if value is True else [f"--{name}", _written(value)])
    ]


def finished(run: Path) -> bool:
    """Whether a run has done all its epochs: its weights are written after every one."""
    if not (run / "metrics.jsonl").exists():
        return False
    stages = yaml.safe_load((run / "config.yaml").read_text())["stages"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return (last["kind"], last["stage"], last["epoch"]) == (
        "validation",
        stages[-1]["name"],
        stages[-1]["epochs"],
    )


def measure(
    options: argparse.Namespace,
    teacher: Path,
    data: list[str],
    keep: float | None,
    variant: str | None,
    seed: int,
    sparsity: list[object],
) -> dict[str, Any]:
    """Trains one model, evaluates it beside its control and its teacher, returns the row."""
    config = SUITES[options.suite][0]
    name = "control" if keep is None else f"keep_{keep:g}"
    name += f"_{variant}".replace(" ", "_") if variant else ""
    output = options.runs / f"{options.suite}_{name}_{seed}"
    more = ["--seed", seed, *shlex.split(options.options)]
    control = options.runs / f"{options.suite}_control_{seed}"
    compared = options.suite != "scorer"  # whose backbones are the teacher's
    if compared and keep is not None and not finished(control):
        raise SystemExit(f"{control} has not finished; train the row control of seed {seed} first")
    records, command = train(config, output, data, "--weights", teacher, *sparsity, *more)
    settings = yaml.safe_load((output / "config.yaml").read_text())
    # the evaluation runs in fp32
    given = [*sparsity_of(settings), *([] if keep is None else ["--mask-recall"])]
    last = output / "last.safetensors"
    to_teacher = evaluate(config, last, data, *given, "--dense-weights", teacher)
    to_control = None
    if compared:
        weights = control / "last.safetensors"
        to_control = evaluate(config, last, data, *given, "--dense-weights", weights)["against_dense"]
    validations = [record for record in records if record["kind"] == "validation"]
    first = [record["top1"] for record in validations if record["stage"] == "reconstruct"]
    speeds: dict[str, list[float]] = {}
    for record in records:
        if record["kind"] == "train":
            speeds.setdefault(record["stage"], []).append(record["images_per_second"])
    recall = to_teacher["mask_recall"]
    counted = count(config, sparsity_of(settings))
    return {
        "suite": options.suite,
        "keep": keep,
        "variant": variant,
        "seed": settings["seed"],
        "key_visits": counted["key_visits"],
        "macs": counted["sparse"],
        "epochs": {stage["name"]: stage["epochs"] for stage in settings["stages"]},
        "amp": settings["amp"],
        "images": to_teacher["images"],
        "dense_top1": to_teacher["against_dense"]["dense_top1"],
        "top1_after_reconstruct": first[-1] if first else None,
        "top1": to_teacher["top1"],
        "against_control": to_control,
        "against_teacher": to_teacher["against_dense"],
        "mask_recall": sum(recall) / len(recall) if recall else None,
        "mask_recall_by_layer": recall,
        "sharing": options.sharing,
        "images_per_second": {stage: statistics.median(found) for stage, found in speeds.items()},
        "command": command,
        **provenance("cuda" if torch.cuda.is_available() else "cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data")
    parser.add_argument("--teacher", type=Path, help="weights of the dense teacher")
    parser.add_argument("--rows", nargs="*", help="only these: control, or a keep")
    parser.add_argument(
        "--variants", nargs="*", help="designs of VARIANTS, or of ABLATIONS in the suite scorer"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--sharing", type=int, default=1, help="runs that shared the GPU, for the record")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=RESULTS / "training.json")
    parser.add_argument("--options", default="", help="more options for every training")
    options = parser.parse_args()
    config, teacher_config, keeps = SUITES[options.suite]
    data = ["--data", options.data] if options.data else []

    teacher = options.teacher
    if teacher_config is not None and teacher is None:
        folder = options.runs / teacher_config
        train(teacher_config, folder, data, *shlex.split(options.options))
        teacher = folder / "last.safetensors"
    given_by_config = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text()).keys() & {
        field.name for field in fields(SparsityOptions)
    }
    unset = [word for name in sorted(given_by_config - {"preset"}) for word in (f"--{name}", "null")]
    dense: list[object] = ["--preset", "dense", *unset]
    ablates = options.suite == "scorer"
    designs = ABLATIONS if ablates else VARIANTS
    unknown = set(options.variants or ()) - set(map(str, designs))
    if unknown:
        parser.error(f"--variants {', '.join(unknown)}: choose from {', '.join(map(str, designs))}")
    variants = options.variants or (list(designs) if ablates else [None])
    default_rows = keeps if ablates else ("control", *keeps)
    rows = [None if row == "control" else float(row) for row in map(str, options.rows or default_rows)]
    for seed, keep, variant in itertools.product(options.seeds, rows, variants):
        if keep is None and variant != variants[0]:  # all designs have one control
            continue
        sparsity = dense if keep is None else ["--keep", keep, *designs[variant]]
        row = measure(options, teacher, data, keep, None if keep is None else variant, seed, sparsity)
        append_rows(options.output, [row])
        to = "teacher" if row["against_control"] is None else "control"
        difference = row[f"against_{to}"]
        print(
            f"{options.suite} {keep or 'control'} {variant or ''} seed {seed}: top-1 {row['top1']:.2f} "
            f"({difference['difference']:+.2f} ± {difference['interval']:.2f} to the {to}), "
            f"KL to the teacher {row['against_teacher']['logit_kl']:.4f}, "
            f"recall {row['mask_recall'] or 1:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
