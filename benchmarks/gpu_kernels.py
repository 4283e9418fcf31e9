"""What bounds each Triton kernel: its time, and its bytes and operations against what the GPU can do.

    python benchmarks/gpu_kernels.py
    python benchmarks/gpu_kernels.py --set BLOCK_N=128 num_warps=8    # attend and its backward, tuned by hand

One op, pooled scorer, tile 8, 8x8 summaries, heads 6, head dim 64, bf16, q, k and v views of one qkv tensor.
Kernel times are the profiler's, medians over repeated calls on rotated inputs. Bytes are the fewest that a
kernel can move through device memory, "sent" those that its programs ask of the L2 cache.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, append_rows, provenance
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sparsifiner.geometry.connectivity import key_budget
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.select.operators import select_pooled
from sparsifiner.ops.select.triton_kernels import select_kernel
from sparsifiner.ops.select.triton_tiles import tile_scores_kernel
from sparsifiner.ops.sparse_attention import triton_backend, triton_gradients, triton_problem
from sparsifiner.ops.sparse_attention.operators import attend
from sparsifiner.ops.sparse_attention.triton_backward import attend_backward_kernel, key_gradients_kernel
from sparsifiner.ops.sparse_attention.triton_forward import attend_kernel
from sparsifiner.ops.triton_counts import missing_kernel
from sparsifiner.ops.triton_means import square_means_kernel

HEADS, HEAD_DIM, TILE, SUMMARY = 6, 64, 8, 8
# grid side, batch, keep
CASES = [(32, 32, (1, 10)), (64, 8, (1, 10)), (128, 2, (1, 20))]
ROUNDS = 20


def ceilings() -> tuple[float, float]:
    """Bytes per second of a copy, reads and writes counted, and operations per second of a bf16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    copy = kernel_times(lambda: other.copy_(big), 5)
    product = kernel_times(lambda: a @ a, 5)
    return 2 * big.numel() / sum(copy.values()), 2 * 8192**3 / sum(product.values())


def kernel_times(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median seconds that each kernel takes in one call, by its name."""
    call()
    torch.cuda.synchronize()
    calls: list[dict[str, float]] = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            call()
            torch.cuda.synchronize()
        times: dict[str, float] = defaultdict(float)
        for event in recorded.events():
            if event.device_type == DeviceType.CUDA:
                times[event.name] += event.device_time * 1e-6
        calls.append(times)
    return {name: statistics.median(times[name] for times in calls) for name in calls[0]}


def work(layout: TokenLayout, batch: int, budget: int) -> dict[str, tuple[int, int, int]]:
    """Bytes through device memory, bytes asked of the L2 cache and operations of each kernel, by its name."""
    N, pairs, rows, windows = layout.tokens, batch * HEADS, layout.squares(TILE), layout.squares(SUMMARY)
    tensor = 2 * pairs * N * HEAD_DIM  # bytes of q, k, v or out
    lists = 4 * pairs * rows * budget
    scores = 2 * pairs * rows * N
    entries = pairs * rows * (budget + windows) * HEAD_DIM
    products = 2 * pairs * N * (budget + windows) * HEAD_DIM  # operations of QKᵀ over the lists
    kernels = {
        square_means_kernel: (3 * tensor, 3 * tensor, 0),
        tile_scores_kernel: (tensor + scores, tensor + scores, 2 * pairs * rows * N * HEAD_DIM),
        select_kernel: (scores + lists, scores + lists, 0),
        missing_kernel: (lists, lists, 0),
        attend_kernel: (4 * tensor + lists, 2 * tensor + lists + 4 * entries, 2 * products),
        attend_backward_kernel: (6 * tensor + lists + 8 * tensor, 4 * tensor + 12 * entries, 5 * products),
        key_gradients_kernel: (6 * tensor, 6 * tensor, 0),
    }
    return {kernel.fn.__name__: each for kernel, each in kernels.items()}


def measure(
    side: int, batch: int, keep: tuple[int, int], limits: tuple[float, float]
) -> list[dict[str, Any]]:
    """Rows of one case."""
    layout = TokenLayout((side, side))
    N = layout.tokens
    budget = key_budget(keep, N, 0)
    sets = [
        torch.randn(batch, N, 3, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(4)
    ]
    upstream = torch.randn(batch, HEADS, N, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    turn = iter(range(10**9))

    def call() -> None:
        qkv = sets[next(turn) % len(sets)]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        lists, geometry = layout.for_kernels(TILE), layout.for_kernels(TILE, SUMMARY)
        indices = select_pooled(q.detach(), k.detach(), lists, budget, 0, "triton")
        out = attend(q, k, v, indices, True, None, geometry, HEAD_DIM**-0.5, True, "triton")[0]
        torch.autograd.grad(out, qkv, upstream)

    times = kernel_times(call, ROUNDS)
    bandwidth, rate = limits
    found, unnamed = [], dict(times)
    for name, (moved, sent, operations) in work(layout, batch, budget).items():
        seconds = unnamed.pop(name)
        floor = max(moved / bandwidth, operations / rate)
        found.append(
            {
                "tokens": N,
                "batch": batch,
                "keep": keep[0] / keep[1],
                "kernel": name,
                "milliseconds": 1e3 * seconds,
                "moved_bytes": moved,
                "sent_bytes": sent,
                "operations": operations,
                "share_of_bandwidth": moved / seconds / bandwidth,
                "share_of_rate": operations / seconds / rate,
                "sent_per_second": sent / seconds,
                "floor_milliseconds": 1e3 * floor,
            }
        )
    rest = sum(unnamed.values())
    found.append(
        {"tokens": N, "batch": batch, "keep": keep[0] / keep[1], "kernel": "rest", "milliseconds": 1e3 * rest}
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--set", nargs="*", default=[], help="NAME=NUMBER of attend's launch; nothing is kept"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_kernels.json")
    options = parser.parse_args()
    changes = {name: int(number) for name, _, number in (change.partition("=") for change in options.set)}
    if changes:
        launching: tuple[Any, ...] = (triton_backend, triton_gradients)
        for launches in launching:
            launches.blocks = lambda q, problem: triton_problem.blocks(q, problem) | changes
    limits = ceilings()
    print(f"copy {limits[0] / 1e12:.2f} TB/s, product {limits[1] / 1e12:.0f} TFLOP/s")
    for side, batch, keep in CASES:
        rows = measure(side, batch, keep, limits)
        for row in rows:
            print(
                f"N {row['tokens']:6d}  {row['kernel']:24s} {row['milliseconds']:8.4f} ms"
                + (
                    f"  floor {row['floor_milliseconds']:.4f}  {row['share_of_bandwidth']:5.0%} of bandwidth"
                    f"  {row['share_of_rate']:5.0%} of rate  L2 {row['sent_per_second'] / 1e12:.1f} TB/s"
                    if "floor_milliseconds" in row
                    else ""
                ),
                flush=True,
            )
        if not changes:
            append_rows(options.output, [{**row, **provenance("cuda")} for row in rows])


if __name__ == "__main__":
    main()
