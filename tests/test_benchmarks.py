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
