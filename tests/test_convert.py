"""sparsify, desparsify, why_not and trace on real timm architectures."""

import copy
import logging
import pickle
import shutil
import threading

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import sparsifiner
from sparsifiner import EViT, SparsifyConfig, ToMe
from sparsifiner.attention import SparseAttention
from sparsifiner.config import make_config
from sparsifiner.convert import sparse_layers
from sparsifiner.plan import Call, plan
from sparsifiner.scorers import BigBird, Impact, LowRank, Random, Released
from tests.models import ARCHITECTURES, make_images, make_model, summaries_of_single_patches

has_cxx = shutil.which("g++") or shutil.which("clang++")


def resize(model, size):
    if not model.dynamic_img_size:
        model.set_input_size(img_size=(size, size))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keeping_everything_is_the_dense_model(name):
    model = make_model(name)
    for size in ARCHITECTURES[name][2]:
        resize(model, size)
        images = make_images(size)
        with torch.no_grad():
            dense = model(images)
            sparsifiner.sparsify(model, keep=1.0, summary=None)
            assert (model(images) - dense).abs().max() < 1e-5
            for tile in (1, 4):
                sparsifiner.sparsify(model, keep=0.1, tile=tile, summary=1)
                with sparsifiner.trace(model) as traces:
                    assert (model(images) - dense).abs().max() < 1e-5
                assert traces[0].dense  # since lists and summaries would visit more keys than there are
                with summaries_of_single_patches(), sparsifiner.trace(model) as traces:
                    assert (model(images) - dense).abs().max() < 1e-5
                assert not traces[0].dense
        sparsifiner.desparsify(model)


TILES = {"keep": 0.1, "tile": 4}
# native code sums scores in another order, so keys that are all but equal may change places
PER_QUERY = {"keep": 0.25, "tile": 1, "summary": None, "scorer": "lowrank", "backend": "torch"}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("options", [TILES, PER_QUERY])
@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_architectures_run_at_two_sizes_and_backpropagate(name, options):
    model = sparsifiner.sparsify(make_model(name), **options)
    sizes = ARCHITECTURES[name][2]
    for size in sizes:
        resize(model, size)
        images = make_images(size)
        with torch.no_grad():
            assert (model(images) - by_reference(model, options, images)).abs().max() < 1e-4
            with sparsifiner.trace(model) as traces:
                model(images)
            assert sorted(traces) == [0, 1]
            assert not traces[0].dense
    model.train()
    model(make_images(sizes[-1])).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        # no gradient flows through the selection, and an unused head of timm's has none either
        if ".scorer." not in parameter_name:
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all()


def by_reference(model, options, images):
    return sparsifiner.sparsify(copy.deepcopy(model), **(options | {"backend": "reference"}))(images)


# registers, grids that change from call to call, norms of q and k, a family of ours
COMPILED = {"dinov2 registers": TILES, "internvit dynamic": TILES, "qk norm": PER_QUERY, "lv-vit": PER_QUERY}


@pytest.mark.matrix(sample=lambda name, options: COMPILED.get(name) is options)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("options", [TILES, PER_QUERY])
@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
@torch.no_grad()
def test_architectures_compile_in_one_graph_at_two_sizes(name, options):
    model = sparsifiner.sparsify(make_model(name), **options)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ARCHITECTURES[name][2]:
        resize(model, size)
        images = make_images(size)
        assert (compiled(images) - by_reference(model, options, images)).abs().max() < 1e-4


