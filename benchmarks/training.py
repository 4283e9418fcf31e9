"""The paper's curve: top-1 against keep after training, beside a dense control trained equally long.

    python benchmarks/training.py digits
    python benchmarks/training.py tiny_imagenet --data DATA --teacher TEACHER
    python benchmarks/training.py cifar10 --data DATA
    python benchmarks/training.py tiny_imagenet_fast --data DATA --teacher TEACHER --seeds 0 1 2

Every model is trained and evaluated by the commands that users have; a row keeps its command. Runs are
resumed where they stopped, rows of finished ones are written at once. Rows may be divided among GPUs (`--rows
control 0.5` on one, `--rows 0.1` on another, each with an --output of its own) once the control is trained.
Other designs are rows of their own: `--variant oracle --sparsity "--scorer oracle"`.
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


def evaluate(config: str, weights: Path, data: list[str], *options: object) -> dict[str, Any]:
    """Evaluates weights with the model of a configuration."""
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    model = ["--model", settings["model"], "--img-size", settings["img_size"]]
    model += ["--model-args", json.dumps(settings["model_args"]), "--crop-pct", settings["crop_pct"]]
    model += ["--workers", settings["workers"], "--batch-size", 100]
    report: dict[str, Any] = json.loads(run("eval", *model, *data, "--weights", weights, *options, "--json"))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data")
    parser.add_argument("--teacher", type=Path, help="weights of the dense teacher")
    parser.add_argument("--rows", nargs="*", help="only these: control, or a keep")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--sharing", type=int, default=1, help="runs that shared the GPU, for the record")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=RESULTS / "training.json")
    parser.add_argument("--options", default="", help="more options for every training")
    parser.add_argument(
        "--sparsity", default="", help="more options of the sparse models, such as --basis 64"
    )
    parser.add_argument("--variant", help="name of what the options make different, for rows of their own")
    options = parser.parse_args()
    config, teacher_config, keeps = SUITES[options.suite]
    data = ["--data", options.data] if options.data else []
    more = shlex.split(options.options)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    teacher = options.teacher
    if teacher_config is not None and teacher is None:
        folder = options.runs / teacher_config
        train(teacher_config, folder, data, *more)
        teacher = folder / "last.safetensors"
    weights = ["--weights", teacher]
    given_by_config = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text()).keys() & {
        field.name for field in fields(SparsityOptions)
    }
    unset = [word for name in sorted(given_by_config - {"preset"}) for word in (f"--{name}", "null")]
    dense = ["--preset", "dense", *unset]
    rows = [None if row == "control" else float(row) for row in options.rows or ["control", *keeps]]
    for seed, keep in itertools.product(options.seeds, rows):
        name = "control" if keep is None else f"keep_{keep:g}"
        name += f"_{options.variant}" if options.variant else ""
        output = options.runs / f"{options.suite}_{name}_{seed}"
        sparsity = dense if keep is None else ["--keep", keep, *shlex.split(options.sparsity)]
        records, command = train(config, output, data, *weights, *sparsity, "--seed", seed, *more)
        settings = yaml.safe_load((output / "config.yaml").read_text())
        # the evaluation runs in fp32
        given = [*sparsity_of(settings), *([] if keep is None else ["--mask-recall"])]
        last = output / "last.safetensors"
        control = options.runs / f"{options.suite}_control_{seed}" / "last.safetensors"
        to_control = evaluate(config, last, data, *given, "--dense-weights", control)
        to_teacher = evaluate(config, last, data, *given, "--dense-weights", teacher)
        validations = [record for record in records if record["kind"] == "validation"]
        first = [record["top1"] for record in validations if record["stage"] == "reconstruct"]
        speeds: dict[str, list[float]] = {}
        for record in records:
            if record["kind"] == "train":
                speeds.setdefault(record["stage"], []).append(record["images_per_second"])
        recall = to_teacher["mask_recall"]
        row = {
            "suite": options.suite,
            "keep": keep,
            "variant": options.variant,
            "seed": settings["seed"],
            "epochs": {stage["name"]: stage["epochs"] for stage in settings["stages"]},
            "amp": settings["amp"],
            "images": to_teacher["images"],
            "dense_top1": to_teacher["against_dense"]["dense_top1"],
            "top1_after_reconstruct": first[-1] if first else None,
            "top1": to_teacher["top1"],
            "against_control": to_control["against_dense"],
            "against_teacher": to_teacher["against_dense"],
            "mask_recall": sum(recall) / len(recall) if recall else None,
            "sharing": options.sharing,
            "images_per_second": {stage: statistics.median(found) for stage, found in speeds.items()},
            "command": command,
            **provenance(device),
        }
        append_rows(options.output, [row])
        difference = to_control["against_dense"]
        print(
            f"{options.suite} {name}: top-1 {row['top1']:.2f} ({difference['difference']:+.2f} ± "
            f"{difference['interval']:.2f} to the control), recall {row['mask_recall'] or 1:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
