"""Token sparsity in whole models: every attention, backend and architecture; what loads, copies and fails."""

import copy
import json
import pickle
import warnings
import weakref

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sparsifiner
from sparsifiner import DynamicViT, EViT, SparsifyConfig, ToMe
from sparsifiner.blocks import TokenBlocks
from sparsifiner.calibration.budgets import calibrate
from sparsifiner.convert import sparse_layers
from sparsifiner.geometry.curve import CurveLayout
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.measure.recall import mask_recall
from sparsifiner.models.adapter import config_to_dict, is_predictor, is_scorer
from sparsifiner.models.features import token_states
from sparsifiner.models.loading import load_model
from sparsifiner.plan import Call, plan
from sparsifiner.scorers import LowRank, Released
from sparsifiner.tokens import TOKENS
from tests.models import SMALL, make_images, make_model, summaries_of_single_patches

pytestmark = pytest.mark.filterwarnings("ignore:the (low-rank scorer|token predictor) is untrained")

METHODS = {
    "evit": EViT(0.7),
    "evit unfused": EViT(0.5, fuse=False),
    "dynamicvit": DynamicViT(0.7),
    "dynamicvit after": DynamicViT(0.6, "after attention", at=(0, 2)),
    "tome": ToMe(4),
}
ATTENTIONS = {
    "dense": {"keep": 1.0},
    "fast": {"preset": "fast", "keep": 0.2},
    "tiles": {"scorer": "pooled", "keep": 0.2, "tile": 4, "summary": 2},
    "paper": {"preset": "paper", "keep": 0.25},
}
NAMES = [
    *("deit", "deit distilled", "augreg", "dinov2 registers", "internvit dynamic", "qk norm", "gated"),
    *("average pooling", "post norm", "lv-vit", "map pooling, registers"),
]
WITHOUT_CLASS_TOKEN = {"average pooling", "post norm", "map pooling, registers"}


def size_of(name):
    """Two sizes of the model's input, small ones."""
    patch = 14 if name in {"dinov2 registers", "internvit dynamic"} else 16
    return (5 * patch, 7 * patch), (6 * patch, 6 * patch)


