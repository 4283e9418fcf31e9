"""The benchmark of whole models."""

import copy
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


def test_rows_of_sizes_batches_and_models():
    rows = measure()
    seen = [(row["img_size"], row["batch"], row["part"]) for row in rows]
    assert seen == [
        (size, batch, part) for size in (64, 96) for batch in (2, 1) for part in ("dense", "sparse")
    ]
    assert {(row["measure"], row["way"]) for row in rows} == {("forward", "eager")}
    for dense, sparse in zip(rows[::2], rows[1::2], strict=True):
        assert (dense["ratio"], dense["difference_ms"]) == (1, 0)
        assert sparse["baseline"] == "dense"
        assert 0 < sparse["ratio_low"] <= sparse["ratio"] <= sparse["ratio_high"]
        assert sparse["difference_low_ms"] <= sparse["difference_ms"] <= sparse["difference_high_ms"]
        assert sparse["images_per_second"] == pytest.approx(1e3 * sparse["batch"] / sparse["median_ms"])
        assert 0 < sparse["parity_error"] <= sparse["parity_budget"] < 1e-5
        assert sparse["parity_agreement"] > 0.99
        assert sparse["weights"] == "random, cast to fp32"
        assert sparse["layers"] == sparse["sparse_layers"] == 1
        # what the clock of the GPU, its profiler and its allocator tell
        assert sparse["host_ms"] is sparse["kernel_ms"] is sparse["memory_bytes"] is None
        assert sparse["left_out"] is None
    assert {row["tokens"] for row in rows} == {17, 37}
    assert rows[0]["command"].endswith("--runs 2 --warmup 0 --keep 0.3 --tile 2")


def test_training_steps_take_the_place_of_forward_passes():
    rows = measure(train=True, img_size=64)
    seen = [(row["measure"], row["batch"], row["part"]) for row in rows]
    assert seen == [("training step", 2, "dense"), ("training step", 2, "sparse")]
    assert rows[1]["ratio"] > 0


def test_a_training_step_changes_a_copy_only():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    before = copy.deepcopy(model.state_dict())
    bench_model._training_step(model, torch.randn(4, 3, 2, 2), bench_model.EAGER)()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_several_batches_of_one_size_and_images_that_are_no_squares():
    rows = measure(img_size="64x96", batch_size=[1, 3], latency=False)
    assert [(row["img_size"], row["batch"], row["tokens"]) for row in rows[::2]] == [
        ("64x96", 1, 25),
        ("64x96", 3, 25),
    ]
    assert "--img-size 64x96 --batch-size 1 3" in rows[0]["command"]


def test_what_is_done_is_left_out():
    done = {(64, 2, "eager"), (64, 1, "eager"), (96, 1, "eager")}
    settings = ModelBenchmark(**TINY)
    (rows,) = benchmark_model(settings, SPARSE, done)
    assert [(row["img_size"], row["batch"], row["part"]) for row in rows] == [
        (96, 2, "dense"),
        (96, 2, "sparse"),
    ]


def test_layers_that_stay_dense_are_told():
    rows = measure(
        replace(SPARSE, keep=[0.3, 1.0]), model_args={**TINY["model_args"], "depth": 2}, img_size=64
    )
    assert {(row["layers"], row["sparse_layers"]) for row in rows} == {(2, 1)}


def test_models_are_called_in_several_ways():
    settings = ModelBenchmark(latency=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert settings.ways(cpu) == ["eager", "compiled"]
    assert settings.ways(cuda) == ["eager", "compiled", "reduce-overhead"]
    assert replace(settings, compile=False).ways(cuda) == ["eager"]
    assert replace(settings, train=True).ways(cuda) == ["eager", "compiled"]


def test_compiled_sparse_is_compared_with_compiled_dense(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append(options) or model)
    rows = {(row["way"], row["part"]): row for row in measure(img_size=64, compile=True, latency=False)}
    assert list(rows) == [(way, part) for way in ("eager", "compiled") for part in ("dense", "sparse")]
    assert asked == [{"mode": None}] * 2
    for way in ("eager", "compiled"):
        assert rows[way, "dense"]["ratio"] == 1
        assert rows[way, "sparse"]["ratio"] > 0


def test_models_that_do_not_compile_are_left_out_and_named(monkeypatch):
    def fail(model, **_):
        def compiled(images):
            raise RuntimeError("no compiler")

        return compiled

    monkeypatch.setattr(torch, "compile", fail)
    rows = {(row["way"], row["part"]): row for row in measure(img_size=64, compile=True, latency=False)}
    for part in ("dense", "sparse"):
        assert rows["compiled", part]["left_out"] == "no compiler"
        assert rows["compiled", part]["median_ms"] is rows["compiled", part]["baseline"] is None
    assert rows["eager", "sparse"]["ratio"] > 0


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
    monkeypatch.setitem(bench_model._REFERENCE_TOKENS, "cpu", 17)
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
    for size in (0, "64x", "64x0", "x", -16):
        with pytest.raises(ValueError, match="is no size of an image; give its side in pixels"):
            ModelBenchmark(**{**TINY, "img_size": size, "batch_size": 1})
