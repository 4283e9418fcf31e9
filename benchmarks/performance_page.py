"""docs/performance.md: milliseconds of operations and models beside dense."""

from typing import Any

from calls_section import calls
from provenance import RESULTS
from tables import load, source_of, table

from sparsifiner.compare.table import three_figures

HEADER = """# Performance

Milliseconds of sparse attention, scoring and selection and summaries included. Operations stand beside the fastest
dense path of the same run: flash, cuDNN or memory-efficient on a GPU, SDPA or matmul + softmax on a CPU. Models stand
beside dense called the same way where a row says how (eager, compiled), else beside the faster of dense and compiled
dense. "Replayed" is a captured CUDA graph: launching its kernels does not count, as it does for who calls the model.
Ratios below 1 are where sparse attention loses. Medians with the 10th and 90th percentile; keys are selected from
random inputs. What each part takes by itself, and every rival of the same run, is in tables of their own. The tables
were written by `python benchmarks/report.py` from `docs/results/`.
"""

# parts of the rows: the rivals that are given their blocks
FLEX = "flex attention"
GIVEN_BLOCKS = (FLEX, "blocks of")
PARTS = """"Select" is scores and selection, "attend" attention alone on given lists, summaries included,
"everything" both. "Masked dense" is the official way: all logits, those of other pairs replaced by -inf; it is given
its mask and selects nothing, either."""
BLOCKS = """"Blocks of 4x4 keys" are lists of whole blocks, chosen by the means of their keys, at the share of key visits in
brackets, as near to ours as whole blocks come; they are given to our own attention. relL2 is the distance to dense
attention, relative to its size, on random inputs."""


def _rows(table_name: str) -> list[dict[str, Any]]:
    setting = ("row", "threads", "tokens", "batch", "dtype", "keep", "summary", "measure", "way", "part")
    rows = load(table_name, *setting)
    called = {row["row"] for row in rows if "way" in row}
    # calls take the place of what was measured of the same models before
    return [row for row in rows if "way" in row or row["row"] not in called]


def _table(header: list[str], body: list[list[str]]) -> str:
    """A table without the columns that are empty."""
    filled = [index for index in range(len(header)) if any(line[index] for line in body)]
    return table([header[index] for index in filled], [[line[index] for index in filled] for line in body])


def speed(table_name: str, title: str, text: str) -> str:
    """One table of `benchmarks/speed.py`: every sparse row beside the dense one that it is compared with."""
    if not (RESULTS / f"{table_name}.json").exists():
        return ""
    rows = _rows(table_name)
    body = []
    for row in rows:
        if row["part"] not in {"everything", "sparse", "sparse compiled"} or row["ratio"] is None:
            continue
        size = f"{row['img_size']} px" if row["benchmark"] == "model" else f"N = {row['tokens']:,}"
        body.append([
            f"{row['row']}: {_measure(row)}",
            size,
            str(row["batch"]),
            row["dtype"],
            f"{row['keep']:g}",
            "" if row["threads"] is None else str(row["threads"]),
            f"{three_figures(_baseline(row, rows))} ({row['baseline'].removeprefix('dense: ')})",
            f"{three_figures(row['median_ms'])} ({three_figures(row['low_ms'])} to {three_figures(row['high_ms'])})",
            f"**{row['ratio']:.2f}x**" if row["ratio"] >= 1 else f"{row['ratio']:.2f}x",
            "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.1f} MiB",
            f"`{row['command']}`",
        ])  # fmt: skip
    header = ["what", "size", "batch", "dtype", "keep", "threads", "dense, ms", "sparse, ms", "ratio"]
    header += ["memory", "command"]
    return f"""## {title}

{text}

`python benchmarks/speed.py {table_name}` ({source_of(rows)})

{_table(header, body)}
"""