def make_sparse(name="deit", tokens=None, attention="tiles", depth=4, **options):
    torch.manual_seed(0)
    model = make_model(name, depth=depth, img_size=size_of(name)[0])
    sparsifiner.sparsify(model, **{**ATTENTIONS[attention], **options}, tokens=tokens)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if is_predictor(parameter_name) or parameter_name.endswith("scorer.up"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images_for(name="deit", batch=2):
    return make_images(size_of(name)[0], batch)


def methods_for(name):
    return [
        method
        for method in METHODS.values()
        if not (isinstance(method, EViT) and name in WITHOUT_CLASS_TOKEN)
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_methods_that_drop_nothing_give_the_dense_model(name):
    model, images = make_model(name, depth=4, img_size=size_of(name)[0]), images_for(name)
    dense = model(images)
    nothing = [DynamicViT(1.0), *([] if name in WITHOUT_CLASS_TOKEN else [EViT(1.0), EViT(1.0, fuse=False)])]
    for method in nothing:
        sparsifiner.sparsify(model, keep=1.0, tokens=method)
        assert isinstance(model.blocks, TokenBlocks)
        assert (model(images) - dense).abs().max() < 1e-5
        sparsifiner.sparsify(model, scorer="pooled", keep=0.2, tile=4)
        with summaries_of_single_patches():
            assert (model(images) - dense).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["deit", "dinov2 registers", "lv-vit"])
def test_backends_agree(name, attention):
    images = images_for(name)
    for method in METHODS.values():
        model = make_sparse(name, method, attention)
        logits = {}
        for backend in ("reference", "torch", "auto"):
            sparsifiner.sparsify(model, backend=backend)
            logits[backend] = model(images)
        assert (logits["torch"] - logits["reference"]).abs().max() < 1e-4
        # native code sums low-rank scores in another order, so that keys that are all but equal may change
        # places: logits differed by at most 2e-3 over six seeds
        tolerance = 5e-3 if attention == "paper" else 1e-4
        assert (logits["auto"] - logits["reference"]).abs().max() < tolerance


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_architectures_run_at_two_sizes(name):
    for method in methods_for(name):
        model = make_sparse(name, method, "tiles")
        reference = sparsifiner.sparsify(copy.deepcopy(model), backend="reference")
        for size in size_of(name):
            if not model.dynamic_img_size:
                model.set_input_size(img_size=size)
                reference.set_input_size(img_size=size)
            images = make_images(size, batch=3)
            logits = model(images)
            assert (logits - reference(images)).abs().max() < 1e-4
            # what stays is chosen image by image
            single = torch.cat([model(image[None]) for image in images])
            assert (logits - single).abs().max() < 1e-5
            assert (logits[0] - logits[1]).abs().max() > 1e-3
            patches = size[0] * size[1] // model.patch_embed.patch_size[0] ** 2
            counts = method.counts(4, patches, model.num_prefix_tokens)
            assert model.forward_features(images).shape[1] == counts[-1].mlp


@pytest.mark.parametrize("name", NAMES)
def test_backpropagation_reaches_every_parameter(name):
    for method in methods_for(name):
        for attention in ("tiles", "paper"):
            model = make_sparse(name, method, attention).train()
            model(images_for(name)).square().sum().backward()
            for parameter_name, parameter in model.named_parameters():
                # the selection has no gradient, and what is added to all keys changes no softmax
                if is_scorer(parameter_name) or "k_norm.bias" in parameter_name:
                    continue
                assert torch.isfinite(parameter.grad).all(), (method, parameter_name)
                assert parameter.grad.abs().max() > 1e-7, (method, parameter_name)


@pytest.mark.parametrize(
    ("method", "attention"),
    [("evit", "fast"), ("dynamicvit", "paper"), ("tome", "tiles"), ("tome", "dense")],
)
def test_compiles_in_one_graph(method, attention):
    model, images = make_sparse("deit", METHODS[method], attention, depth=2), images_for()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert (compiled(images) - model(images)).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_dense_model_comes_back(method):
    model, images = make_model("deit", depth=4, img_size=size_of("deit")[0]), images_for()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules, dense = dict(model.named_modules()), model(images)
    for back in (sparsifiner.desparsify, lambda model: sparsifiner.sparsify(model, keep=1.0, tokens=None)):
        sparsifiner.sparsify(model, keep=0.3, tokens=method)
        assert (model(images) - dense).abs().max() > 1e-3
        added = model.state_dict().keys() - state.keys()
        assert all(is_predictor(key) for key in added)
        assert bool(added) == isinstance(method, DynamicViT)
        assert not any(module.training for module in model.modules())
        assert sparsifiner.why_not(model) == []
        back(model)
        assert model.state_dict().keys() == state.keys()
        assert list(model.state_dict()) == list(state)
        assert (model(images) - dense).abs().max() < 1e-5
    sparsifiner.desparsify(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(images), dense)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_was_trained_and_replaced_since_stays():
    model = sparsifiner.sparsify(make_model("deit", depth=4), keep=0.3, tokens=EViT(0.5))
    block = model.blocks[1]
    block.mlp = nn.Linear(48, 48)
    with torch.no_grad():
        block.norm1.weight.add_(1)
    model.train()
    block.eval()
    dense = sparsifiner.desparsify(model).blocks[1]
    assert dense.mlp is block.mlp
    assert dense.norm1 is block.norm1
    assert model.blocks.training
    assert model.blocks[0].training
    assert not dense.training


def test_calling_sparsify_again_keeps_the_predictor():
    model = make_sparse("deit", DynamicViT(0.7))
    predictor = model.blocks[1].reducer
    weights = {name: weight.clone() for name, weight in model.state_dict().items() if is_predictor(name)}
    sparsifiner.sparsify(model, keep=0.5)
    sparsifiner.sparsify(model, preset="paper", tokens=DynamicViT(0.7))
    assert model.blocks[1].reducer is predictor
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    sparsifiner.sparsify(model, tokens=EViT(0.7))
    assert not any(is_predictor(name) for name in model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("name", ["deit", "internvit dynamic"])
def test_copies_and_pickles_compute_the_same_on_their_own(name):
    images = images_for(name)
    for method in (EViT(0.5), DynamicViT(0.5), ToMe(3)):
        model = make_sparse(name, method)
        expected = model(images)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(images), expected)
            for parameter in clone.parameters():
                parameter.zero_()
            assert torch.equal(model(images), expected)
            assert sparsifiner.desparsify(clone)(images).abs().max() == 0


def test_dense_weights_load_into_a_model_with_a_predictor(tmp_path):
    options = {**SMALL, "depth": 4, "img_size": 80}
    dense = timm.create_model("deit_tiny_patch16_224", **options).eval()
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    config = SparsifyConfig(keep=0.5, tokens=DynamicViT(0.5))
    model = load_model(
        "deit_tiny_patch16_224",
        config=config,
        weights=tmp_path / "dense.safetensors",
        model_args=options,
    )
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in dense.state_dict().items())
    images = make_images(80)
    with torch.no_grad():
        expected = model(images)
    # its own come with the rest
    torch.save(model.state_dict(), tmp_path / "own.pt")
    again = load_model(
        "deit_tiny_patch16_224", config=config, weights=tmp_path / "own.pt", model_args=options
    )
    with torch.no_grad():
        assert torch.equal(again(images), expected)
    # half a predictor does not pass for none
    partial = {key: value for key, value in state.items() if "reducer.out_conv" not in key}
    torch.save(partial, tmp_path / "partial.pt")
    with pytest.raises(ValueError, match=r"reducer\.out_conv\.0\.weight is missing from the file"):
        load_model(
            "deit_tiny_patch16_224", config=config, weights=tmp_path / "partial.pt", model_args=options
        )


