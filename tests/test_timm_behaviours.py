"""What timm's own tests ask of its models, asked of sparsified ones."""

import pytest
import timm
import torch
from timm.models._features import FeatureHookNet
from timm.models._features_fx import create_feature_extractor
from torchvision.models import feature_extraction

import sparsifiner
from sparsifiner import EViT
from sparsifiner.convert import sparse_layers
from tests.models import ARCHITECTURES, make_images, make_model

NAMES = [
    *("dinov2 registers", "deit distilled", "qk norm", "average pooling"),
    *("internvit dynamic", "post norm", "lv-vit", "gated"),
]


def make_sparse(name):
    return sparsifiner.sparsify(make_model(name), keep=0.2, tile=2), make_images(ARCHITECTURES[name][2][0])


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_reach_every_parameter(name):
    model, images = make_sparse(name)
    with sparsifiner.trace(model) as traces:
        logits = model.train()(images)
    assert not any(trace.dense for trace in traces.values())
    assert logits.shape == (2, 7)
    logits.mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_only_what_chooses_keys_has_no_gradient():
    model = sparsifiner.sparsify(make_model("deit"), preset="paper", keep=0.2)
    model.train()(make_images(224)).mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    scorers = {name for name, _ in model.named_parameters() if ".scorer." in name}
    assert without == scorers
    assert len(scorers) == 12


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_intermediates_end_with_what_the_model_gives(name):
    model, images = make_sparse(name)
    features = model.forward_features(images)
    final, intermediates = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
    assert torch.equal(final, features)
    assert len(intermediates) == 2
    last = intermediates[-1]
    assert torch.equal(model.norm(torch.cat(last[::-1], 1) if model.num_prefix_tokens else last), features)
    assert all(len(each) == 2 for each in model.get_intermediate_layers(images, 2))
    model.prune_intermediate_layers([0], prune_head=False)
    sparsifiner.sparsify(model, keep=0.2)
    assert [(layer.place.index, layer.place.depth) for layer in sparse_layers(model)] == [(0, 1)]
    assert model.forward_intermediates(images, intermediates_only=True)[0].shape[0] == 2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_by_hooks(name):
    model, images = make_sparse(name)
    expected = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: expected.append(output))
    model(images)
    handle.remove()
    hooked = FeatureHookNet(model, out_indices=(1,), out_map=["features"])(images)
    assert torch.equal(hooked[0] if isinstance(hooked, list) else hooked["features"], expected[0])


@pytest.mark.parametrize("extract", [create_feature_extractor, feature_extraction.create_feature_extractor])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_by_fx(name, extract):
    model, images = make_sparse(name)
    nodes = ["blocks.0.attn", "blocks.1"]
    if name == "internvit dynamic" and extract is feature_extraction.create_feature_extractor:
        with pytest.raises(torch.fx.proxy.TraceError):  # as the dense model
            extract(make_model(name), ["blocks.1"])
        return
    extractor, seen = extract(model, nodes), []
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.append(output))
        for module in (model.blocks[0].attn, model.blocks[1])
    ]
    for size in ARCHITECTURES[name][2] if model.dynamic_img_size else ARCHITECTURES[name][2][:1]:
        images = make_images(size)
        seen.clear()
        model(images)
        expected = list(seen)
        for actual, wanted in zip(extractor(images).values(), expected, strict=True):
            assert torch.equal(actual, wanted)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_fx_follows_every_size_of_a_dynamic_model():
    model = sparsifiner.sparsify(make_model("internvit dynamic"), keep=0.2, tile=2)
    extractor = create_feature_extractor(model, ["norm"])
    model(make_images((112, 154)))  # the size of another call must not matter
    for size in ((112, 112), (154, 112), (112, 154)):
        images = make_images(size)
        assert torch.equal(extractor(images)["norm"], model.forward_features(images))


def test_masks_and_dropped_tokens_are_refused_in_a_graph_too():
    model, images = make_sparse("deit")
    extractor = create_feature_extractor(model, ["norm"])
    with pytest.raises(ValueError, match="layer 0: attn_mask is not supported"):
        extractor(images, attn_mask=torch.ones(197, 197, dtype=torch.bool))
    sparsifiner.sparsify(model, tokens=EViT(0.5))
    with pytest.raises(ValueError, match=r"cannot be called one by one, as .*torch\.fx"):
        create_feature_extractor(model, ["norm"])


@torch.no_grad()
def test_features_only_models_are_made_sparse_in_their_place():
    arguments = {"features_only": True, "depth": 3, "embed_dim": 48, "num_heads": 3, "out_indices": [0, 1]}
    features, images = timm.create_model("deit_tiny_patch16_224", **arguments).eval(), make_images(224)
    sparsifiner.sparsify(features.model, keep=0.3)
    assert [layer.place.depth for layer in sparse_layers(features)] == [2, 2]  # timm leaves out the third
    expected = features.model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(images), expected, strict=True))