@pytest.mark.skipif(not has_cxx, reason="Inductor needs a C++ compiler")
def test_inductor_runs_the_fast_preset_forward_and_backward():
    model = sparsifiner.sparsify(make_model("deit", depth=1), keep=0.1)
    images = make_images(224)
    compiled = torch.compile(model, fullgraph=True)
    expected = model(images)
    actual = compiled(images)
    assert (actual - expected).abs().max() < 1e-4
    expected_gradient = torch.autograd.grad(expected.square().sum(), model.patch_embed.proj.weight)[0]
    actual_gradient = torch.autograd.grad(actual.square().sum(), model.patch_embed.proj.weight)[0]
    assert (actual_gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


def test_desparsify_restores_the_model_exactly():
    model = make_model("deit")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    images = make_images(224)
    before = model(images)
    sparsifiner.sparsify(model, keep=0.1)
    assert [key for key in model.state_dict() if key not in state] == []
    model(images)
    assert sparsifiner.desparsify(model) is model
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(images), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_desparsify_keeps_what_was_trained_and_replaced_since():
    model = sparsifiner.sparsify(make_model("deit"), keep=0.5)
    layer = model.blocks[0].attn
    layer.proj = nn.Linear(48, 48)
    with torch.no_grad():
        layer.qkv.weight.add_(1)
    model.train()
    dense = sparsifiner.desparsify(model).blocks[0].attn
    assert dense.proj is layer.proj
    assert dense.qkv.weight is layer.qkv.weight
    assert dense.training


def test_dynamic_sizes_are_followed_per_call_and_thread():
    model = sparsifiner.sparsify(make_model("internvit dynamic"), keep=0.2, tile=2)
    sizes = [(112, 112), (154, 112), (98, 154), (140, 140)]
    expected = {}
    for size in sizes:
        with sparsifiner.trace(model) as traces:
            expected[size] = model(make_images(size, batch=1) * 0 + 1)
        assert traces[1].connectivity.grid == (size[0] // 14, size[1] // 14)
    results = {size: [] for size in sizes}

    def run(size):
        with torch.no_grad():
            results[size].extend(model(torch.ones(1, 3, *size)) for _ in range(10))

    threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size in sizes:
        assert len(results[size]) == 10
        assert all((out - expected[size]).abs().max() < 1e-5 for out in results[size])
    sparsifiner.desparsify(model)
    assert not model.patch_embed._forward_hooks


@pytest.mark.parametrize("name", ["deit", "internvit dynamic"])
def test_copies_and_pickles_compute_the_same_on_their_own(name):
    model = sparsifiner.sparsify(make_model(name), keep=0.1)
    images = make_images(ARCHITECTURES[name][2][0])
    expected = model(images)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone.blocks[0].attn.grid.model is clone
        assert torch.equal(clone(images), expected)


def test_second_call_changes_only_the_configuration():
    model = make_model("deit")
    with pytest.warns(UserWarning, match="untrained"):
        sparsifiner.sparsify(model, preset="paper", keep=0.25)
    scorer = model.blocks[0].attn.scorer
    weight = scorer.up.detach().clone()
    changed = LowRank(coef_topk=4, basis_threshold=0.03)
    sparsifiner.sparsify(model, preset="paper", keep=[0.5, 0.1], backend="reference", scorer=changed)
    assert scorer.options == changed
    assert model.blocks[0].attn.scorer is scorer
    assert torch.equal(scorer.up, weight)
    assert [layer.config.keep_of(layer.place.index, 2) for layer in sparse_layers(model)] == [0.5, 0.1]
    sparsifiner.sparsify(model, keep=0.2)  # an option alone leaves everything else as it is
    assert model.blocks[0].attn.scorer is scorer
    config = model.blocks[0].attn.config
    assert (config.keep, config.tile, config.scorer) == (0.2, 1, changed)
    sparsifiner.sparsify(model, preset="fast")
    assert model.blocks[0].attn.scorer is not scorer


def test_trace_of_layers_that_stay_dense_lists_every_key():
    model = sparsifiner.sparsify(make_model("deit"), keep=[1.0, 0.1], summary=None)
    with sparsifiner.trace(model) as traces:
        model(make_images(224))
    assert traces[0].dense
    assert traces[0].connectivity.to_mask().all()
    assert traces[1].connectivity.indices.shape == (2, 3, 4, 20)
    assert traces[1].connectivity.density() == pytest.approx(20 / 197)
    hooks = [module._forward_hooks for module in model.modules()]
    assert not any(hooks)


def test_small_inputs_stay_dense_below_min_tokens(caplog):
    model = make_model("deit")
    images = make_images(224)
    dense = model(images)
    with caplog.at_level(logging.INFO, logger="sparsifiner"):
        sparsifiner.sparsify(model, keep=0.1, min_tokens=198)
    assert caplog.text.count("stay dense") == 1
    assert (model(images) - dense).abs().max() < 1e-5
    sparsifiner.sparsify(model, keep=0.1, min_tokens=197)
    assert (model(images) - dense).abs().max() > 1e-4


def test_intermediates_and_hooks_see_raster_order():
    model = sparsifiner.sparsify(make_model("deit"), keep=0.1, tile=4)
    images = make_images(224)
    with summaries_of_single_patches():
        sparse = model.forward_intermediates(images, intermediates_only=True)
    dense = sparsifiner.desparsify(model).forward_intermediates(images, intermediates_only=True)
    for a, b in zip(sparse, dense, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["deit", "qk norm"])
@pytest.mark.parametrize(
    "options",
    [
        {"tile": 4, "summary": 2},
        {"tile": 1, "summary": None, "scorer": Released()},
    ],
)
@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_autocast_changes_the_projections_but_not_the_precision_of_scores(name, options):
    model = sparsifiner.sparsify(make_model(name), keep=0.25, **options)
    layer = model.blocks[0].attn
    tokens = torch.randn(2, layer.current_layout(layer.grid.model.patch_embed.num_patches + 1).tokens, 48)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = layer.project(tokens)
            spec = plan(Call(layer.current_layout(tokens.shape[1])), layer.config, layer.place)
            scores, lists = layer.scorer.scores(q, k, v, spec), layer.scorer(q, k, v, spec)
            assert layer(tokens).shape == tokens.shape
        assert q.dtype == torch.bfloat16
        assert scores.dtype == torch.float32
        assert torch.equal(scores, layer.scorer.scores(q, k, v, spec))
        assert torch.equal(lists.indices, layer.scorer(q, k, v, spec).indices)


def test_bf16_model_stays_close_to_its_fp32_twin():
    model = sparsifiner.sparsify(make_model("deit"), keep=1.0)
    images = make_images(224)
    expected = model(images)
    low = model.bfloat16()(images.bfloat16()).float()
    assert ((low - expected).norm() / expected.norm()) < 0.02
    with sparsifiner.trace(model) as traces:
        model(images.bfloat16())
    assert torch.equal(traces[1].connectivity.indices[0, 0, 0], torch.arange(197).int())


def test_empty_batch():
    model = sparsifiner.sparsify(make_model("deit"), keep=0.1)
    assert model(make_images(224, batch=0)).shape == (0, 7)


def test_dynamic_size_with_gradient_checkpointing_is_refused():
    model = sparsifiner.sparsify(make_model("internvit dynamic"), keep=0.2, tile=2)
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="dynamic_img_size and gradient checkpointing do not go together"):
        model(make_images(112))
    with torch.no_grad():
        model(make_images(112))


def test_gradient_checkpointing_computes_the_same():
    model = sparsifiner.sparsify(make_model("deit"), keep=0.2)
    images = make_images(224)
    weight = model.patch_embed.proj.weight
    expected = torch.autograd.grad(model(images).square().sum(), weight)[0]
    model.set_grad_checkpointing(True)
    actual = torch.autograd.grad(model(images).square().sum(), weight)[0]
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_trace_of_a_compiled_model():
    model = sparsifiner.sparsify(make_model("deit"), keep=0.1)
    compiled = torch.compile(model, backend="eager")
    images = make_images(224)
    compiled(images)
    with sparsifiner.trace(model) as traces:
        compiled(images)
    assert sorted(traces) == [0, 1]


def test_hooks_and_modes_of_the_layer_survive_both_ways():
    model = make_model("deit").train()
    model.blocks[0].attn.qkv.eval()
    calls = []
    handle = model.blocks[0].attn.register_forward_hook(lambda *args: calls.append("before"))
    sparsifiner.sparsify(model, keep=0.1)
    model.blocks[0].attn.register_forward_hook(lambda *args: calls.append("while sparse"))
    model(make_images(224))
    sparsifiner.desparsify(model)
    model(make_images(224))
    assert calls == ["before", "while sparse"] * 2
    assert model.training
    assert model.blocks[0].attn.training
    assert not model.blocks[0].attn.qkv.training
    handle.remove()
    model(make_images(224))
    assert calls[4:] == ["while sparse"]


def test_tiles_larger_than_the_grid_are_one_tile():
    model = sparsifiner.sparsify(make_model("deit"), scorer="pooled", keep=0.2, tile=14, summary=14)
    images = make_images(224)
    expected = model(images)
    sparsifiner.sparsify(model, keep=0.2, tile=10**6, summary=10**6)
    assert (model(images) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not a timm VisionTransformer"),
        (lambda: timm.create_model("test_resnet"), "ResNet is not a timm VisionTransformer"),
        (lambda: timm.create_model("vit_dwee_patch16_reg1_gap_256", depth=1), "block 0 has a DiffAttention"),
        (
            lambda: timm.create_model("vit_dpwee_patch16_reg1_gap_256", depth=1),
            "block 0 is a DiffParallelScalingBlock",
        ),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(build, reason):
    model = build()
    assert any(reason in why for why in sparsifiner.why_not(model))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=reason):
        sparsifiner.sparsify(model)
    assert dict(model.named_modules()) == before


def test_supported_models_have_no_reason():
    model = make_model("deit")
    assert sparsifiner.why_not(model) == []
    assert sparsifiner.why_not(sparsifiner.sparsify(model)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep must lie in \(0, 1\]"),
        ({"keep": 1.5}, r"keep must lie in \(0, 1\].*1\.5"),
        ({"keep": float("nan")}, "keep must lie in"),
        ({"keep": []}, "empty list"),
        ({"keep": [0.1, 0.2, 0.3]}, "keep has 3 entries, but the model has 2 layers"),
        ({"keep": "0.1"}, "keep must be a number"),
        ({"tile": 0}, "tile must be at least 1, got 0"),
        ({"tile": 2.5}, "tile must be a whole number"),
        ({"summary": 0}, "summary must be at least 1, got 0; use None"),
        ({"summary": "big"}, "summary must be a whole number"),
        ({"scorer": "best"}, "scorer='best' is unknown"),
        ({"scorer": "best"}, "scorer='best' is unknown; choose one of .*'impact'"),
        ({"scorer": Impact}, "scorer must be one of .*'impact'.* or ScorerOptions with options, got <class"),
        ({"scorer": None}, "scorer must be one of"),
        ({"share": 0}, "share must be at least 1"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"keep": None}, "keep must be a number"),
        ({"summary": [2]}, "summary must be a whole number"),
        ({"scorer": "released"}, "needs tile=1, got 8; use preset='paper'"),
        ({"preset": "paper", "scorer": Released(), "backend": "torch"}, "runs on backend='reference' only"),
        ({"preset": "slow"}, "preset='slow' is unknown"),
        ({"kep": 0.1}, "'kep' is no option of SparsifyConfig"),
        ({"profile": "rising"}, "profile='rising' is unknown"),
        ({"tile": 8, "scorer": Impact(pool=3)}, "pool=3 must divide tile=8"),
    ],
)
def test_impossible_configurations_are_named_and_change_nothing(options, message):
    model = make_model("deit")
    with pytest.raises((TypeError, ValueError), match=message):
        sparsifiner.sparsify(model, **options)
    assert not any(isinstance(module, SparseAttention) for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LowRank, {"coef_topk": 64}, "coef_topk=64 exceeds basis=32"),
        (LowRank, {"basis": 0}, "basis must be at least 1, got 0; the paper uses 32"),
        (LowRank, {"reduced_dim": 2.5}, "reduced_dim must be a whole number"),
        (LowRank, {"basis_threshold": float("nan")}, "basis_threshold must be a number of at least 0"),
        (Released, {"basis_threshold": -1}, "basis_threshold must be a number of at least 0"),
        (Random, {"seed": 1.5}, "seed must be a whole number"),
        (BigBird, {"seed": 2**32}, "seed must be below"),
        (Impact, {"pool": 0}, "pool must be at least 1, got 0"),
    ],
)
def test_impossible_options_of_scorers_are_named(kind, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**options)


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 11, 12])
def test_falling_budgets_have_the_mean_that_was_asked_for(keep, depth):
    keeps = [make_config("fast", keep=keep).keep_of(layer, depth) for layer in range(depth)]
    assert sum(keeps) / depth == pytest.approx(keep)
    assert keeps == sorted(keeps, reverse=True)
    assert 0 < keeps[-1] <= keeps[0] <= 1
    if depth == 12 and keep <= 0.3:
        assert keeps[0] / keeps[5] == pytest.approx((11.5 / 6.5) ** 2)
    for share in (2, 5):
        shared = [make_config("fast", keep=keep, share=share).keep_of(layer, depth) for layer in range(depth)]
        assert shared == [shared[layer - layer % share] for layer in range(depth)]
        assert sum(shared) / depth == pytest.approx(keep)
    assert [make_config("paper", keep=keep).keep_of(layer, depth) for layer in range(depth)] == [keep] * depth
    listed = [0.5] * depth
    assert [make_config("fast", keep=listed).keep_of(layer, depth) for layer in range(depth)] == listed


