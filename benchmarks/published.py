"""The paper's table of token and attention sparsity beside our counts, with real models.

    python benchmarks/published.py

Published are millions of multiply-accumulates of QKᵀ, AV and the predictor; ours by the paper's accounting,
and exact: what this package computes, whose predictor has another size.
"""

import warnings
from typing import Any, Final

import timm
import torch

import sparsifiner
from sparsifiner.tokens import DynamicViT, EViT, TokenMethod

AFTER: Final = "after attention"
# model, published name, tokens, keep, published MMACs of MHSA
# Source: Wei et al., "Sparsifiner", CVPR 2023, tables 2 and 3
PUBLISHED: list[tuple[str, str, TokenMethod | None, float | None, float | None]] = [
    ("deit_small_patch16_224", "DeiT-S", None, None, 357.7),
    ("deit_small_patch16_224", "EViT .7", EViT(0.7, fuse=False), None, 193.1),
    ("deit_small_patch16_224", "DynamicViT .7", DynamicViT(0.7, AFTER), None, 193.1),
    ("deit_small_patch16_224", "DynamicViT .7, as released", DynamicViT(0.7), None, None),
    ("deit_small_patch16_224", "Sparsifiner-EViT .7 / .25", EViT(0.7, fuse=False), 0.25, 113.3),
    ("deit_small_patch16_224", "Sparsifiner .7 / .25", DynamicViT(0.7, AFTER), 0.25, 113.3),
    ("deit_small_patch16_224", "EViT .5", EViT(0.5, fuse=False), None, 149.1),
    ("deit_small_patch16_224", "DynamicViT .5", DynamicViT(0.5, AFTER), None, 149.1),
    ("deit_small_patch16_224", "DynamicViT .5, as released", DynamicViT(0.5), None, None),
    ("deit_small_patch16_224", "Sparsifiner-EViT .5 / .25", EViT(0.5, fuse=False), 0.25, 86.6),
    ("deit_small_patch16_224", "Sparsifiner .5 / .25", DynamicViT(0.5, AFTER), 0.25, 86.6),
    ("lvvit_s", "LV-ViT-S", None, None, 476.9),
    ("lvvit_s", "EViT-LV-S .7", EViT(0.7, fuse=False), None, 256.0),
    ("lvvit_s", "DynamicViT-LV-S .7", DynamicViT(0.7, AFTER), None, 256.0),
    ("lvvit_s", "EViT-LV-S .5", EViT(0.5, fuse=False), None, 198.8),
    ("lvvit_s", "DynamicViT-LV-S .5", DynamicViT(0.5, AFTER), None, 198.8),
    ("lvvit_s", "Sparsifiner-LV-S .5", None, 0.5, 339.7),
    ("lvvit_s", "Sparsifiner-LV-S .25", None, 0.25, 221.7),
    ("lvvit_s", "Sparsifiner-LV-S .1", None, 0.1, 149.5),
]
# rows farther from the count than this follow from no way of counting that was found
TOLERANCE = 0.6


def rows() -> list[dict[str, Any]]:
    """Name, tokens of each layer, published and counted MMACs, and whether the two agree."""
    counted = []
    for name, label, tokens, keep, published in PUBLISHED:
        with warnings.catch_warnings(), torch.device("meta"):  # MACs depend on shapes alone
            warnings.simplefilter("ignore")  # an untrained scorer costs what a trained one costs
            model = timm.create_model(name)
            if keep is not None:
                sparsifiner.sparsify(model, preset="paper", keep=keep, tokens=tokens)
            elif tokens is not None:
                sparsifiner.sparsify(model, keep=1.0, summary=None, tokens=tokens)
        report = sparsifiner.count_macs(model)
        exact = sum(layer.attention + layer.scorer for layer in report.layers)
        assert report.paper_mhsa is not None
        ours = report.paper_mhsa / 1e6
        counted.append({
            "name": label,
            "tokens": [layer.tokens for layer in report.layers],
            "published": published,
            "ours": ours,
            "exact": exact / 1e6,
            "agrees": None if published is None else abs(ours - published) <= TOLERANCE,
        })  # fmt: skip
    return counted


if __name__ == "__main__":
    for row in rows():
        said = "" if row["published"] is None else f"{row['published']:.1f}"
        mark = {None: "", True: "", False: "  does not follow from the count"}[row["agrees"]]
        print(f"{row['name']:28}{said:>8}{row['ours']:9.1f}{row['exact']:9.1f}{mark}")
