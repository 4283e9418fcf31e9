"""The demo end to end, shortened."""

import re

from sparsifiner import demo


def test_demo_prints_the_table_and_keeps_older_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_EPOCHS", 1)
    monkeypatch.setattr(demo, "_LARGE_PX", 64)
    rows = demo.run_demo(tmp_path, seed=0)
    assert [row.name for row in rows] == ["dense", "fast, keep 0.25", "fast, keep 0.1", "fast, keep 0.05"]
    assert rows[0].agreement == 100
    attention = [row.attention_macs for row in rows]
    assert attention == sorted(attention, reverse=True)
    assert all(row.ms > 0 for row in rows)

    out = capsys.readouterr().out.splitlines()
    assert sum("too small to gain" in line for line in out) == 3
    assert re.search(r"DeiT-S, 64 px.*dense [\d.]+ ms.*fast [\d.]+ ms.*: [\d.]+x$", out[-1])

    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 3
    assert "$" not in page
    assert all(f"{row.top1:.1f}" in page for row in rows)
    older = page.replace("Sparsifiner demo", "an older report")
    (tmp_path / "report.html").write_text(older)
    image = demo.open_images("digits")[0][0]
    pixels = demo.evaluation_transform(demo._make_digits_model(), crop_pct=1.0)(image)[None]
    demo.write_report(tmp_path, demo._make_digits_model().eval(), image, pixels, rows, "timing")
    kept = [path for path in tmp_path.glob("report-*.html") if path.read_text() == older]
    assert len(kept) == 1
