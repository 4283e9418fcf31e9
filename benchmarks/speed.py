"""The tables of docs/performance.md: sparse against dense, everything included.

    python benchmarks/speed.py cpu
    python benchmarks/speed.py cpu --rows "op, tiles" --threads 1
    python benchmarks/speed.py gpu
    python benchmarks/speed.py calls

Every row runs what `sparsifiner bench` runs and keeps that command; medians over rounds in which candidates
take turns. Models have random weights, which does not change their time. The table of calls goes on where it
broke off: what the same commit has measured is not measured again. `benchmarks/report.py` writes pages.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, append_rows, provenance

from sparsifiner.cli.bench import format_table
from sparsifiner.config import SparsifyConfig, make_config
from sparsifiner.measure.bench_model import ModelBenchmark, Setting, benchmark_model
from sparsifiner.measure.bench_ops import OpsBenchmark, benchmark_operations
from sparsifiner.measure.records import read_rows
from sparsifiner.scorers import Impact, Pooled
from sparsifiner.tokens import EViT

Work = OpsBenchmark | tuple[ModelBenchmark, SparsifyConfig]

PER_QUERY = OpsBenchmark(
    grid=[14, 24, 32],
    batch_size=1,
    prefix=1,
    tile=1,
    summary="none",
    scorer="lowrank",
    backend="cpu",
    dtype="fp32",
    device="cpu",
    runs=15,
)
TILES = replace(PER_QUERY, tile=8, summary=8, scorer="pooled")
MODEL = ModelBenchmark(
    img_size=[224, 512], batch_size=1, dtype="fp32", device="cpu", runs=11, warmup=2, latency=False
)
# compiling takes minutes, so compiled models are timed up to 512 px
LARGE = replace(MODEL, img_size=1024, runs=7, warmup=1, compile=False)
TILED = make_config("fast", keep=0.1, tile=8, summary=8, scorer=Pooled(), profile="even", backend="cpu")
FAST = make_config("fast", keep=0.1, backend="cpu")
PAPER = make_config("paper", keep=0.1, backend="cpu")
EVIT = make_config("fast", keep=1.0, tokens=EViT(keep=0.5), backend="cpu")
FAST_EVIT = replace(EVIT, keep=0.25)

GPU_TILES = OpsBenchmark(
    grid=[32, 64, 128],
    batch_size=[32, 8, 2],
    keep=[0.1, 0.1, 0.05],
    scorer="pooled",
    backend="triton",
    device="cuda",
)
GPU_IMPACT = replace(GPU_TILES, scorer="impact")
GPU_ONE = replace(GPU_TILES, grid=64, batch_size=8, keep=0.1)
GPU_PER_QUERY = replace(
    GPU_TILES, grid=[16, 24, 32], batch_size=[128, 64, 32], prefix=1, tile=1, summary="none", scorer="lowrank"
)
GPU_MODEL = ModelBenchmark(img_size=1024, batch_size=8, device="cuda", latency=False)
GPU_SMALLER = replace(GPU_MODEL, img_size=[224, 512, 1024], batch_size=[128, 32, 8])
GPU_LARGE = replace(GPU_MODEL, img_size=2048, batch_size=2)
GPU_TILED = replace(TILED, backend="triton")
# on a GPU fewer and longer lists pay, and few tokens are faster dense
GPU_FAST_EVIT = replace(FAST_EVIT, tile=16, scorer=Impact(pool=16), min_tokens=1000, backend="triton")
GPU_SPARSER = replace(GPU_TILED, keep=0.05)

CALLED = ModelBenchmark(device="cuda", latency=False, runs=30, warmup=5)
CALLED_LARGE = replace(CALLED, model="vit_large_patch16_224")
TILE_16 = make_config("fast", keep=0.1, profile="even", tile=16, scorer=Impact(pool=4))
TILE_8 = replace(TILE_16, tile=8)
CALLS: dict[str, Work] = {
    "DeiT-S, 1024 px": (replace(CALLED, img_size=1024, batch_size=[8, 1]), TILE_16),
    "ViT-L, 1024 px": (replace(CALLED_LARGE, img_size=1024, batch_size=2), TILE_16),
    "ViT-L, 1024x2048 px": (replace(CALLED_LARGE, img_size="1024x2048", batch_size=1), TILE_16),
    "DeiT-S, 2048 px": (replace(CALLED, img_size=2048, batch_size=2), replace(TILE_16, keep=0.05)),
    "ViT-L, 2048 px": (replace(CALLED_LARGE, img_size=2048, batch_size=1), replace(TILE_16, keep=0.05)),
    "ViT-B, 768 px": (replace(CALLED, model="vit_base_patch16_224", img_size=768, batch_size=4), TILE_8),
    "DeiT-S, 512 px": (replace(CALLED, img_size=512, batch_size=[32, 1]), TILE_8),
    "DeiT-S, 1024 px, training": (replace(CALLED, img_size=1024, batch_size=8, train=True), TILE_16),
}

TABLES: dict[str, dict[str, Work]] = {
    "calls": CALLS,
    "cpu": {
        "op, per query": PER_QUERY,
        "op, per query, bf16": replace(PER_QUERY, dtype="bf16"),
        "op, per query, bf16, lists for two layers": replace(PER_QUERY, dtype="bf16", share=2),
        "op, tiles": TILES,
        "op, tiles, bf16": replace(TILES, dtype="bf16"),
        "op, tiles, torch operations": replace(TILES, backend="torch"),
        "op, impact": replace(TILES, scorer="impact"),
        "DeiT-S, tiles": (MODEL, TILED),
        "DeiT-S, tiles, 1024 px": (LARGE, TILED),
        "DeiT-S, preset fast": (MODEL, FAST),
        "DeiT-S, preset fast, 1024 px": (LARGE, FAST),
        "DeiT-S, EViT": (MODEL, EVIT),
        "DeiT-S, EViT, 1024 px": (LARGE, EVIT),
        "DeiT-S, EViT, preset fast": (MODEL, FAST_EVIT),
        "DeiT-S, EViT, preset fast, 1024 px": (LARGE, FAST_EVIT),
        "DeiT-S, per query": (MODEL, PAPER),
        "DeiT-S, per query, 1024 px": (LARGE, PAPER),
    },
    "gpu": {
        "op, tiles": GPU_TILES,
        "op, impact": GPU_IMPACT,
        "op, impact, tile 16, pool 8": replace(GPU_IMPACT, tile=16, pool=8),
        "op, impact, tile 16, pool 4": replace(GPU_IMPACT, tile=16, pool=4),
        "op, tiles, lists for two layers": replace(GPU_TILES, share=2),
        "op, tiles, low-rank": replace(GPU_ONE, scorer="lowrank"),
        "op, tiles, backward": replace(GPU_ONE, backward=True),
        "op, tiles, low-rank, lists for two layers": replace(GPU_ONE, scorer="lowrank", share=2),
        "DeiT-S, tiles": (GPU_MODEL, GPU_TILED),
        "DeiT-S, tiles, 2048 px": (GPU_LARGE, GPU_SPARSER),
        "DeiT-S, preset fast": (GPU_MODEL, replace(FAST, backend="triton")),
        "DeiT-S, preset fast, 2048 px": (GPU_LARGE, replace(FAST, keep=0.05, backend="triton")),
        "DeiT-S, EViT": (GPU_SMALLER, replace(EVIT, backend="triton")),
        "DeiT-S, EViT, preset fast": (GPU_SMALLER, replace(FAST_EVIT, backend="triton")),
        "DeiT-S, EViT, preset fast, tile 16": (GPU_SMALLER, GPU_FAST_EVIT),
        "DeiT-S, EViT, preset fast, tile 16, dense below 2,000 tokens": (
            GPU_MODEL,
            replace(GPU_FAST_EVIT, min_tokens=2000),
        ),
        "DeiT-S, tiles, training": (replace(GPU_MODEL, train=True), GPU_TILED),
        "DeiT-S, tiles, lists for two layers": (GPU_MODEL, replace(GPU_TILED, share=2)),
        "DeiT-S, tiles, 2048 px, lists for two layers": (GPU_LARGE, replace(GPU_SPARSER, share=2)),
        **{
            f"op, per query, {how}, keep {keep:g}": replace(GPU_PER_QUERY, backend=backend, keep=keep)
            for keep in (0.1, 0.05, 0.25)
            for how, backend in (("packed", "triton"), ("masked", "torch"))
        },
        **{
            f"op, per query, {how}, backward": replace(
                GPU_PER_QUERY, backend=backend, keep=0.1, backward=True
            )
            for how, backend in (("packed", "triton"), ("masked", "torch"))
        },
    },
}


def cases(work: Work, threads: int | None, done: set[Setting]) -> Iterator[list[dict[str, Any]]]:
    if isinstance(work, OpsBenchmark):
        return benchmark_operations(replace(work, threads=threads))
    settings, config = work
    return benchmark_model(replace(settings, threads=threads), config, done)


def measured_settings(output: Path, name: str) -> set[Setting]:
    """What the commit has measured already of a row of the table of calls."""
    commit = provenance("cpu")["commit"]
    return {
        (row["img_size"], row["batch"], row["way"])
        for row in read_rows(output)
        if row["row"] == name and row["commit"] == commit and commit is not None
    }


def check_sparse(name: str, rows: list[dict[str, Any]]) -> None:
    """Refuses times of layers that stayed dense."""
    for row in rows:
        if row["sparse_layers"] != row["layers"]:
            raise SystemExit(f"{name}: {row['sparse_layers']} of {row['layers']} layers are sparse, not all")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--rows", nargs="*", help="only these, by name")
    parser.add_argument("--threads", nargs="*", type=int, help="of the CPU, 1 and all by default")
    parser.add_argument("--output", type=Path, help="file of rows, docs/results/TABLE.json by default")
    options = parser.parse_args(arguments)
    table = TABLES[options.table]
    unknown = set(options.rows or ()) - set(table)
    if unknown:
        parser.error(f"--rows {', '.join(unknown)}: choose from {', '.join(table)}")
    if options.threads and options.table != "cpu":
        parser.error("--threads is for the table cpu")
    counts = (options.threads or sorted({1, torch.get_num_threads()})) if options.table == "cpu" else [None]
    output = options.output or RESULTS / f"{options.table}.json"
    of_calls = options.table == "calls"
    for name in options.rows or table:
        for threads in counts:
            done = measured_settings(output, name) if of_calls else set()
            for rows in cases(table[name], threads, done):
                if of_calls:
                    check_sparse(name, rows)
                append_rows(output, [{"row": name, "threads": threads, **row} for row in rows])
                print(name, format_table(rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()
