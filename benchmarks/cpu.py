"""The CPU table of docs/performance.md: sparse against the fastest dense path, everything included.

    python benchmarks/cpu.py
    python benchmarks/cpu.py --rows "op, tiles" --threads 1

Every row runs what `sparsifiner bench` runs and keeps that command; medians over rounds in which candidates
take turns. Models have random weights, which does not change their time.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from provenance import RESULTS, append_rows

from sparsifiner.cli.bench import format_table
from sparsifiner.config import make_config
from sparsifiner.measure.bench_model import ModelBenchmark, benchmark_model
from sparsifiner.measure.bench_ops import OpsBenchmark, benchmark_operations

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
    img_size=[224, 512, 1024], batch_size=1, dtype="fp32", device="cpu", runs=11, warmup=2, latency=False
)
TILED = make_config("fast", keep=0.1, tile=8, summary=8, backend="cpu")
PAPER = make_config("paper", keep=0.1, backend="cpu")
ROWS = {
    "op, per query": PER_QUERY,
    "op, per query, bf16": replace(PER_QUERY, dtype="bf16"),
    "op, tiles": TILES,
    "op, tiles, bf16": replace(TILES, dtype="bf16"),
    "op, tiles, torch operations": replace(TILES, backend="torch"),
    "DeiT-S, tiles": (MODEL, TILED),
    "DeiT-S, tiles, bf16": (replace(MODEL, dtype="bf16"), TILED),
    "DeiT-S, per query": (MODEL, PAPER),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    options = parser.parse_args()
    for name in options.rows:
        for threads in options.threads:
            what = ROWS[name]
            if isinstance(what, OpsBenchmark):
                cases = benchmark_operations(replace(what, threads=threads))
            else:
                settings, config = what
                cases = benchmark_model(replace(settings, threads=threads), config)
            for rows in cases:
                append_rows(options.output, [{"row": name, "threads": threads, **row} for row in rows])
                print(name, format_table(rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()
