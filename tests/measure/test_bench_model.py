"""The benchmark of whole models."""

from dataclasses import replace

import pytest
import torch

from sparsifiner import ToMe
from sparsifiner.config import make_config
from sparsifiner.convert import sparse_layers
from sparsifiner.measure import bench_model
from sparsifiner.measure.bench_model import ModelBenchmark, benchmark_model, make_pair
from sparsifiner.measure.parity import ParityError
from sparsifiner.ops.select import torch_backend as select_in_torch
from sparsifiner.ops.sparse_attention import torch_backend

TINY = {
    "model": "deit_tiny_patch16_224",
    "model_args": {"depth": 1, "embed_dim": 48, "num_classes": 5},
    "img_size": [64, 96],
    "batch_size": 2,
    "dtype": "fp32",
    "compile": False,
    "device": "cpu",
    "runs": 2,
    "warmup": 0,
}
SPARSE = make_config("fast", keep=0.3, tile=2)


def measure(config=SPARSE, **options):
    return [row for rows in benchmark_model(ModelBenchmark(**{**TINY, **options}), config) for row in rows]


def test_rows_of_sizes_measures_and_models():
    rows = measure(train=True)
    seen = [(row["img_size"], row["measure"], row["part"], row["batch"]) for row in rows]
    assert seen == [
        (size, measure, part, batch)
        for size in (64, 96)
        for measure, batch in (("throughput", 2), ("latency", 1), ("training step", 2))
        for part in ("dense", "sparse")
    ]
    for dense, sparse in zip(rows[::2], rows[1::2], strict=True):
        assert dense["ratio"] == 1
        assert sparse["baseline"] == "dense"
        assert sparse["ratio"] == dense["median_ms"] / sparse["median_ms"]
        assert sparse["images_per_second"] == pytest.approx(1e3 * sparse["batch"] / sparse["median_ms"])
        assert 0 < sparse["parity_error"] <= sparse["parity_budget"] < 1e-5
        assert sparse["parity_agreement"] > 0.99
        assert sparse["weights"] == "random, cast to fp32"
        assert sparse["left_out"] is None
    assert {row["tokens"] for row in rows} == {17, 37}
    assert rows[0]["command"].endswith("--runs 2 --warmup 0 --keep 0.3 --tile 2")


def test_the_faster_of_dense_and_compiled_dense_is_the_baseline(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    rows = {row["part"]: row for row in measure(img_size=64, compile=True, latency=False)}
    assert rows.keys() == {"dense", "dense compiled", "sparse", "sparse compiled"}
    fastest = min("dense", "dense compiled", key=lambda name: rows[name]["median_ms"])
    for row in rows.values():
        assert row["baseline"] == fastest
        assert row["ratio"] == rows[fastest]["median_ms"] / row["median_ms"]


def test_models_that_do_not_compile_are_left_out_and_named(monkeypatch):
    def fail(model, **_):
        def compiled(images):
            raise RuntimeError("no compiler")

        return compiled

    monkeypatch.setattr(torch, "compile", fail)
    rows = {row["part"]: row for row in measure(img_size=64, compile=True, latency=False)}
    assert rows["dense compiled"]["left_out"] == rows["sparse compiled"]["left_out"] == "no compiler"
    assert rows["sparse"]["ratio"] == rows["dense"]["median_ms"] / rows["sparse"]["median_ms"]


def flipped(q, k, v, *rest):
    return torch_backend_attention(q, k, v, *rest).flip(1)


def with_two_keys_a_list(q, k, v, connectivity, *rest):
    shorter = replace(connectivity, indices=connectivity.indices[..., :2])
    return torch_backend_attention(q, k, v, shorter, *rest)


torch_backend_attention = torch_backend.sparse_attention


@pytest.mark.parametrize("wrong", [flipped, with_two_keys_a_list])
def test_wrong_attention_is_refused(monkeypatch, wrong):
    monkeypatch.setattr(torch_backend, "sparse_attention", wrong)
    with pytest.raises(ParityError, match=r"layer 0: backend='torch': the output .* nothing was"):
        measure(replace(SPARSE, backend="torch"), dtype="bf16")


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_selection_of_the_worst_keys_is_refused(monkeypatch, preset):
    select = select_in_torch.select_topk
    monkeypatch.setattr(select_in_torch, "select_topk", lambda scores, budget: select(-scores, budget))
    with pytest.raises(ParityError, match=r"layer 0: backend='torch' lists .* of the keys"):
        measure(make_config(preset, keep=0.3, backend="torch"), dtype="bf16")


@pytest.mark.parametrize(
    "options", [{"scorer": "random"}, {"scorer": "bigbird", "tile": 1}, {"tokens": ToMe(2)}, {"share": 2}]
)
def test_patterns_merged_tokens_and_shared_lists_pass(options):
    rows = measure(
        make_config("fast", **{"keep": 0.3, "tile": 2, "profile": "even", **options}),
        model_args={**TINY["model_args"], "depth": 2}, img_size=96, latency=False, dtype="bf16",
    )  # fmt: skip
    assert rows[1]["parity_error"] <= rows[1]["parity_budget"]


def test_sizes_beyond_the_reference_are_timed_without_it(monkeypatch):
    monkeypatch.setattr(bench_model, "_REFERENCE_TOKENS", 17)
    rows = measure(latency=False)
    assert [row["parity_error"] is None for row in rows] == [False, False, True, True]


def test_dense_and_sparse_share_weights_and_low_rank_bases_look_trained():
    before = torch.random.get_rng_state()
    pair = make_pair(ModelBenchmark(**TINY), make_config("paper", keep=0.3), 64)
    assert torch.equal(torch.random.get_rng_state(), before)
    dense, sparse = pair["dense"].state_dict(), pair["sparse"].state_dict()
    assert all(torch.equal(sparse[key], value) for key, value in dense.items())
    up = sparse_layers(pair["sparse"])[0].scorer.up
    assert 0.1 < (up < 0.02).float().mean() < 0.5
    assert up.min() >= 0


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="batch_size has 3 entries, but img_size has 2"):
        ModelBenchmark(**{**TINY, "batch_size": [1, 2, 3]})
    with pytest.raises(ValueError, match="is sparse already; give --model deit_tiny_patch16_224"):
        measure(model="sparsifiner_deit_tiny_patch16_224")
    with pytest.raises(ValueError, match="img_size=50 is not a multiple"):
        measure(img_size=50)
