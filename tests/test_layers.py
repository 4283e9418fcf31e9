"""Layers that are removed or moved, calls of sparsify that fail, and hooks of all kinds."""

import warnings

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsifiner
from sparsifiner import DynamicViT, EViT
from sparsifiner.attention import SparseAttention
from sparsifiner.blocks import TokenBlock
from sparsifiner.convert import sparse_layers
from sparsifiner.scorers import LowRank
from sparsifiner.tokens.dynamicvit.reducer import PredictingReducer


def make_model(depth=4, **options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(depth=depth, **sizes, **options).eval()


def make_images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def shares(model):
    return [layer.keep[0] / layer.keep[1] for layer in sparse_layers(model)]


def slice_blocks(model):
    model.blocks = model.blocks[:2]


def delete_blocks(model):
    del model.blocks[1]
    del model.blocks[1]


def prune(model):
    model.prune_intermediate_layers([1], prune_head=False)


def reorder_blocks(model):
    model.blocks = nn.Sequential(model.blocks[3], model.blocks[1])


REMOVALS = [slice_blocks, delete_blocks, prune, reorder_blocks]


@pytest.mark.parametrize("remove", REMOVALS)
@pytest.mark.parametrize("options", [{}, {"share": 2}, {"scorer": "random"}, {"tokens": EViT(0.5)}])
@torch.no_grad()
def test_layers_count_as_they_are_when_sparsify_is_called(remove, options):
    model, images = make_model(), make_images()
    sparsifiner.sparsify(model, keep=0.3, tile=2, **options)(images)
    remove(model)
    sparsifiner.sparsify(model, keep=0.3)
    fresh = make_model()
    remove(fresh)
    sparsifiner.sparsify(fresh, keep=0.3, tile=2, **options)
    assert shares(model) == shares(fresh)
    assert [(layer.place.index, layer.place.depth) for layer in sparse_layers(model)] == [(0, 2), (1, 2)]
    assert torch.equal(model(images), fresh(images))
    dense = make_model()
    remove(dense)
    assert torch.equal(sparsifiner.desparsify(model)(images), dense(images))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in dense.named_modules()]


def test_a_list_of_keeps_is_for_the_layers_that_are_there():
    model = sparsifiner.sparsify(make_model(), keep=0.3)
    del model.blocks[1]
    sparsifiner.sparsify(model, keep=[0.5, 0.3, 0.1])
    assert shares(model) == [0.5, 0.3, 0.1]
    before = snapshot(model)
    with pytest.raises(ValueError, match="keep has 4 entries, but the model has 3 layers"):
        sparsifiner.sparsify(model, keep=[0.5, 0.3, 0.1, 0.1])
    assert snapshot(model) == before


@pytest.mark.parametrize(("share", "removed"), [(2, 2), (3, 0), (3, 1)])
@torch.no_grad()
def test_layers_whose_lists_are_gone_say_so_until_sparsify_is_called(share, removed):
    model, images = sparsifiner.sparsify(make_model(), keep=0.3, tile=2, share=share), make_images()
    model(images)
    del model.blocks[removed]
    for _ in range(2):  # the first call must leave no lists for the second
        with pytest.raises(RuntimeError, match=r"sparsify\(model\) again once layers were removed"):
            model(images)
    sparsifiner.sparsify(model, keep=0.2)(images)


@torch.no_grad()
def test_lists_of_an_earlier_call_are_not_taken():
    model, images = sparsifiner.sparsify(make_model(), keep=0.3, tile=2, share=3), make_images()
    del model.blocks[2]  # the last of its group, which would have let the lists go
    model(images)
    del model.blocks[0]
    with pytest.raises(RuntimeError, match=r"sparsify\(model\) again once layers were removed"):
        model(images)