def test_config_and_options_exclude_each_other():
    with pytest.raises(ValueError, match="either config or preset, keep, not both"):
        sparsifiner.sparsify(make_model("deit"), SparsifyConfig(), preset="fast", keep=0.1)
    with pytest.raises(TypeError, match="config must be a SparsifyConfig, got float"):
        sparsifiner.sparsify(make_model("deit"), 0.1)


def test_calls_that_sparse_attention_cannot_serve_are_refused():
    model = sparsifiner.sparsify(make_model("deit", attn_drop_rate=0.1), keep=0.1)
    tokens = torch.randn(1, 197, 48)
    layer = model.blocks[0].attn
    with pytest.raises(ValueError, match="layer 0: attn_mask is not supported"):
        layer(tokens, attn_mask=torch.ones(197, 197, dtype=torch.bool))
    with pytest.raises(ValueError, match="layer 0: is_causal is not supported"):
        layer(tokens, is_causal=True)
    with pytest.raises(ValueError, match=r"got 100 tokens, but the grid is 14x14 patches.*set_input_size"):
        layer(tokens[:, :100])
    with pytest.raises(ValueError, match=r"attn_drop=0\.1 is not supported in training"):
        model.train()(make_images(224))


def test_patch_drop_is_refused_in_training():
    model = sparsifiner.sparsify(make_model("deit", patch_drop_rate=0.5), keep=0.1)
    model(make_images(224))
    with pytest.raises(ValueError, match="switch patch_drop off"):
        model.train()(make_images(224))


