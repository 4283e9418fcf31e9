"""Values that were tuned on one machine, and how each is measured again.

They cost or save time and memory; results do not depend on them, but for the order in which sums are rounded.
`python benchmarks/tune.py` measures what this machine can: it prints each value beside others and what they
cost. Values without a row there name their command. Those of the kernels in C++ stand in csrc/tuned.h and in
the same table.

On a CPU they were measured with 2 threads of an x86-64 machine with AVX-512, on a GPU with an NVIDIA H200.
"""

# By device the backend that "auto" takes and for what: its kernels were faster than operations of torch at
# every size of `python benchmarks/speed.py gpu` and `python benchmarks/speed.py cpu` (docs/performance.md).
FASTER = {
    "cuda": (
        "triton",
        frozenset(
            {
                *("select_topk", "select_lowrank", "select_impact", "select_pooled", "sparse_attention"),
                *("attend_impact", "attend_pooled"),
            }
        ),
    ),
    "cpu": ("cpu", frozenset({"select_topk", "select_lowrank", "select_impact", "sparse_attention"})),
}
# Windows that summary="auto" makes at least, of which accuracy depends, not time: `summary` in the designs of
# `python benchmarks/training_free.py tiny_imagenet --data DATA --teachers TEACHERS --groups designs`.
AUTO_SUMMARY_WINDOWS = 48

# Scores that exist at once where torch's operations make them: few enough for a CPU's cache, many enough to
# fill a GPU.
SCORE_CHUNK = {"cpu": 2**18, "cuda": 2**26}
# Bytes of gathered keys of one chunk of rows in torch's operations, likewise.
GATHERED_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Up to so many scores a CPU sorts tokens that are to stay faster than it calls a kernel.
SORTED_SCORES = 512

# Up to so many tokens a GPU attends to a list per query by a mask: faster than gathers at any size, but of a
# memory that grows with their square.
MASKED_TOKENS = 1_100
# Up to so many tokens dense attention with a bias is faster than with wider heads, on a GPU.
BIASED_TOKENS = 1_000

# Of the kernels in Triton. Bytes of tiles' scores that exist at once; larger inputs have more.
SCORE_BYTES = 6 * 2**20
# Squares of queries and keys of one program of tiles' scores, by the fewest squares of a tile; in fp32
# products take registers instead of matrix units.
TILE_SCORES = {1: (64, 128), 16: (128, 256)}
TILE_SCORES_FP32 = (32, 64)
# Scores of the short rows that share a program of the selection, so that their reductions overlap.
SHARED_SCORES = 1_024
# Keys that one program of the low-rank predictor sums up, and rows of one program of its coefficients.
SUMMED_KEYS = 512
COEFFICIENT_ROWS = 64
# Queries and keys of one step of attention; in fp32 of head dims up to 64, and of larger ones.
ATTEND_QUERIES = 64
ATTEND_QUERIES_FP32 = (32, 16)
ATTEND_KEYS = 64
ATTEND_KEYS_FP32 = 32
# Registers that let a fourth program of 64 queries and head dim 64 onto a multiprocessor.
ATTEND_REGISTERS = 128
# Keys of one program of the prefix, which attends to every token: about as many as a tile's list has.
PREFIX_KEYS = 512
# Elements of a window that one step of its mean takes.
MEAN_ELEMENTS = 4_096