def _baseline(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """Milliseconds of the dense one that a row is compared with."""
    same = ("row", "threads", "tokens", "batch", "measure", "way")
    beside = [each for each in rows if all(each.get(name) == row.get(name) for name in same)]
    return next(float(each["median_ms"]) for each in beside if each["part"] == row["baseline"])


def _measure(row: dict[str, Any]) -> str:
    """What was measured: how models were called, and whether a graph was replayed."""
    words = [row["measure"]]
    if "way" in row:
        words.append(row["way"])
    elif row["part"] == "sparse compiled":
        words.append("compiled")
    return ", ".join([*words, *(["replayed"] if row.get("graph") else [])])


def operations(table_name: str) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Rows of operations by their part, of each row's name, threads, N and measure."""
    if not (RESULTS / f"{table_name}.json").exists():
        return {}
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in _rows(table_name):
        if row["benchmark"] == "ops":
            setting = (row["row"], row["threads"], row["tokens"], row["measure"])
            found.setdefault(setting, {})[row["part"]] = row
    return found


def parts(table_name: str, title: str, text: str) -> str:
    """One table of operations: what each part takes, and every rival of its run."""
    cases = operations(table_name)
    if not cases:
        return ""
    ours = ["select", "attend", "everything"]
    rivals = list(dict.fromkeys(part for own in cases.values() for part in own if part not in ours))
    body = []
    for (name, threads, tokens, measure), own in cases.items():
        row = own["everything"]
        body.append([
            f"{name}: {measure}",
            f"{tokens:,}",
            str(row["batch"]),
            row["dtype"],
            f"{row['keep']:g}",
            "" if threads is None else str(threads),
            *(_milliseconds(own.get(part)) for part in [*ours, *rivals]),
            _to_flex(own),
        ])  # fmt: skip
    header = ["what", "N", "batch", "dtype", "keep", "threads", *ours]
    header += [{FLEX: "FlexAttention (keys)"}.get(part, part) for part in rivals]
    if any(part.startswith("blocks of") for part in rivals):
        text = f"{text}\n{BLOCKS}"
    return f"""### {title}

{text}

{_table([*header, "FlexAttention / attend"], body)}
"""


def _milliseconds(row: dict[str, Any] | None) -> str:
    if row is None or row["median_ms"] is None:
        return ""
    notes = [f"{100 * row['key_visits']:.1f} %"] if row["part"].startswith(GIVEN_BLOCKS) else []
    notes += [f"relL2 {row['relative_l2']:.2f}"] if row.get("relative_l2") is not None else []
    return three_figures(row["median_ms"]) + (f" ({', '.join(notes)})" if notes else "")


def _to_flex(own: dict[str, dict[str, Any]]) -> str:
    """How many times as fast as FlexAttention our attention alone is."""
    if "attend" not in own or own[FLEX]["median_ms"] is None:
        return ""
    ratio = own[FLEX]["median_ms"] / own["attend"]["median_ms"]
    return f"**{ratio:.2f}x**" if ratio >= 1 else f"{ratio:.2f}x"


def _span(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def against_flex() -> str:
    """Our attention alone beside FlexAttention, by form of list."""
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for (name, *_), own in operations("gpu").items():
        if "attend" in own and "masked" not in name:
            ratio = own[FLEX]["median_ms"] / own["attend"]["median_ms"]
            ratios["per query" in name].append(ratio)
    return (
        f"With one list per query\nFlexAttention wins clearly: our packed attention is {_span(ratios[True])} times"
        f" as fast; with tiles it is\n{_span(ratios[False])} times as fast."
    )


def packing() -> str:
    """Attention alone over lists per query: packed beside masked."""
    cases = operations("gpu")
    forward, backward = [], []
    for (name, threads, tokens, measure), packed in cases.items():
        if "packed" not in name:
            continue
        other = name.replace("packed", "masked")
        masked = cases[other, threads, tokens, measure]
        if "attend" in packed:
            forward.append(masked["attend"]["median_ms"] / packed["attend"]["median_ms"])
            continue
        times = []
        for title, own in ((name, packed), (other, masked)):
            alone = cases[title, threads, tokens, "forward"]
            both = own["everything"]["median_ms"] - alone["everything"]["median_ms"]
            times.append(alone["attend"]["median_ms"] + both)
        backward.append(times[1] / times[0])
    return (
        f"Attention alone, without selection, is {_span(forward)} times as fast packed as masked;\n"
        f"of both passes together, told by what the backward adds to everything, {_span(backward)} times."
    )


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
        calls(),
        speed(
            "cpu",
            "On a CPU",
            'Native kernels (`backend="cpu"`), on cores that other machines share: times differ from run to run\n'
            "by more than their spread within one, ratios less. EViT keeps half of the patches at each of three\n"
            "stages; with keep 1 attention among them is dense.",
        ),
        parts(
            "cpu",
            "Parts and rivals on a CPU",
            f"Milliseconds. {PARTS} FlexAttention compiles kernels for GPUs only.",
        ),
        speed(
            "gpu",
            "On a GPU",
            'Triton kernels (`backend="triton"`); of what is replayed as a CUDA graph caches are overwritten before\n'
            "each measurement. Memory is what an operation needs beyond its inputs, its result and its lists.\n"
            '"Lists for two layers" is the mean over two layers with `share=2`. One list per query is packed\n'
            "over the union of a tile's lists, or a mask for dense attention; neither breaks even with dense\n"
            f'attention here. {packing()}\nSo "auto" packs.',
        ),
        parts(
            "gpu",
            "Parts and rivals on a GPU",
            f"Milliseconds of replayed CUDA graphs. {PARTS}\n"
            'FlexAttention is given random blocks of 128 x 128 pairs and selects nothing: its rival is "attend". Its\n'
            "share of the keys is rounded to whole blocks and stands in brackets. The last column says how many times\n"
            f"as fast as FlexAttention our attention alone is. {against_flex()}",
        ),
        gpu_kernels(),
    ]
    return "\n".join(section for section in sections if section)