@pytest.mark.parametrize("method", [EViT(0.5, fuse=False, at=(1, 2)), ToMe(3), None])
def test_adapters_bring_the_method(tmp_path, method):
    model = make_sparse("deit", method, "paper")
    sparsifiner.save_adapter(model, tmp_path / "adapter.safetensors")
    dense = sparsifiner.desparsify(copy.deepcopy(model))
    loaded = sparsifiner.load_adapter(dense, tmp_path / "adapter.safetensors")
    assert sparse_layers(loaded)[0].config.tokens == method
    images = images_for()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path):
    sparsifiner.save_adapter(
        make_sparse("deit", EViT(0.5), "paper", scorer=LowRank(basis=16)), tmp_path / "good.safetensors"
    )
    with safe_open(tmp_path / "good.safetensors", "pt") as file:
        cut = {key: file.get_tensor(key)[..., :3].contiguous() for key in file.keys()}  # noqa: SIM118
        save_file(cut, tmp_path / "bad.safetensors", file.metadata())
    images = images_for()
    for method in (None, EViT(0.7), DynamicViT(0.7)):
        model = make_sparse("deit", method, "paper")
        modules, state = dict(model.named_modules()), model.state_dict()
        with torch.no_grad():
            expected = model(images)
        with pytest.raises(ValueError, match="does not fit the model"):
            sparsifiner.load_adapter(model, tmp_path / "bad.safetensors")
        assert dict(model.named_modules()) == modules
        assert model.state_dict().keys() == state.keys()
        with torch.no_grad():
            assert torch.equal(model(images), expected)


@pytest.mark.parametrize("method", [*METHODS.values(), EViT(at=[1, 2])])
def test_methods_are_described_as_plain_values(method):
    described = json.loads(json.dumps(config_to_dict(SparsifyConfig(tokens=method))["tokens"]))
    assert described == json.loads(json.dumps(TOKENS.describe(method)))
    assert TOKENS.read(described) == method


def test_descriptions_that_fit_no_method_are_refused():
    with pytest.raises(ValueError, match="tokens: method='avit' is unknown"):
        TOKENS.read({"method": "avit"})
    with pytest.raises(ValueError, match=r"tokens: .* do not fit tome, whose options are r"):
        TOKENS.read({"method": "tome", "keep": 0.5})
    with pytest.raises(ValueError, match=r"tokens: keep must lie in \(0, 1\]"):
        TOKENS.read({"method": "evit", "keep": 2.0})


def planned(layout, layer):
    return plan(Call(layout), layer.config, layer.place)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS.values())
