"""The comparison with peers: each method from one dense model, resumed, told apart, drawn."""

import copy
import json
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch

import sparsifiner
from sparsifiner.cli import main
from sparsifiner.compare import METHODS, Budget, Comparison, Geometry, compare
from sparsifiner.compare.pareto import write_pareto
from sparsifiner.compare.run import pack_bits, time_settings, unpack_bits
from sparsifiner.compare.table import cost_of, format_comparison, front_of, merge_seeds, picture_rows
from sparsifiner.data import open_images
from sparsifiner.measure.records import append_rows, read_rows
from sparsifiner.training import Recipe
from sparsifiner.training.recipe import Stage

SMALL = {"img_size": 32, "patch_size": 4, "depth": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 10}
CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "compare"
GEOMETRY = Geometry(tile=2, summary=2)


def make_dense():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **SMALL).eval()


def budget_of(method):
    return method.budgets([0.2], [0.6])[0]


def run(folder, seeds=0, methods=("dense", "fast+evit"), timed_on=None, **options):
    images = open_images("digits", "train", limit=64)
    validation = open_images("digits", "validation", limit=40)
    recipe = Recipe(stages=[Stage("distil", 1, lr=1e-3)], batch_size=32, workers=0, ema_decay=None)
    comparison = Comparison(
        list(methods), keep=0.2, token_keep=0.6, tile=2, summary=2, seeds=seeds, timed_on=timed_on
    )
    return compare(make_dense(), images, validation, recipe, comparison, folder, device="cpu", **options)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_makes_a_model_that_is_counted_and_keeps_the_dense_weights(name):
    method, dense = METHODS[name], make_dense()
    model = method.build(copy.deepcopy(dense), budget_of(method), GEOMETRY)
    state, expected = model.state_dict(), dense.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    macs = sparsifiner.count_macs(model, (3, 32, 32)).to_dict()
    if name == "dense":
        assert macs["sparse"] == {**macs["dense"], "scorer": 0}
    else:
        assert macs["sparse"]["attention"] < macs["dense"]["attention"]
    if method.spends in {"tokens", "both"}:
        assert macs["sparse"]["total"] < 0.8 * macs["dense"]["total"]


def test_budgets_are_those_that_a_method_spends():
    keeps, tokens = [0.1, 0.2], [0.5, 0.7]
    assert METHODS["fast"].budgets(keeps, tokens) == [Budget(0.1), Budget(0.2)]
    assert METHODS["evit"].budgets(keeps, tokens) == [Budget(token_keep=0.5), Budget(token_keep=0.7)]
    assert METHODS["fast+evit"].budgets(keeps, tokens) == [Budget(0.1, 0.5), Budget(0.2, 0.7)]
    assert METHODS["dense"].budgets(keeps, tokens) == [Budget()]


def test_rows_tell_settings_costs_and_who_was_right(tmp_path):
    made = []
    rows = run(tmp_path, seeds=[0, 1], report=made.append)
    assert [{**row, "costs": {}} for row in rows] == made
    told = [(row["method"], row["trained"], row["seed"]) for row in rows]
    assert told == [
        *[(name, False, 0) for name in ("dense", "fast+evit")],
        *[(name, True, seed) for seed in (0, 1) for name in ("dense", "fast+evit")],
    ]
    for row in rows:
        right = unpack_bits(row["right"], 40)
        assert 100 * right.mean() == pytest.approx(row["top1"])
        assert row["costs"]["cpu"]["ms"] > 0
    # the dense model without training is the teacher itself
    assert rows[0]["agreement"] == 100
    assert rows[0]["logit_kl"] == pytest.approx(0, abs=1e-9)
    # seeds differ, and training moves the model
    assert rows[2]["logit_kl"] != rows[4]["logit_kl"]
    assert rows[2]["logit_kl"] > 1e-6


def test_a_comparison_goes_on_where_it_stopped(tmp_path):
    first = run(tmp_path, methods=("dense",))
    made = []
    rows = run(tmp_path, report=made.append)
    assert rows[: len(first)] == first
    assert [row["method"] for row in made] == ["fast+evit", "fast+evit"]
    assert run(tmp_path, report=made.append) == rows
    assert len(made) == 2


