"""What benchmarks/ takes for granted about the package."""

import importlib
import json
import pathlib
import re

import pytest

from sparsifiner.config import make_config
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.measure.bench_model import ModelBenchmark
from sparsifiner.scorers import Impact

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("checkout")


def test_every_kernel_that_is_timed_exists(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    work = importlib.import_module("gpu_kernels").work
    sources = [file.read_text() for file in (ROOT / "src" / "sparsifiner" / "ops").rglob("*.py")]
    defined = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)}
    timed = set(work(TokenLayout((32, 32)), batch=1, budget=103))
    assert len(timed) == 7
    assert timed <= defined


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("COMMIT", "abc")
    return importlib.import_module("speed")


TINY = ModelBenchmark(
    model="deit_tiny_patch16_224",
    model_args={"depth": 2, "embed_dim": 48},
    img_size=64,
    batch_size=[1, 2],
    dtype="fp32",
    compile=False,
    latency=False,
    device="cpu",
    runs=2,
    warmup=0,
)
SPARSE = make_config("fast", keep=0.3, tile=2, profile="even")


def test_the_table_of_calls_goes_on_where_it_broke_off(speed, monkeypatch, tmp_path, capsys):
    file = tmp_path / "calls.json"
    work = {"one": (TINY, SPARSE), "other": (speed.replace(TINY, batch_size=1, train=True), SPARSE)}
    monkeypatch.setitem(speed.TABLES, "calls", work)
    speed.main(["calls", "--output", str(file)])
    rows = json.loads(file.read_text())
    seen = [(row["row"], row["batch"], row["measure"], row["part"]) for row in rows]
    assert seen == [
        *(("one", batch, "forward", part) for batch in (1, 2) for part in ("dense", "sparse")),
        *(("other", 1, "training step", part) for part in ("dense", "sparse")),
    ]
    printed = capsys.readouterr().out
    assert printed.count("sparse, eager (forward)") == 2
    assert printed.count("2 of 2 layers sparse") == 3

    del rows[2:4]  # it broke off before the second batch
    file.write_text(json.dumps(rows))
    speed.main(["calls", "--output", str(file)])
    again = json.loads(file.read_text())
    assert again[:4] == rows
    assert [(row["row"], row["batch"]) for row in again[4:]] == [("one", 2)] * 2

    monkeypatch.setenv("COMMIT", "def")  # which has measured nothing
    speed.main(["calls", "--output", str(file), "--rows", "other"])
    assert len(json.loads(file.read_text())) == 8


def test_layers_that_stay_dense_are_not_taken_for_sparse_ones(speed, monkeypatch, tmp_path):
    half = speed.replace(SPARSE, keep=[0.3, 1.0])
    monkeypatch.setitem(speed.TABLES, "calls", {"one": (TINY, half)})
    with pytest.raises(SystemExit, match="one: 1 of 2 layers are sparse, not all"):
        speed.main(["calls", "--output", str(tmp_path / "calls.json")])
    assert not (tmp_path / "calls.json").exists()


def test_calls_have_even_budgets(speed):
    for settings, config in speed.CALLS.values():
        assert (settings.device, settings.dtype) == ("cuda", "bf16")
        assert (config.profile, config.summary, config.min_tokens) == ("even", "auto", 0)
        assert config.scorer == Impact(pool=4)
        assert config.tile == (8 if settings.img_size in {512, 768} else 16)
        assert config.keep == (0.05 if settings.img_size == 2048 else 0.1)


@pytest.fixture
def section(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in ("tables", "calls_section", "performance_page"):
        monkeypatch.setattr(importlib.import_module(name), "RESULTS", tmp_path)
    return importlib.import_module("calls_section")


def row_of_call(part, way, milliseconds, **columns):
    sparse = part == "sparse"
    return {
        **{
            "row": "DeiT-S, 1024 px",
            "batch": 8,
            "part": part,
            "way": way,
            "keep": 0.1,
            "tile": 16,
            "pool": 4,
        },
        **{"dtype": "bf16", "scorer": "impact", "profile": "even", "command": "sparsifiner bench model"},
        **{"device": "GPU", "torch": "2", "timm": "1", "commit": "abc"},
        **{"median_ms": milliseconds, "low_ms": milliseconds - 1, "high_ms": milliseconds + 1},
        **{"ratio": 1.5 if sparse else 1.0, "ratio_low": 1.25, "ratio_high": 1.75},
        **{"difference_ms": -4.0, "difference_low_ms": -4.5, "difference_high_ms": -3.5},
        **{"host_ms": 3.0, "kernel_ms": 7.25, "memory_bytes": 3 * 2**20},
        **columns,
    }


def test_no_calls_no_section(section, tmp_path):
    assert section.calls() == section.ratios_table() == ""
    (tmp_path / "calls.json").write_text("[]")
    assert section.calls() == section.ratios_table() == ""


def test_calls_are_shown_by_how_they_were_made(section, tmp_path):
    rows = [
        row_of_call("dense", "eager", 12.0),
        row_of_call("sparse", "eager", 8.0),
        row_of_call("dense", "reduce-overhead", 12.0, memory_bytes=None),
        row_of_call("sparse", "reduce-overhead", 6.0, ratio=0.75, memory_bytes=None),
        row_of_call("dense", "compiled", 9.0, median_ms=None),  # it did not run
    ]
    (tmp_path / "calls.json").write_text(json.dumps(rows))
    assert section.ratios_table().splitlines()[2:] == [
        "| DeiT-S, 1024 px | 8 | 0.1 | 16 | **1.50x** (1.25 to 1.75) |  | 0.75x (1.25 to 1.75) |"
    ]
    page = section.calls()
    assert "bf16, even budgets, scorer impact with pool 4, every layer sparse" in page
    beginning = "| DeiT-S, 1024 px | 8 | eager | 12 (11 to 13) | 8 (7 to 9) | -4.00 (-4.50 to -3.50) |"
    assert f"{beginning} 3 -> 3 | 7.25 -> 7.25 | 3 -> 3 | `sparsifiner bench model` |" in page
    assert "| 6 (5 to 7) | -4.00 (-4.50 to -3.50) | 3 -> 3 | 7.25 -> 7.25 |  |" in page


def test_calls_take_the_place_of_replayed_models(section, tmp_path):
    columns = {"benchmark": "model", "img_size": 512, "tokens": 1025, "baseline": "dense", "threads": None}
    parts = {"dense": 8.0, "sparse compiled": 5.0}
    replayed = [
        row_of_call(part, None, parts[part], measure="throughput", graph=True, **columns) for part in parts
    ]
    for row in replayed:
        del row["way"]
    (tmp_path / "gpu.json").write_text(json.dumps(replayed))
    speed_table = importlib.import_module("performance_page").speed
    assert "DeiT-S, 1024 px: throughput, compiled, replayed |" in speed_table("gpu", "On a GPU", "")
    parts = {"dense": 9.0, "sparse": 7.0}
    called = [row_of_call(part, "eager", parts[part], measure="forward", **columns) for part in parts]
    (tmp_path / "gpu.json").write_text(json.dumps([*replayed, *called]))
    page = speed_table("gpu", "On a GPU", "")
    assert "replayed" not in page
    assert "DeiT-S, 1024 px: forward, eager | 512 px | 8 | bf16 | 0.1 | 9 (dense) | 7 (6 to 8) |" in page
