"""The demo end to end, shortened."""

import dataclasses
import functools
import re

from sparsifiner import demo
from sparsifiner.data import open_images


def test_demo_prints_the_table_and_keeps_older_runs(tmp_path, monkeypatch, capsys):
    for name in ("_DENSE", "_RECONSTRUCT", "_DISTIL"):
        monkeypatch.setattr(demo, name, dataclasses.replace(getattr(demo, name), epochs=1, warmup_epochs=0))
    monkeypatch.setattr(demo, "_LARGE_PX", 64)
    monkeypatch.setattr(demo, "open_images", functools.partial(open_images, limit=60))
    output = tmp_path / "demo"
    output.mkdir()
    (output / "report.html").write_text("an older report")
    rows = demo.run_demo(output, seed=0)
    names = [row.name for row in rows]
    assert names[:4] == ["dense", "fast, keep 0.25", "fast, keep 0.1", "fast, keep 0.05"]
    assert names[4:] == ["paper, keep 0.25: stage 1", "paper, keep 0.25: both stages"]
    assert rows[0].agreement == 100
    attention = [row.attention_macs for row in rows]
    assert attention[:4] == sorted(attention[:4], reverse=True)
    assert attention[4] == attention[5] < attention[0]
    assert all(row.ms > 0 for row in rows)

    out = capsys.readouterr().out.splitlines()
    assert re.search(r"DeiT-S, 64 px.*dense [\d.]+ ms.*fast [\d.]+ ms.*: [\d.]+x$", out[-1])

    page = (output / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 3
    assert "$" not in page
    assert all(f"{row.top1:.1f}" in page for row in rows)
    assert {path.name for path in output.iterdir()} == {"report.html", "classify", "reconstruct", "distil"}
    (kept,) = tmp_path.glob("demo-*")
    assert (kept / "report.html").read_text() == "an older report"