def test_each_setting_is_timed_once_and_later_if_need_be(tmp_path, monkeypatch):
    rows = run(tmp_path, seeds=[0, 1], timed_on=[])
    assert [row["costs"] for row in rows] == [{}] * 6
    timed = []
    module = sys.modules["sparsifiner.compare.run"]
    measure = module.time_in_turns
    monkeypatch.setattr(
        module, "time_in_turns", lambda *args, **more: timed.append(args) or measure(*args, **more)
    )
    rows = run(tmp_path, seeds=[0, 1], timed_on="cpu")
    assert len(timed) == 2  # settings, untrained and of two seeds alike
    for method in ("dense", "fast+evit"):
        own = [row["costs"]["cpu"] for row in rows if row["method"] == method]
        assert own == [own[0]] * 3
        share = 100 * own[0]["ms"] / own[0]["dense_ms"]
        assert cost_of(next(row for row in rows if row["method"] == method), "cpu") == share
    assert (
        run(tmp_path, seeds=[0, 1], timed_on="cpu")
        == rows
        == json.loads((tmp_path / "results.json").read_text())
    )
    assert len(timed) == 2


def test_only_a_run_that_was_begun_is_resumed(tmp_path, caplog):
    run(tmp_path, methods=("dense",), timed_on=[])
    assert "no checkpoint to resume" not in caplog.text
    # killed before its first checkpoint
    (tmp_path / "results.json").unlink()
    shutil.rmtree(tmp_path / "runs" / "dense_True_0" / "checkpoints")
    run(tmp_path, methods=("dense",), timed_on=[])
    assert "dense_True_0 holds no checkpoint to resume; the run begins anew" in caplog.text


def test_rows_that_come_while_others_are_timed_stay(tmp_path, monkeypatch):
    rows, module = run(tmp_path, timed_on=[]), sys.modules["sparsifiner.compare.run"]
    measure, file = module.time_in_turns, tmp_path / "results.json"

    def time(*args, **options):
        append_rows(file, [{**rows[0], "seed": 100 + len(read_rows(file))}])
        return measure(*args, **options)

    monkeypatch.setattr(module, "time_in_turns", time)
    timed = run(tmp_path, timed_on="cpu")
    assert [row["seed"] for row in timed[len(rows) :]] == [104, 105]
    assert all(row["costs"]["cpu"]["ms"] > 0 for row in timed[: len(rows)])


def test_rows_of_other_settings_are_not_mixed(tmp_path):
    run(tmp_path, methods=("dense",))
    images = open_images("digits", "train", limit=64)
    recipe = Recipe(stages=[Stage("distil", 1, lr=1e-3)], batch_size=32, workers=0, ema_decay=None)
    comparison = Comparison(["dense"], keep=0.2, token_keep=0.6, tile=4, summary=2)
    other = make_dense()
    torch.nn.init.ones_(other.head.bias)
    with pytest.raises(ValueError, match=r"another dense, validation_images, tile .*give another --output"):
        compare(other, images, images, recipe, comparison, tmp_path, device="cpu")


def test_methods_are_trained_equally_long_and_learn_from_the_dense_model(tmp_path):
    run(tmp_path)
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == ["dense_True_0", "fast+evit_0.2_0.6_True_0"]
    steps = []
    for folder in folders:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps.append([record["step"] for record in records if record["kind"] == "validation"])
    assert steps[0] == steps[1] == [2]


def make_row(method, top1, total, right, **options):
    row = {"method": method, "keep": None, "token_keep": None, "trained": True, "seed": 0, "top1": top1}
    row |= {"macs": {"attention": total / 2, "scorer": 0, "total": total}, "images": 8, "ours": method == "a"}
    row |= {"key_visits": 0.5}
    return {
        **row,
        "costs": {},
        "is_bound": False,
        "right": pack_bits(torch.tensor(right, dtype=torch.bool)),
        **options,
    }


def test_seeds_are_averaged_and_paired_with_their_own_control():
    rows = [
        make_row("dense", 50.0, 100, [1, 1, 1, 1, 0, 0, 0, 0]),
        make_row("dense", 37.5, 100, [1, 1, 1, 0, 0, 0, 0, 0], seed=1),
        make_row("a", 37.5, 60, [1, 1, 1, 0, 0, 0, 0, 0]),
        make_row("a", 50.0, 60, [1, 1, 1, 1, 0, 0, 0, 0], seed=1),
        make_row("b", 25.0, 80, [1, 1, 0, 0, 0, 0, 0, 0]),
    ]
    dense, a, b = merge_seeds(rows)
    assert (a["top1"], a["seeds"], a["difference"]) == (43.75, 2, 0.0)
    assert (a["low"], a["high"]) == (0.0, 0.0)  # what one seed loses the other wins, on the same image
    assert b["difference"] == -25.0
    assert b["low"] < -25.0 < b["high"] <= 0
    assert front_of([dense, a, b], "total") == {1}
    assert cost_of(a, "total") == pytest.approx(60e-6)
    table = format_comparison(rows)
    assert table.splitlines()[1].startswith("+ a ")
    assert table.count(" *") == 2  # of attention and total MACs


