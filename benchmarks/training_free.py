"""What sparsity costs without any training, and with calibration: dense teachers, all validation images.

    python benchmarks/training_free.py tiny_imagenet --data DATA --teachers TEACHERS
    python benchmarks/training_free.py tiny_imagenet --data DATA --teachers TEACHERS --groups floors
    python benchmarks/training_free.py cifar10 --data DATA --teachers TEACHERS
    python benchmarks/training_free.py tiny_imagenet_384 --data DATA --teachers TEACHERS

TEACHERS holds weights by name, such as vit_tiny_patch4_64.tiny_imagenet.safetensors. Each setting is
evaluated through the public API beside its dense teacher, on the same images; rows are written as they come.
Calibrated settings see 128 images of the training split and no labels. Teachers that are not shared come from
`sparsifiner train` with configs/cifar10_dense.yaml and configs/tiny_imagenet_384_dense.yaml.

The groups: "floors" (the preset fast within the floors' key visits), "designs" (one choice changed at a
time), "baselines" (other key lists at the same key visits) and "sweep" (budgets, for the curves; milliseconds
are of batches of 100 in bf16, to be measured alone on a machine).
"""

import argparse
import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, append_rows, provenance
from torch import Tensor, nn

import sparsifiner
from sparsifiner.calibration.budgets import calibrate
from sparsifiner.convert import sparse_layers
from sparsifiner.data import evaluation_transform, make_loader, open_images
from sparsifiner.measure.accuracy import evaluate
from sparsifiner.measure.recall import mask_recall
from sparsifiner.measure.timing import forward_calls, time_in_turns
from sparsifiner.models.loading import load_model
from sparsifiner.scorers import SCORERS, Impact, Oracle, Pooled, Random, Strided, Window

CALIBRATION_IMAGES = 128
RECALL_BATCHES = 5
SWEEP = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
Setting = dict[str, Any]

# The settings that the floors of 17 % (N = 257) and 12 % (N = 1025) of the key visits allow.
FAST_257: Setting = {"keep": 0.1, "tile": 4, "summary": 4}
FAST_577: Setting = {"keep": 0.1, "tile": 4, "summary": 4}
FAST_1025: Setting = {"keep": 0.1, "tile": 8, "summary": 8, "scorer": Impact(pool=2)}
EVEN: Setting = {"profile": "even"}
CALIBRATED: Setting = {"calibrated": True}