@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_registered_models_are_made_by_timm():
    model = timm.create_model("sparsifiner_deit_small_patch16_224", keep=0.25, depth=1)
    config = model.blocks[0].attn.config
    assert (config.keep, config.scorer, config.tile, config.summary) == (0.25, LowRank(), 1, None)
    for size in ("tiny", "base"):
        assert timm.is_model(f"sparsifiner_deit_{size}_patch16_224")
    custom = SparsifyConfig(keep=0.1, tile=4)
    model = timm.create_model("sparsifiner_deit_tiny_patch16_224", sparsify_config=custom, depth=1)
    assert model.blocks[0].attn.config == custom
    with pytest.raises(ValueError, match=r"keep=0\.9 contradicts sparsify_config"):
        timm.create_model("sparsifiner_deit_tiny_patch16_224", keep=0.9, sparsify_config=custom, depth=1)


def test_a_model_without_blocks_is_refused():
    assert sparsifiner.why_not(make_model("deit", depth=0)) == ["it has no blocks"]


def test_shapes_without_data():
    model = sparsifiner.sparsify(make_model("deit"), keep=0.1).to("meta")
    assert model(make_images(224).to("meta")).shape == (2, 7)


class Adapted(nn.Module):
    """As adapters wrap a linear layer: without its weight."""

    def __init__(self, linear, fails=False):
        super().__init__()
        self.inner, self.fails = linear, fails

    def forward(self, x):
        return self.inner(x)