def test_what_runs_by_the_reference_is_not_timed(tmp_path):
    file, picture = tmp_path / "results.json", tmp_path / "pareto.svg"
    rows = [
        make_row("dense", 50.0, 100, [1] * 4 + [0] * 4),
        make_row("released", 25.0, 60, [1] * 2 + [0] * 6),
    ]
    append_rows(file, [rows[0], {**rows[1], "keep": 0.2}])
    dense, released = time_settings(make_dense(), Comparison("dense", timed_on="cpu"), file)
    assert dense["costs"]["cpu"]["ms"] > 0
    assert released["costs"] == {}
    assert cost_of(released, "cpu") is None
    assert format_comparison([dense, released]).count(" ms)") == 1
    write_pareto(picture, picture_rows([dense, released]))
    assert "released" in picture.read_text()


def test_bounds_do_not_compete():
    rows = [make_row("dense", 50.0, 100, [1] * 4 + [0] * 4), make_row("o", 60.0, 10, [1] * 8, is_bound=True)]
    assert front_of(rows, "total") == {0}


def test_bits_come_back():
    right = torch.rand(37) > 0.5
    assert np.array_equal(unpack_bits(pack_bits(right), 37), right.numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "swin"}, "methods: 'swin' is unknown"),
        ({"methods": []}, "methods is empty"),
        ({"keep": [0.1, 0.2], "token_keep": 0.5}, "keep has 2 entries, but token_keep has 1, and fast+evit"),
        ({"keep": [0.1, 2.0]}, "keep must lie in (0, 1], got 2.0"),
        ({"tile": 8, "pool": 3}, "tile=8, summary=8 and pool=3"),
        ({"pool": 0}, "pool=0 must be at least 1"),
        ({"untrained": False, "trained": False}, "leave no row of"),
        ({"methods": "paper", "trained": False}, "untrained=True and trained=False leave no row of paper"),
        ({"seeds": []}, "seeds is empty"),
        ({"timed_on": "tpu"}, "timed_on='tpu' is unknown"),
        ({"timing_batch": 0}, "timing_batch must be at least 1"),
    ],
)
def test_impossible_comparisons_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Comparison(**options)


def test_the_command_leaves_rows_a_table_and_a_picture(capsys, tmp_path):
    model = {name: value for name, value in SMALL.items() if name not in {"img_size", "num_classes"}}
    arguments = ["--model", "deit_tiny_patch16_224", "--img-size", 32, "--model-args", json.dumps(model)]
    arguments += ["--data", "digits", "--validation-limit", 20, "--methods", "[dense,evit]", "--no-trained"]
    arguments += ["--keep", 0.2, "--token-keep", 0.6, "--workers", 0, "--output", tmp_path, "--device", "cpu"]
    assert main(["compare", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert "evit, tokens 0.6, untrained" in out
    assert "total, MMACs" in out
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    assert (tmp_path / "results.csv").read_text().startswith("method,")
    assert "evit" in (tmp_path / "pareto.svg").read_text()


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("config", ["tiny_imagenet_257", "tiny_imagenet_1025"])
def test_the_configurations_are_comparisons(config, monkeypatch):
    given = []
    command = sys.modules["sparsifiner.cli.compare"]  # the package has a function of this name
    monkeypatch.setattr(command, "compare_methods", lambda *args, **options: given.append(args) or [])
    for name in ("write_csv", "write_pareto", "picture_rows"):
        monkeypatch.setattr(command, name, lambda *args: None)
    monkeypatch.setattr(command, "format_comparison", lambda rows: "")
    assert main(["compare", "--config", str(CONFIGS / f"{config}.yaml"), "--data", "digits"]) == 0
    dense, _, _, recipe, comparison, _ = given[0]
    for name in comparison.methods:
        for budget in METHODS[name].budgets(comparison.keep, comparison.token_keep):
            geometry = Geometry(comparison.tile, comparison.summary, comparison.pool)
            METHODS[name].build(copy.deepcopy(dense), budget, geometry)
    assert recipe.stages[-1].name == "distil"
