"""tools/compare_speed.py runs every row of the CPU on both sources and keeps what it found."""

import json
import shutil
import subprocess
import sys

import pytest


@pytest.fixture
def compare(checkout, tmp_path):
    # without CMakeLists.txt beside it no kernels are built
    source = tmp_path / "tree" / "src"
    package = checkout / "src" / "sparsifiner"
    shutil.copytree(package, source / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    output = tmp_path / "rows.json"

    def run(*arguments, before=source):
        program = [sys.executable, checkout / "tools" / "compare_speed.py", before, source]
        quick = ["--tiny", "--seconds", "0", "--threads", "1", "--processes", "1"]
        command = [*program, "--device", "cpu", "--output", output, *quick, *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        return done, json.loads(output.read_text()) if output.exists() else []

    return run


def test_every_row_is_kept_with_both_commits(compare):
    done, rows = compare("--limit", "inf", "--commits", "one", "other")
    assert done.returncode == 0, done.stderr
    assert len(rows) == len({row["row"] for row in rows}) == 10
    for row in rows:
        assert (row["before"], row["after"], row["difference"]) == ("one", "other", 0.0)
        assert {"device", "dtype", "batch", "torch", "timm", "isa"} <= row.keys()
        for key in ("before_ms", "after_ms", "ratio"):
            assert 0 < row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
        assert f"{row['row']}  " in done.stdout
    assert "slowest: " in done.stdout


def test_what_is_too_slow_or_does_not_run_is_told(compare, tmp_path):
    operations = tmp_path / "tree" / "src" / "sparsifiner" / "ops" / "__init__.py"
    operations.write_text(f"{operations.read_text()}\ndel sparse_attention\n")
    done, rows = compare("--limit", "0", "--only", "select_topk", "sparse_attention")
    assert (done.returncode, [row["row"] for row in rows]) == (1, ["select_topk"]), done.stderr
    assert "did not run: sparse_attention\n" in done.stderr
    assert "over 0 times the time before: select_topk\n" in done.stderr


def test_what_is_no_source_is_refused(compare):
    done, rows = compare(before="nowhere")
    assert done.returncode != 0
    assert "nowhere is no commit, nor a folder" in done.stderr
    assert rows == []