def test_blocks_of_another_model_follow_its_grid():
    model = sparsifiner.sparsify(make_model(), keep=0.3, tile=2)
    other = VisionTransformer(img_size=64, patch_size=4, depth=0, embed_dim=32, num_heads=2, num_classes=5)
    other.blocks = model.blocks
    sparsifiner.sparsify(other, keep=0.3)
    assert other(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def snapshot(model):
    """Everything that a failing call could change: values, identities, configurations, hooks, modes."""
    modules = []
    for name, module in model.named_modules():
        plain = {
            key: list(value.items()) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key not in {"_parameters", "_buffers"}
        }
        modules.append((name, module, plain))
    tensors = {name: (value.data_ptr(), value.tolist()) for name, value in model.state_dict().items()}
    trained = [(name, id(value), value.requires_grad) for name, value in model.named_parameters()]
    return modules, tensors, trained


def fail_at(monkeypatch, owner, name, call):
    """Makes the how-manieth call of a function fail."""
    works, calls = getattr(owner, name), []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("no memory")
        return works(*args, **options)

    monkeypatch.setattr(owner, name, fails)


# where a call fails, at the how-manieth call of what, and how the model was before
FAILURES = [
    *((LowRank, "build", 3, before) for before in ("dense", "sparse", "fewer tokens", "layers removed")),
    *((SparseAttention, "__init__", 3, before) for before in ("dense", "a dense layer put back")),
    *((TokenBlock, "__init__", 3, before) for before in ("dense", "sparse", "fewer tokens")),
    *((PredictingReducer, "__init__", 2, before) for before in ("dense", "fewer tokens")),
    (PredictingReducer, "load_state_dict", 2, "fewer tokens"),
    *((warnings, "warn", 1, before) for before in ("dense", "sparse", "fewer tokens", "layers removed")),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("owner", "name", "call", "before"), FAILURES)
@pytest.mark.filterwarnings(
    "ignore:the low-rank scorer is untrained", "ignore:the token predictor is untrained"
)
def test_a_call_that_fails_changes_nothing(monkeypatch, owner, name, call, before, dynamic):
    model = make_model(dynamic_img_size=dynamic).train()
    model.blocks[0].attn.qkv.eval()
    model.blocks[1].attn.proj.weight.requires_grad_(False)
    model.blocks[0].attn.register_forward_hook(print)
    dense = model.blocks[2].attn
    if before != "dense":
        sparsifiner.sparsify(model, keep=0.3, scorer="random", share=2)
    if before == "fewer tokens":
        sparsifiner.sparsify(model, share=1, tokens=DynamicViT(0.5))
    if before == "layers removed":
        del model.blocks[1]
    if before == "a dense layer put back":
        for block in model.blocks[:3]:
            block.attn = dense
    fail_at(monkeypatch, owner, name, call)
    state = snapshot(model)
    with pytest.raises(RuntimeError, match="no memory"):
        sparsifiner.sparsify(model, preset="paper", keep=0.2, tokens=DynamicViT(0.7, at=[0, 1, 2]))
    assert snapshot(model) == state


def register(kind, module, calls):
    """Registers a hook of a kind, which notes its calls behind the module that it should be told of."""

    def note(*args, **options):
        calls.append(kind)

    noting = {
        "forward": lambda: module.register_forward_hook(note),
        "forward, with arguments": lambda: module.register_forward_hook(note, with_kwargs=True),
        "forward, always": lambda: module.register_forward_hook(note, always_call=True),
        "before forward": lambda: module.register_forward_pre_hook(note),
        "before forward, with arguments": lambda: module.register_forward_pre_hook(note, with_kwargs=True),
        "backward": lambda: module.register_full_backward_hook(note),
        "before backward": lambda: module.register_full_backward_pre_hook(note),
        "state dict": lambda: module.register_state_dict_post_hook(note),
        "before state dict": lambda: module.register_state_dict_pre_hook(note),
        "before loading": lambda: module.register_load_state_dict_pre_hook(
            lambda told, *rest: calls.append(kind if told is calls[0] else "another module")
        ),
        "loaded": lambda: module.register_load_state_dict_post_hook(note),
    }
    return noting[kind]()


KINDS = [
    *("forward", "forward, with arguments", "forward, always"),
    *("before forward", "before forward, with arguments"),
    *("backward", "before backward", "state dict", "before state dict", "before loading", "loaded"),
]


def called(model, module, calls):
    """Kinds of hooks of a module that are called by a training step, saving and loading."""
    calls[:] = [module]
    model(make_images()).sum().backward()
    model.load_state_dict(model.state_dict())
    return sorted(calls[1:])


@pytest.mark.parametrize("place", ["attention", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_every_kind_survive_both_ways(kind, place):
    def module():
        return model.blocks[1].attn if place == "attention" else model.blocks

    model, calls = make_model(), []
    options = {"keep": 0.3, "tile": 2, "tokens": EViT(0.5) if place == "blocks" else None}
    first = register(kind, module(), calls)
    sparsifiner.sparsify(model, **options)
    assert called(model, module(), calls) == [kind]
    second = register(kind, module(), calls)
    assert called(model, module(), calls) == [kind] * 2
    sparsifiner.desparsify(model)
    assert called(model, module(), calls) == [kind] * 2
    second.remove()
    assert called(model, module(), calls) == [kind]
    sparsifiner.sparsify(model, **options)
    assert called(model, module(), calls) == [kind]
    first.remove()
    assert called(model, module(), calls) == []
    third = register(kind, module(), calls)
    sparsifiner.desparsify(model)
    third.remove()
    assert called(model, module(), calls) == []


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_registered_while_sparse_are_the_dense_modules(kind):
    model, calls = sparsifiner.sparsify(make_model(), keep=0.3, tile=2), []
    handle = register(kind, model.blocks[1].attn, calls)
    sparsifiner.desparsify(model)
    assert called(model, model.blocks[1].attn, calls) == [kind]
    handle.remove()
    assert called(model, model.blocks[1].attn, calls) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_groups_checkpointed_as_a_whole_compute_the_same_and_others_say_so(reentrant):
    model, images = sparsifiner.sparsify(make_model(), keep=0.3, tile=2, share=2), make_images()
    weight = model.patch_embed.proj.weight
    expected = torch.autograd.grad(model(images).sum(), weight, retain_graph=True)[0]
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    groups = x
    for start in (0, 2):
        groups = checkpoint(model.blocks[start : start + 2], groups, use_reentrant=reentrant)
    model.forward_head(model.norm(groups)).sum().backward(inputs=None if reentrant else [weight])
    assert (weight.grad - expected).abs().max() < 1e-5 * expected.abs().max()
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpoint with all layers that share lists at once"):
        model.forward_head(model.norm(x)).sum().backward()


def test_tensors_of_its_own_are_not_lost():
    model = make_model()
    model.blocks[2].attn.temperature = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="block 2 has an attention with tensors of its own: temperature"):
        sparsifiner.sparsify(model)