def test_budgets_are_those_of_the_image_size_whenever_the_model_was_made_sparse(method):
    options = {"keep": 0.2, "tokens": method, "backend": "torch"}
    model, images = make_model("deit", depth=4, img_size=224), make_images(96)
    before = sparsifiner.sparsify(copy.deepcopy(model), **options)
    native = [planned(TokenLayout((14, 14), 1), layer).budget for layer in sparse_layers(before)]
    for each in (before, model):
        each.set_input_size((96, 96))
    after = sparsifiner.sparsify(model, **options)
    if not isinstance(method, DynamicViT):  # whose predictors are made by chance
        assert torch.equal(before(images), after(images))
    layout = TokenLayout((6, 6), 1)
    budgets = [[planned(layout, layer).budget for layer in sparse_layers(each)] for each in (before, after)]
    assert budgets[0] == budgets[1]
    before.set_input_size((224, 224))
    assert [planned(TokenLayout((14, 14), 1), layer).budget for layer in sparse_layers(before)] == native


@torch.no_grad()
def test_a_compiled_model_takes_budgets_of_another_image_size():
    model = sparsifiner.sparsify(make_model("deit", depth=4, img_size=96), keep=0.2, tokens=ToMe(5)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in (96, 128):
        model.set_input_size((size, size))
        images = make_images(size)
        assert torch.equal(compiled(images), model(images))


def test_trace_tells_where_tokens_come_from():
    # 5 x 7 patches, lists of 8 of their 36 tokens
    model, images = make_sparse("deit", EViT(0.5), "tiles", profile="even"), images_for()
    with sparsifiner.trace(model) as traces, token_states(model) as states, torch.no_grad():
        model(images)
    assert sorted(traces) == [0, 1, 2, 3]
    for layer in (0, 1):
        assert traces[layer].positions is None
        assert traces[layer].connectivity.grid == (5, 7)
        assert traces[layer].connectivity.indices.shape == (2, 3, 4, 8)
        assert (traces[layer].connectivity.tile, traces[layer].summary) == (4, 2)
    for layer, patches in ((2, 18), (3, 9)):
        assert torch.equal(traces[layer].positions, states[layer - 1].positions)
        assert traces[layer].positions.shape == (2, patches)
        assert traces[layer].positions.max() < 35
    # runs of 16 in the place of tiles of 4 x 4; the fused token is prefix
    lists = traces[2].connectivity
    assert (lists.layout, lists.tile, traces[2].summary) == (CurveLayout(18, 2), 4, 2)
    assert lists.indices.shape == (2, 3, 2, 8)
    assert (lists.indices[..., :2] == torch.tensor([0, 1])).all()
    # of 11 tokens 8 would be listed, and three windows
    assert [traces[layer].dense for layer in range(4)] == [False, False, False, True]
    sparsifiner.sparsify(model, keep=1.0)
    with sparsifiner.trace(model) as traces, torch.no_grad():
        model(images)
    assert all(layer.dense for layer in traces.values())
    assert traces[3].positions.shape == (2, 9)
    assert traces[3].connectivity.to_mask().shape == (2, 3, 11, 11)


@torch.no_grad()
def test_lists_stay_as_long_as_for_all_tokens():
    model = make_sparse("deit", DynamicViT(0.7), "paper", keep=0.3)  # 36 tokens at first, lists of 11
    with sparsifiner.trace(model) as traces:
        model(images_for())
    tokens = [count.attention for count in DynamicViT(0.7).counts(4, 35, 1)]
    assert tokens == [36, 26, 19, 14]
    assert [traces[layer].connectivity.indices.shape for layer in range(4)] == [
        (2, 3, each - 1, 11) for each in tokens
    ]
    sparsifiner.sparsify(model, keep=0.6)  # of 22: the last two layers have no more
    with sparsifiner.trace(model) as traces:
        model(images_for())
    assert [traces[layer].dense for layer in range(4)] == [False, False, True, True]


@torch.no_grad()
@pytest.mark.parametrize("scorer", ["lowrank", "impact", "pooled", "oracle", "window", "strided", "random"])
def test_every_scorer_lists_among_the_tokens_that_are_left(scorer):
    model = make_sparse("deit", EViT(0.5), "tiles", scorer=scorer)
    with sparsifiner.trace(model) as traces:
        logits = model(images_for())
    assert torch.isfinite(logits).all()
    lists = traces[3].connectivity.indices
    assert lists.max() < 11
    assert (lists.diff(dim=-1) > 0).all()


@torch.no_grad()
def test_low_rank_scores_are_those_of_the_same_patches():
    """Rows and columns of W_down and W_up go with their patches, and the sum over patches stays the same."""
    model = make_sparse("deit", EViT(0.5, fuse=False, at=[0]), "paper", depth=2)
    seen = {}
    model.blocks[1].attn.scorer.register_forward_pre_hook(lambda module, args: seen.update(args=args))
    model(images_for())
    q, k, v, spec = seen["args"]
    scorer, origin = model.blocks[1].attn.scorer, spec.origin
    assert origin.tokens.shape == (2, 19)
    actual = scorer.scores(q, k, v, spec)
    for image in range(2):
        index = origin.tokens[image]
        down = scorer.down[index] * torch.cat([torch.ones(1), torch.full((18,), 35 / 18)])[:, None]
        reduced_q, reduced_k = scorer.query(q[image, :, 1:]), scorer.key(k[image])
        coefficients = (reduced_q @ (down.T @ reduced_k).mT * scorer.temperature).softmax(-1)
        kept = coefficients.topk(8, -1)
        sparse = torch.zeros_like(coefficients).scatter(-1, kept.indices, kept.values)
        magnitude = scorer.up[index].abs()
        expected = sparse @ torch.where(magnitude > 0.02, magnitude, 0).T
        assert (actual[image] - expected).abs().max() < 1e-6


def test_dynamic_sizes_are_followed_per_call():
    model = make_sparse("internvit dynamic", EViT(0.5), "tiles")
    sizes = [(70, 98), (84, 84), (28, 42), (70, 98)]
    with torch.no_grad():
        for size in sizes:
            images = make_images(size)
            with sparsifiner.trace(model) as traces:
                model(images)
            assert traces[0].connectivity.grid == (size[0] // 14, size[1] // 14)
            patches = size[0] * size[1] // 14**2
            assert traces[3].positions.max() < patches
            assert model.forward_features(images).shape[1] == EViT(0.5).counts(4, patches, 1)[-1].mlp


def test_compute_in_half_precision_and_under_autocast():
    for method in METHODS.values():
        model, images = make_sparse("deit", method), images_for()
        with torch.no_grad():
            expected = model(images)
            with torch.autocast("cpu", torch.bfloat16):
                mixed = model(images).float()
            half = model.bfloat16()(images.bfloat16()).float()
        # other tokens may stay where they are all but equal
        for logits in (mixed, half):
            assert (logits - expected).norm() < 0.1 * expected.norm()


def test_empty_batch_and_shapes_without_data():
    for method, attention in zip(METHODS.values(), ["fast", "tiles", "paper", "dense", "paper"], strict=True):
        model = make_sparse("deit", method, attention)
        assert model(images_for(batch=0)).shape == (0, 7)
        assert model.to("meta")(images_for().to("meta")).shape == (2, 7)


def test_blocks_cannot_be_called_one_by_one():
    model, images = make_sparse("deit", EViT(0.5)), images_for()
    message = "blocks with token sparsity cannot be called one by one.*tokens=None"
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(images)
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(images, indices=[0], stop_early=True)
    with pytest.raises(ValueError, match=message):
        model.forward_features(images, attn_mask=torch.ones(36, 36, dtype=torch.bool))
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match=message):
        model(images)
    model.set_grad_checkpointing(False)
    assert model(images).shape == (2, 7)


def test_calibration_refuses():
    model = make_sparse("deit", EViT(0.5))
    with pytest.raises(ValueError, match="calibrate measures layers that see all tokens; set tokens=None"):
        calibrate(model, [images_for()], progress=False)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("average pooling", {"tokens": EViT()}, "tokens: EViT needs a class token; use DynamicViT or ToMe"),
        ("deit", {"tokens": EViT(), "share": 2}, "share=2: the lists of one layer do not fit the next"),
        (
            "deit",
            {"tokens": ToMe(), "preset": "paper", "scorer": Released()},
            "Released.. .* takes tokens=None",
        ),
        ("deit", {"tokens": "evit"}, r"tokens must be EViT\(...\), DynamicViT\(...\), ToMe\(...\) or None"),
        ("deit", {"tokens": EViT}, "tokens must be EViT"),
        ("deit", {"tokens": EViT(at=[3, 4])}, r"tokens: at=\[3, 4\] must be ascending blocks of 0 to 3"),
        ("deit", {"tokens": DynamicViT(at=[4])}, r"tokens: at=\[4\] must be ascending blocks of 0 to 3"),
    ],
)
def test_impossible_combinations_are_named_and_change_nothing(name, options, message):
    model = make_model(name, depth=4, img_size=size_of(name)[0])
    modules = dict(model.named_modules())
    with pytest.raises((TypeError, ValueError), match=message):
        sparsifiner.sparsify(model, **options)
    assert dict(model.named_modules()) == modules
    sparsifiner.sparsify(model, keep=0.3, scorer="pooled")
    modules, configs = dict(model.named_modules()), [layer.config for layer in sparse_layers(model)]
    with pytest.raises((TypeError, ValueError), match=message):
        sparsifiner.sparsify(model, **options)
    assert dict(model.named_modules()) == modules
    assert [layer.config for layer in sparse_layers(model)] == configs


