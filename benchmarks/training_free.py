"""What sparsity costs without any training: the shared teachers on Tiny-ImageNet's validation images.

    python benchmarks/training_free.py --data ../shared/data/tiny-imagenet --teachers ../shared/checkpoints

Each setting is evaluated through the public API beside its dense teacher, on the same images.
"""

import argparse
import copy
from dataclasses import asdict
from pathlib import Path

import torch
from provenance import RESULTS, append_rows, provenance

import sparsifiner
from sparsifiner.data import evaluation_transform, make_loader, open_images
from sparsifiner.measure.accuracy import evaluate
from sparsifiner.models.loading import load_model
from sparsifiner.trace import trace

SETTINGS = {
    "vit_tiny_patch4_64": [
        {"scorer": "oracle", "tile": 1, "keep": 0.1, "summary": None},
        {"scorer": "oracle", "tile": 1, "keep": 0.1, "summary": 4},
        {"scorer": "pooled", "tile": 8, "keep": 0.1, "summary": None},
        {"scorer": "pooled", "tile": 8, "keep": 0.1, "summary": 2},
        {"scorer": "random", "tile": 8, "keep": 0.1, "summary": 2},
        {"scorer": "window", "tile": 8, "keep": 0.1, "summary": 2},
        {"scorer": "strided", "tile": 8, "keep": 0.1, "summary": 2},
    ],
    "vit_tiny_patch2_64": [
        {"scorer": "pooled", "tile": 8, "keep": 0.05, "summary": None},
        {"scorer": "pooled", "tile": 8, "keep": 0.05, "summary": 4},
        {"scorer": "pooled", "tile": 8, "keep": 0.05, "summary": 4, "share": 2},
        {"scorer": "random", "tile": 8, "keep": 0.05, "summary": 4},
    ],
}
PATCH = {"vit_tiny_patch4_64": 4, "vit_tiny_patch2_64": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "training_free.json")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = open_images(options.data, "validation", limit=options.limit)
    for teacher, settings in SETTINGS.items():
        dense = load_model(
            "deit_tiny_patch16_224",
            weights=options.teachers / f"{teacher}.tiny_imagenet.safetensors",
            img_size=64,
            model_args={"patch_size": PATCH[teacher], "num_classes": images.num_classes},
        ).to(device)
        transform = evaluation_transform(dense, crop_pct=1.0)
        batches = list(make_loader(images, transform, 100, workers=options.workers))
        for setting in settings:
            sparse = sparsifiner.sparsify(copy.deepcopy(dense), **setting)
            with torch.inference_mode(), trace(sparse) as traces:
                sparse(batches[0][0][:1].to(device))
            layout, summary = traces[0].connectivity.layout, traces[0].summary
            windows = layout.squares(summary) if summary else 0
            budget = traces[0].connectivity.indices.shape[-1]
            accuracy = evaluate(sparse, batches, dense=dense, device=device)
            row = {
                "teacher": teacher,
                "tokens": layout.tokens,
                **setting,
                "key_visits": (budget + windows) / layout.tokens,
                "dtype": "fp32",
                **asdict(accuracy),
                **provenance(device),
            }
            append_rows(options.output, [row])
            against = accuracy.against_dense
            print(
                f"{teacher} {setting}: {accuracy.top1:.2f} "
                f"({against.difference:+.2f} ± {against.interval:.2f}), "
                f"agreement {against.agreement:.1f}, KL {against.logit_kl:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