def test_wrapped_projections_will_do():
    model, images = make_model("deit"), make_images(224)
    expected = sparsifiner.sparsify(copy.deepcopy(model), preset="fast", keep=0.3)(images)
    model.blocks[1].attn.qkv = Adapted(model.blocks[1].attn.qkv)
    assert torch.equal(sparsifiner.sparsify(model, preset="fast", keep=0.3)(images), expected)


@pytest.mark.parametrize("sparse_before", [False, True])
@pytest.mark.parametrize("name", ["deit", "internvit dynamic"])
def test_a_model_is_converted_as_a_whole_or_not_at_all(monkeypatch, name, sparse_before):
    model, images = make_model(name), make_images(224 if name == "deit" else 112)
    if sparse_before:
        sparsifiner.sparsify(model, scorer="pooled", keep=0.3)
    before, modules = model(images), dict(model.named_modules())
    hooks = len(model.patch_embed._forward_hooks)
    build = Impact.build

    def build_the_first(options, place):
        if place.index:
            raise RuntimeError("no memory")
        return build(options, place)

    monkeypatch.setattr(Impact, "build", build_the_first)
    with pytest.raises(RuntimeError, match="no memory"):
        sparsifiner.sparsify(model, preset="fast", keep=0.1)
    assert dict(model.named_modules()) == modules
    assert len(model.patch_embed._forward_hooks) == hooks
    assert torch.equal(model(images), before)


