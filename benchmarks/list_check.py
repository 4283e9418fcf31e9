"""What it costs to look for tokens that are not there, where a caller makes a Connectivity, beside attention.

python benchmarks/list_check.py
"""

from typing import Any

import torch
from provenance import RESULTS, append_rows, provenance

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.measure.timing import time_in_turns
from sparsifiner.ops import sparse_attention

LAYOUT, HEADS, HEAD_DIM, KEEP, THREADS = TokenLayout((32, 32), 1), 6, 64, 0.1, 2
# side of the tiles, side of the summary windows
CASES: tuple[tuple[int, int | None], ...] = ((8, 4), (1, None))


def measure(tile: int, summary: int | None) -> dict[str, Any]:
    """Milliseconds of attention, and of making its lists with the check and without."""
    q, k, v = torch.randn(3, 1, HEADS, LAYOUT.tokens, HEAD_DIM).unbind()
    budget = -(-int(KEEP * 1000) * LAYOUT.tokens // 1000)
    scores = torch.rand(1, HEADS, LAYOUT.squares(tile), LAYOUT.tokens)
    lists = scores.topk(budget, -1).indices.sort(-1).values.int()
    geometry = (lists, LAYOUT.grid, tile, LAYOUT.prefix)
    connectivity = Connectivity(*geometry)
    timings = time_in_turns(
        {
            "attention": lambda: sparse_attention(q, k, v, connectivity, summary),
            "checked": lambda: Connectivity(*geometry),
            "unchecked": lambda: Connectivity(*geometry, check=False),
        },
        runs=200,
        warmup=20,
    )
    times = {f"{name}_ms": timing.median_ms for name, timing in timings.items()}
    share = (times["checked_ms"] - times["unchecked_ms"]) / times["attention_ms"]
    return {"tokens": LAYOUT.tokens, "tile": tile, "summary": summary, **times, "share": share}


def main() -> None:
    torch.set_num_threads(THREADS)
    for tile, summary in CASES:
        row: dict[str, Any] = {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "fp32"}
        row |= {"threads": THREADS, "keep": KEEP}
        row |= measure(tile, summary)
        append_rows(RESULTS / "list_check.json", [row | provenance("cpu")])
        print(
            f"tile {tile}, summaries {summary}: attention {row['attention_ms']:.3f} ms, with the check "
            f"{row['checked_ms']:.4f} ms, without {row['unchecked_ms']:.4f} ms: {100 * row['share']:.2f} %"
        )


if __name__ == "__main__":
    main()
