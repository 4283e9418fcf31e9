"""docs/performance.md: milliseconds of operations and models beside the fastest dense path."""

from provenance import RESULTS
from tables import load, source_of, table

from sparsifiner.compare.table import three_figures

HEADER = """# Performance

Milliseconds of sparse attention, scoring and selection and summaries included, against the fastest dense path of
the same run: flash, cuDNN, memory-efficient or a compiled model on a GPU, SDPA, matmul + softmax or a compiled
model on a CPU. Ratios below 1 are where sparse attention loses. Medians with the 10th and 90th percentile; keys
are selected from random inputs. The tables were written by `python benchmarks/report.py` from `docs/results/`.
"""


def speed(table_name: str, title: str, text: str) -> str:
    """One table of `benchmarks/speed.py`: every sparse row beside the fastest dense one of its run."""
    if not (RESULTS / f"{table_name}.json").exists():
        return ""
    rows = load(
        table_name, *("row", "threads", "tokens", "batch", "dtype", "keep", "summary", "measure", "part")
    )
    body = []
    for row in rows:
        if row["part"] not in {"everything", "sparse", "sparse compiled"} or row["ratio"] is None:
            continue
        size = f"{row['img_size']} px" if row["benchmark"] == "model" else f"N = {row['tokens']:,}"
        compiled = ", compiled" if row["part"] == "sparse compiled" else ""
        body.append([
            f"{row['row']}: {row['measure']}{compiled}",
            size,
            str(row["batch"]),
            row["dtype"],
            f"{row['keep']:g}",
            "" if row["threads"] is None else str(row["threads"]),
            f"{three_figures(row['ratio'] * row['median_ms'])} ({row['baseline'].removeprefix('dense: ')})",
            f"{three_figures(row['median_ms'])} ({three_figures(row['low_ms'])} to {three_figures(row['high_ms'])})",
            f"**{row['ratio']:.2f}x**" if row["ratio"] >= 1 else f"{row['ratio']:.2f}x",
            "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.1f} MiB",
            f"`{row['command']}`",
        ])  # fmt: skip
    header = ["what", "size", "batch", "dtype", "keep", "threads", "fastest dense, ms", "sparse, ms", "ratio"]
    header += ["memory", "command"]
    filled = [index for index in range(len(header)) if any(line[index] for line in body)]
    body = [[line[index] for index in filled] for line in body]
    return f"""## {title}

{text}

`python benchmarks/speed.py {table_name}` ({source_of(rows)})

{table([header[index] for index in filled], body)}
"""


def gpu_kernels() -> str:
    """What bounds each kernel of one operation, forward and backward."""
    if not (RESULTS / "gpu_kernels.json").exists():
        return ""
    rows = load("gpu_kernels", "tokens", "kernel")
    body = []
    for row in rows:
        if row["kernel"] == "rest":
            continue
        by_bandwidth = row["share_of_bandwidth"] >= row["share_of_rate"]
        body.append([
            f"{row['tokens']:,}",
            row["kernel"].removesuffix("_kernel"),
            three_figures(row["milliseconds"]),
            f"{three_figures(row['floor_milliseconds'])} ({'memory' if by_bandwidth else 'products'})",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['share_of_rate']:.0%}",
            f"{row['sent_per_second'] / 1e12:.1f} TB/s",
        ])  # fmt: skip
    header = ["N", "kernel", "ms", "floor, ms", "of device memory", "of products", "asked of L2"]
    return f"""## What bounds the GPU kernels

One operation (heads 6, head dim 64, bf16, tile 8, 8x8 summaries), kernel by kernel. The floor is the time
that its bytes through device memory, or its products, take at rates measured in the same run. Selection is
far from both: its time is the instructions of its search. Attention is bound by what gathered keys and
values ask of the L2 cache. Backward adds gradients of keys up by atomics, which the L2 cache does.

`python benchmarks/gpu_kernels.py` ({source_of(rows)})

{table(header, body)}
"""


def performance() -> str:
    sections = [
        HEADER,
        speed(
            "cpu",
            "On a CPU",
            'Native kernels (`backend="cpu"`), on cores that other machines share: times differ from run to run\n'
            "by more than their spread within one, ratios less. EViT keeps half of the patches at each of three\n"
            "stages; with keep 1 attention among them is dense.",
        ),
        speed(
            "gpu",
            "On a GPU",
            'Triton kernels (`backend="triton"`), replayed as CUDA graphs, caches overwritten before each\n'
            "measurement. Memory is what an operation needs beyond its inputs, its result and its lists.\n"
            '"Lists for two layers" is the mean over two layers with `share=2`. One list per query is packed\n'
            "over the union of a tile's lists, or a mask for dense attention: packing is the faster of the two at\n"
            'every size, forward and backward, so "auto" packs; neither breaks even with dense attention here.',
        ),
        gpu_kernels(),
    ]
    return "\n".join(sections)