def groups_of(fast: Setting) -> dict[str, list[Setting]]:
    """Settings by group, around the one that is recommended."""
    tile = fast["tile"]
    pool = fast.get("scorer", Impact()).pool or tile // 2
    small = 3  # windows that take all the visits for themselves
    return {
        "floors": [fast, fast | CALIBRATED],
        "designs": [
            fast | {"scorer": Pooled()} | EVEN,
            fast | {"scorer": Pooled()},
            fast | EVEN,
            fast | EVEN | CALIBRATED,
            fast | {"scorer": Impact(pool=tile)},
            fast | {"scorer": Impact(pool=max(1, pool // 2) if pool == tile // 2 else tile // 2)},
            fast | {"tile": 2 * tile if tile == 4 else tile // 2, "scorer": Impact(pool=2)},
            fast | {"tile": 16, "scorer": Impact(pool=8)},
            fast | {"summary": None},
            fast | {"share": 2},
        ],
        "baselines": [fast | {"scorer": scorer} for scorer in (Random(), Window(), Strided(), Oracle())]
        + [fast | {"scorer": Random(), "keep": 1e-6, "summary": small}]
        + [fast | {"scorer": Oracle(), "tile": 1} | EVEN],
        "sweep": [
            chosen | {"keep": keep}
            for chosen in (fast, fast | {"scorer": Pooled()} | EVEN, fast | {"scorer": Random()} | EVEN)
            for keep in SWEEP
        ],
    }


# suite -> teacher -> side of its images and patches, and its settings
SUITES: dict[str, dict[str, tuple[int, int, Setting]]] = {
    "tiny_imagenet": {"vit_tiny_patch4_64": (64, 4, FAST_257), "vit_tiny_patch2_64": (64, 2, FAST_1025)},
    "tiny_imagenet_384": {"vit_tiny_patch16_384": (384, 16, FAST_577)},
    "cifar10": {"vit_tiny_patch4_64": (64, 4, FAST_257)},
}


def milliseconds(models: dict[str, nn.Module], images: Tensor) -> dict[str, dict[str, float | bool]]:
    """Time of a batch in bf16."""
    calls = forward_calls(models, images.bfloat16())
    timings = time_in_turns(calls, device=images.device, graphs=True)
    return {name: asdict(timing) for name, timing in timings.items()}


def measure(
    dense: nn.Module, setting: Setting, batches: list[Any], unlabelled: list[Tensor], device: str, timed: bool
) -> dict[str, Any]:
    options = {name: value for name, value in setting.items() if name != "calibrated"}
    sparse = sparsifiner.sparsify(copy.deepcopy(dense), **options)
    start = time.perf_counter()
    if setting.get("calibrated"):
        calibrate(sparse, unlabelled, device=device)
    seconds = time.perf_counter() - start
    macs = sparsifiner.count_macs(sparse, tuple(batches[0][0].shape[1:]))
    counted = macs.to_dict()
    config = sparse_layers(sparse)[0].config
    accuracy = evaluate(sparse, batches, dense=dense, device=device)
    return {
        "tokens": macs.tokens,
        "scorer": SCORERS.name_of(config.scorer),
        "pool": getattr(config.scorer, "pool", None),
        **{name: getattr(config, name) for name in ("tile", "profile", "summary", "share")},
        "keep": setting["keep"],
        "calibrated": setting.get("calibrated", False),
        "calibration_seconds": seconds if setting.get("calibrated") else None,
        "keep_by_layer": list(config.keep) if isinstance(config.keep, tuple) else None,
        "key_visits": counted["key_visits"],
        "scoring_share": counted["sparse"]["scorer"] / (counted["dense"]["attention"] / 2),
        "macs": counted["sparse"],
        "dense_macs": counted["dense"],
        "milliseconds": milliseconds({"dense": dense, "sparse": sparse}, batches[0][0].to(device))
        if timed
        else None,
        "mask_recall": mask_recall(sparse, batches[:RECALL_BATCHES], device=device),
        "dtype": "fp32",
        **accuracy.to_dict(),
        **provenance(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--groups", nargs="*", help="only these")
    parser.add_argument("--tokens", type=int, help="only the teacher with so many tokens")
    parser.add_argument("--output", type=Path, default=RESULTS / "training_free.json")
    parser.add_argument("--limit", type=int, help="number of validation images, for a first look")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = open_images(options.data, "validation", limit=options.limit)
    unlabelled = open_images(options.data, "train", limit=CALIBRATION_IMAGES)
    for teacher, (side, patch, fast) in SUITES[options.suite].items():
        if options.tokens not in {None, (side // patch) ** 2 + 1}:
            continue
        dense = load_model(
            "deit_tiny_patch16_224",
            weights=options.teachers / f"{teacher}.{options.suite.removesuffix('_384')}.safetensors",
            img_size=side,
            model_args={"patch_size": patch, "num_classes": images.num_classes},
        ).to(device)
        transform = evaluation_transform(dense, crop_pct=1.0)
        batches = list(make_loader(images, transform, 100, workers=options.workers))
        seen = [batch for batch, _ in make_loader(unlabelled, transform, 32, workers=options.workers)]
        for group, settings in groups_of(fast).items():
            if options.groups and group not in options.groups:
                continue
            for setting in settings:
                row = measure(dense, setting, batches, seen, device, timed=group == "sweep")
                append_rows(
                    options.output, [{"suite": options.suite, "teacher": teacher, "group": group, **row}]
                )
                against = row["against_dense"]
                print(
                    f"N {row['tokens']} {setting}: visits {100 * row['key_visits']:.1f} %, "
                    f"scoring {100 * row['scoring_share']:.0f} %, {row['top1']:.2f} "
                    f"({against['difference']:+.2f} ± {against['interval']:.2f}), agreement "
                    f"{against['agreement']:.1f}, KL {against['logit_kl']:.4f}, "
                    f"tokens {against['token_cosine']:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