def test_what_would_be_lost_is_refused():
    patched, extended = make_model("deit"), make_model("deit")
    forward = patched.blocks[1].attn.forward
    patched.blocks[1].attn.forward = lambda x, **rest: forward(x, **rest) + 1
    extended.blocks[0].attn.lora = nn.Linear(48, 48)
    for model, reason in (
        (patched, "block 1 has an attention with a forward of its own, which would be lost"),
        (extended, "block 0 has an attention with modules of its own: lora, which would be lost"),
    ):
        assert sparsifiner.why_not(model) == [reason]
        with pytest.raises(ValueError, match=reason):
            sparsifiner.sparsify(model)
    for attribute, value in (("forward", lambda x: x), ("adapter", nn.Identity())):
        model = make_model("deit")
        setattr(model.blocks[1], attribute, value)
        assert sparsifiner.why_not(model) == []
        with pytest.raises(ValueError, match=r"tokens: block 1 has .* which blocks that drop"):
            sparsifiner.sparsify(model, tokens=ToMe(2))


def test_models_in_wrappers_are_named_and_blocks_counted():
    features = timm.create_model("deit_tiny_patch16_224", features_only=True)
    assert sparsifiner.why_not(features) == [
        "FeatureGetterNet is not a timm VisionTransformer, but its model is one, which can be made sparse in "
        "its place"
    ]
    sparsifiner.sparsify(features.model, keep=0.2)
    assert all(each.shape[0] == 2 for each in features(make_images(224)))
    parallel = timm.create_model("vit_small_patch16_18x2_224", depth=3)
    (reason,) = sparsifiner.why_not(parallel)
    assert reason == "block 0 is a ParallelThingsBlock, which is not supported (and 2 more)"


def test_full_backward_hooks_stay():
    model, called = make_model("deit"), []
    handle = model.blocks[0].attn.register_full_backward_hook(lambda *args: called.append(1))
    sparsifiner.sparsify(model, keep=0.2)(make_images(224)).sum().backward()
    assert called == [1]
    handle.remove()
    model(make_images(224)).sum().backward()
    assert called == [1]


@pytest.mark.matrix(sample=lambda options: len(options) != 1)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scorer": "random", "backend": "torch"},
        {"preset": "paper", "backend": "torch"},
        {"scorer": "random"},
        {"backend": "torch"},
    ],
)
@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_one_graph_serves_all_batches(options):
    torch.compiler.reset()
    model = sparsifiner.sparsify(make_model("deit").eval(), keep=0.2, **options)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in range(1, 7):
            images = make_images(224, batch=batch)
            assert (compiled(images) - model(images)).abs().max() < 1e-5
    assert counter.frame_count <= 2  # a batch of one has a graph of its own


@pytest.mark.parametrize("options", [{"backend": "torch"}, {}, {"tokens": EViT(0.5)}, {"tokens": ToMe(5)}])
def test_exported_models_take_any_batch(options):
    model = sparsifiner.sparsify(make_model("deit").eval(), keep=0.2, **options)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (make_images(224),), dynamic_shapes=({0: batch},)).module()
    images = make_images(224, batch=5)
    assert (exported(images) - model(images)).abs().max() < 1e-5
