"""The break-even plot draws what is ours, the latest of it, and the line at 1."""

import itertools
from xml.etree import ElementTree

from sparsifiner.measure.break_even import _lines, write_break_even

ROW = {
    "benchmark": "ops",
    "part": "everything",
    "measure": "forward",
    "tokens": 256,
    "batch": 8,
    "keep": 0.1,
    "summary": 8,
    "dtype": "bf16",
    "scorer": "pooled",
    "device": "GPU",
    "ratio": 0.5,
}


def test_the_latest_row_counts_and_other_parts_are_not_drawn():
    rows = [ROW, ROW | {"ratio": 0.7}, ROW | {"part": "dense: sdpa"}, ROW | {"ratio": None, "tokens": 9}]
    assert _lines(rows) == {"forward, bf16, pooled, GPU": [ROW | {"ratio": 0.7}]}


def test_every_way_of_calling_has_a_line():
    eager = ROW | {"part": "sparse", "way": "eager", "measure": "forward"}
    rows = [eager, eager | {"way": "compiled", "ratio": 1.1}]
    assert list(_lines(rows)) == ["forward, eager, bf16, pooled, GPU", "forward, compiled, bf16, pooled, GPU"]


def test_every_option_tells_lines_apart():
    others = {
        "share": 2,
        "profile": "falling",
        "pool": 4,
        "min_tokens": 2000,
        "token_method": {"method": "evit"},
    }
    plain = ROW | {"share": 1, "profile": "even", "pool": None, "min_tokens": 0, "token_method": None}
    rows = [plain, *(plain | {name: value} for name, value in others.items())]
    lines = _lines(rows)
    assert sorted(map(len, lines.values())) == [1] * len(rows)
    assert "forward, bf16, pooled, even, share 2, min_tokens 0, GPU" in lines


def test_keep_and_batch_may_change_along_a_line_but_not_within_a_size():
    larger = ROW | {"tokens": 1024, "batch": 2, "keep": 0.05}
    assert list(_lines([larger, ROW]).values()) == [[ROW, larger]]
    lines = _lines([ROW, ROW | {"keep": 0.25}, larger])
    assert [label.rpartition(", ")[2] for label in lines] == ["keep 0.1", "keep 0.25", "keep 0.05"]


def test_the_plot_is_the_same_file_each_time(tmp_path):
    rows = [
        ROW | {"tokens": tokens, "measure": measure, "ratio": tokens / 300}
        for tokens, measure in itertools.product((256, 1024), ("forward", "forward + backward"))
    ]
    for name in ("a.svg", "b.svg"):
        write_break_even(tmp_path / name, rows, "ops")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag.endswith("svg")
    assert "slower than dense" in (tmp_path / "a.svg").read_text()


def test_a_plot_without_points_is_drawn(tmp_path):
    write_break_even(tmp_path / "empty.svg", [], "model")
    ElementTree.parse(tmp_path / "empty.svg")