def test_a_refused_method_leaves_no_hook_behind():
    model = make_model("internvit dynamic", depth=4)
    with pytest.raises(ValueError, match="must be ascending"):
        sparsifiner.sparsify(model, tokens=EViT(at=[9]))
    assert not model.patch_embed._forward_hooks


def test_an_untrained_predictor_is_said():
    with pytest.warns(UserWarning, match="the token predictor is untrained"):
        model = sparsifiner.sparsify(make_model("deit"), keep=1.0, tokens=DynamicViT(0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifiner.sparsify(model, keep=0.5)  # it stays, and so does what it learned
        sparsifiner.sparsify(make_model("deit"), keep=1.0, tokens=EViT(0.7))


def test_predictors_keep_what_they_learned_when_a_share_changes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sparsifiner.sparsify(make_model("deit"), keep=1.0, tokens=DynamicViT(0.7))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if is_predictor(name)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifiner.sparsify(model, tokens=DynamicViT(0.5))
    assert model.blocks[1].reducer.keep == 0.5
    assert before
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_adapters_do_not_lose_predictors(tmp_path):
    model = sparsifiner.sparsify(make_model("deit"), keep=1.0, tokens=DynamicViT(0.7))
    with pytest.raises(ValueError, match=r"save model\.state_dict\(\) instead"):
        sparsifiner.save_adapter(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_registers_are_no_class_token():
    model = timm.create_model("vit_medium_patch16_reg4_gap_256", img_size=64, depth=2)
    with pytest.raises(ValueError, match="EViT needs a class token"):
        sparsifiner.sparsify(model, tokens=EViT(0.5))
    sparsifiner.sparsify(model, tokens=ToMe(4))


def test_hooks_that_would_be_lost_are_named():
    model = make_model("deit")
    handle = model.blocks[1].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"blocks \[1\] have forward hooks"):
        sparsifiner.sparsify(model, tokens=EViT(0.5))
    handle.remove()
    sparsifiner.sparsify(model, tokens=EViT(0.5))


@torch.no_grad()
def test_the_oracle_ranks_by_the_attention_that_counts_sizes():
    model = sparsifiner.sparsify(
        make_model("deit", depth=4), keep=0.1, tile=1, summary=None, scorer="oracle", profile="even",
        tokens=ToMe(40), backend="torch",
    )  # fmt: skip
    images = make_images(224)
    oracle = mask_recall(model, [(images, None)])
    for other in ("pooled", "random"):  # at tile 1 pooled ranks each query's keys by the same logits
        sparsifiner.sparsify(model, scorer=other)
        recall = mask_recall(model, [(images, None)])
        assert all(theirs <= best + 1e-6 for theirs, best in zip(recall, oracle, strict=True))
    assert oracle[3] > 2 * recall[3]


def test_the_mlp_does_not_wait_with_queries_and_keys_in_memory():
    model = sparsifiner.sparsify(make_model("deit"), keep=0.5, tokens=EViT(0.5))
    alive = []
    for block in model.blocks:
        seen = []
        block.attn.register_forward_hook(
            lambda module, args, out, seen=seen: seen.extend(map(weakref.ref, out))
        )
        block.mlp.register_forward_pre_hook(
            lambda module, args, seen=seen: alive.extend(each() is not None for each in seen)
        )
    with torch.no_grad():
        model(make_images(224, 1))
    assert alive == [False] * (3 * len(model.blocks))
