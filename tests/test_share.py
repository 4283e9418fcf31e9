"""share: consecutive layers attend by the lists of the first of them."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import sparsifiner
from sparsifiner.convert import sparse_layers
from sparsifiner.macs import count_macs
from sparsifiner.measure.bench_ops import EVERYTHING, OpsBenchmark, benchmark_operations
from sparsifiner.models.adapter import scorer_weights
from sparsifiner.scorers import Released


def make_model(depth=5, **options):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, depth=depth, embed_dim=32, num_heads=2
    ).eval()
    return sparsifiner.sparsify(model, **{"keep": 0.2, "tile": 2, "backend": "torch", **options})


def make_images(batch=2):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_layers_attend_by_the_lists_of_the_first_of_their_group():
    fixed = {"scorer": "pooled", "profile": "even"}
    model, own = make_model(share=2, **fixed), make_model(**fixed)
    with sparsifiner.trace(model) as shared, sparsifiner.trace(own) as single:
        model(make_images()), own(make_images())
    lists = [shared[layer].connectivity.indices for layer in range(5)]
    assert torch.equal(lists[0], single[0].connectivity.indices)
    assert torch.equal(lists[0], lists[1])
    assert torch.equal(lists[2], lists[3])
    for layer in (1, 2, 4):  # the second has other lists of its own, groups differ, the last scores
        other = single[1].connectivity.indices if layer == 1 else lists[layer - 1]
        assert not torch.equal(lists[layer], other)


@torch.no_grad()
def test_nothing_is_held_after_a_call():
    model = make_model(share=3)
    model(make_images())
    for layer in sparse_layers(model):
        if layer.lists is not None:
            with pytest.raises(RuntimeError, match="has not been called before it"):
                layer.lists.take(1)


@torch.no_grad()
def test_copies_pickles_and_threads_keep_their_lists_apart():
    model, images = make_model(share=2), make_images(4)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
        lenders = [layer.lists for layer in sparse_layers(other)]
        assert lenders[0] is sparse_layers(other)[1].scorer.lists
        assert lenders[0] is not sparse_layers(model)[0].lists
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(model, images.unsqueeze(1).repeat(8, 1, 1, 1, 1).unbind(0)))
    for index, logits in enumerate(results):
        assert torch.allclose(logits[0], expected[index % 4], atol=1e-5)


@torch.no_grad()
def test_compiles_in_one_graph_and_exports():
    model, images = make_model(depth=3, share=2), make_images()
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images), expected, atol=1e-5)
    exported = torch.export.export(model, (images,)).module()
    assert torch.allclose(exported(images), expected, atol=1e-5)


def test_only_layers_that_score_have_scorers_to_count_train_and_keep():
    with pytest.warns(UserWarning, match="untrained"):
        model = make_model(scorer="lowrank", share=2)
    weights = scorer_weights(model)
    assert {name.split(".")[1] for name in weights} == {"0", "2", "4"}
    counted = count_macs(model, (3, 64, 64))
    assert [layer.scorer > 0 for layer in counted.layers] == [True, False, True, False, True]
    with pytest.warns(UserWarning, match="untrained"):
        assert count_macs(make_model(scorer="lowrank"), (3, 64, 64)).layers[1].scorer > 0


@torch.no_grad()
def test_changing_other_options_keeps_the_scorers():
    model = make_model(share=2)
    before = [layer.scorer for layer in sparse_layers(model)]
    sparsifiner.sparsify(model, keep=0.5)
    assert [layer.scorer for layer in sparse_layers(model)] == before
    sparsifiner.sparsify(model, share=1)
    with sparsifiner.trace(model) as traces:
        model(make_images())
    assert not torch.equal(traces[0].connectivity.indices, traces[1].connectivity.indices)
    assert all(layer.lists is None for layer in sparse_layers(model))


@torch.no_grad()
def test_layers_that_score_before_and_after_keep_their_scorers():
    with pytest.warns(UserWarning, match="untrained"):
        model = make_model(scorer="lowrank")
    scorers = [layer.scorer for layer in sparse_layers(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no scorer is new
        sparsifiner.sparsify(model, share=2)
    layers = sparse_layers(model)
    assert [layer.scorer for layer in layers[::2]] == scorers[::2]
    with sparsifiner.trace(model) as traces:
        model(make_images())
    assert torch.equal(traces[0].connectivity.indices, traces[1].connectivity.indices)
    assert not torch.equal(traces[1].connectivity.indices, traces[2].connectivity.indices)
    with pytest.warns(UserWarning, match="untrained"):  # layer 3 took lists
        sparsifiner.sparsify(model, share=3)
    assert layers[0].scorer is scorers[0]
    assert layers[0].lists is layers[1].scorer.lists is layers[2].scorer.lists
    model(make_images())
    with pytest.warns(UserWarning, match="untrained"):
        sparsifiner.sparsify(model, share=1)
    assert layers[0].scorer is scorers[0]
    assert all(layer.lists is None for layer in layers)


def test_gradients_flow_and_gradient_checkpointing_is_refused():
    model = make_model(share=2)
    model(make_images()).sum().backward()
    assert all(layer.qkv.weight.grad.abs().sum() > 0 for layer in sparse_layers(model))
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="share=2 and gradient checkpointing"):
        model(make_images())
    with torch.no_grad():
        model(make_images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share must be at least 1, got 0"),
        ({"share": 2.5}, "share must be a whole number"),
        (
            {"share": 2, "keep": [0.1, 0.2, 0.1, 0.1, 0.1]},
            r"keep=0.2 of layer 1 differs from that of layer 0",
        ),
        (
            {"share": 2, "preset": "paper", "tile": 1, "backend": "auto", "scorer": Released()},
            "needs share=1, got 2",
        ),
    ],
)
def test_impossible_groups_are_refused_by_name(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_model(**options)


def test_operations_are_timed_as_the_mean_over_a_group():
    settings = OpsBenchmark(
        grid=8,
        batch_size=1,
        heads=2,
        head_dim=16,
        dtype="fp32",
        tile=2,
        summary=2,
        share=3,
        device="cpu",
        runs=2,
    )
    (rows,) = benchmark_operations(settings)
    everything = next(row for row in rows if row["part"] == EVERYTHING)
    assert everything["share"] == 3
    assert everything["median_ms"] > 0
    assert "--share 3" in everything["command"]
