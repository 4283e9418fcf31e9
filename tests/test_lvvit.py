"""LV-ViT against a transcription of it, under the released names, dense and sparse."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsifiner
from sparsifiner.config import make_config
from sparsifiner.hosts import host_of
from sparsifiner.models.loading import load_model
from tests.models import SMALL, make_images, summaries_of_single_patches

SHAPES = {"lvvit_s": {"depth": 16, "width": 384}, "lvvit_m": {"depth": 20, "width": 512}}

untrained = pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")


def make_model(name="lvvit_s", **options):
    """A small LV-ViT; biases, running means and variances have left their start, which would hide errors."""
    model = timm.create_model(name, **{**SMALL, "img_size": 96, **options})
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand_like(tensor))
    return model.eval()


def released_shapes(depth, width, side=14, classes=1000):
    """Names and shapes in the released checkpoints, from the modules of zihangJiang/TokenLabeling."""
    linear = {"attn.proj": (width, width), "mlp.fc1": (3 * width, width), "mlp.fc2": (width, 3 * width)}
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, side * side + 1, width)}
    for index, (channels, kernel) in enumerate(((3, 7), (64, 3), (64, 3)), start=1):
        shapes[f"patch_embed.conv{index}.weight"] = (64, channels, kernel, kernel)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed.bn{index}.{name}"] = (64,)
        shapes[f"patch_embed.bn{index}.num_batches_tracked"] = ()
    shapes |= {"patch_embed.proj.weight": (width, 64, 8, 8), "patch_embed.proj.bias": (width,)}
    for block in range(depth):
        shapes[f"blocks.{block}.attn.qkv.weight"] = (3 * width, width)
        for name, shape in linear.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.{name}": (width,) for name in ("weight", "bias")}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    for head in ("head", "aux_head"):
        shapes |= {f"{head}.weight": (classes, width), f"{head}.bias": (classes,)}
    return shapes


def write_released(path, **sizes):
    """A checkpoint as released: a plain state dict, `*.pth.tar`."""
    state = {
        name: torch.tensor(7) if name.endswith("tracked") else 0.02 * torch.rand(shape)
        for name, shape in released_shapes(**sizes).items()
    }
    torch.save(state, path)
    return state


def transcription(state, images, heads, training=False):
    """Logits [B, classes] and token logits [B, patches, classes] by the published description."""

    def dense(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    x = images
    for index, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), start=1):
        x = F.conv2d(x, state[f"patch_embed.conv{index}.weight"], stride=stride, padding=padding)
        mean, variance, weight, bias = (
            state[f"patch_embed.bn{index}.{name}"]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.relu(F.batch_norm(x, mean.clone(), variance.clone(), weight, bias, training))
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = x.permute(0, 2, 3, 1).flatten(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1) + state["pos_embed"]
    B, N, C = x.shape
    for block in range(sum(name.endswith("qkv.weight") for name in state)):
        prefix = f"blocks.{block}"
        qkv = dense(norm(x, f"{prefix}.norm1"), f"{prefix}.attn.qkv")
        q, k, v = qkv.view(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.transpose(2, 3) / math.sqrt(C // heads)).softmax(-1)
        attended = (probabilities @ v).transpose(1, 2).reshape(B, N, C)
        x = x + dense(attended, f"{prefix}.attn.proj") / 2
        hidden = F.gelu(dense(norm(x, f"{prefix}.norm2"), f"{prefix}.mlp.fc1"))
        x = x + dense(hidden, f"{prefix}.mlp.fc2") / 2
    x = norm(x, "norm")
    token_logits = dense(x[:, 1:], "aux_head")
    return dense(x[:, 0], "head") + 0.5 * token_logits.max(1).values, token_logits


class TestModel:
    @pytest.mark.parametrize("training", [False, True])
    def test_computes_what_is_published(self, training):
        model = make_model().double().train(training)
        images = make_images(96).double()
        expected, expected_tokens = transcription(
            dict(model.state_dict()), images, SMALL["num_heads"], training
        )
        with torch.no_grad():
            features = model.forward_features(images)
            assert (model.forward_head(features) - expected).abs().max() < 1e-10
            assert (model.token_logits(features) - expected_tokens).abs().max() < 1e-10
            assert (model(images) - expected).abs().max() < 1e-10

    @pytest.mark.parametrize("name", SHAPES)
    def test_names_and_shapes_are_those_of_the_released_checkpoints(self, name):
        with torch.device("meta"):
            model = timm.create_model(name)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        assert shapes == released_shapes(**SHAPES[name])

    @pytest.mark.parametrize(("name", "millions", "heads"), [("lvvit_s", 26.2, 6), ("lvvit_m", 55.8, 8)])
    def test_sizes(self, name, millions, heads):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert sum(tensor.numel() for tensor in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
        assert [block.attn.num_heads for block in model.blocks] == [heads] * SHAPES[name]["depth"]

    def test_is_as_plain_as_deit(self):
        model = make_model()
        assert isinstance(model, VisionTransformer)
        assert {type(block) for block in model.blocks} == {Block}
        assert {type(block.attn) for block in model.blocks} == {Attention}
        assert sparsifiner.why_not(model) == []

    def test_both_heads_start_alike(self):
        model = timm.create_model("lvvit_s", **SMALL)
        for head in (model.head, model.aux_head):
            assert head.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert not head.bias.any()

    @pytest.mark.parametrize("option", ["init_values", "block_fn", "embed_layer"])
    def test_what_makes_it_lvvit_cannot_be_replaced(self, option):
        with pytest.raises(TypeError, match=f"multiple values for keyword argument '{option}'"):
            make_model(**{option: 1})


class TestWeights:
    def test_a_released_checkpoint_loads(self, tmp_path):
        state = write_released(tmp_path / "lvvit_s.pth.tar", **SHAPES["lvvit_s"])
        model = load_model("lvvit_s", weights=tmp_path / "lvvit_s.pth.tar")
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    @untrained
    def test_one_loads_into_the_sparse_model_at_another_size(self, tmp_path):
        file = tmp_path / "small.pth.tar"
        state = write_released(file, depth=2, width=48, classes=7)
        model = load_model(
            "lvvit_s",
            config=make_config("paper", keep=0.25),
            weights=file,
            img_size=96,
            resample=True,
            model_args=SMALL,
        )
        assert model.pos_embed.shape == (1, 37, 48)
        assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
        with pytest.raises(ValueError, match=r"pos_embed is \[1, 197, 48\] in the file"):
            load_model("lvvit_s", weights=file, img_size=96, model_args=SMALL)

    def test_timm_fits_pretrained_weights_to_the_task(self, tmp_path):
        file = tmp_path / "small.pth.tar"
        state = write_released(file, depth=2, width=48)
        model = timm.create_model(
            "lvvit_s",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(file)},
            img_size=96,
            in_chans=1,
            **SMALL,
        )
        assert model.patch_embed.conv1.weight.shape == (64, 1, 7, 7)
        assert torch.equal(model.patch_embed.proj.weight, state["patch_embed.proj.weight"])
        assert model.head.out_features == model.aux_head.out_features == 7


class TestSizes:
    @pytest.mark.parametrize("size", [384, (96, 160)])
    def test_other_image_sizes(self, size):
        model = make_model(img_size=size, depth=1)
        height, width = size if isinstance(size, tuple) else (size, size)
        assert model.patch_embed.grid_size == (height // 16, width // 16)
        with torch.no_grad():
            assert model.forward_features(make_images(size, 1)).shape[1] == height * width // 256 + 1

    def test_input_size_is_set_later(self):
        model = make_model()
        model.set_input_size((64, 128))
        assert model.patch_embed.patch_size == (16, 16)
        assert model.patch_embed.grid_size == (4, 8)
        assert model(make_images((64, 128))).shape == (2, 7)

    def test_patch_size_is_set_later(self):
        model = make_model()
        for patch_size, kernel in ((32, 16), (8, 4), (16, 8)):
            model.set_input_size(patch_size=patch_size)
            assert model.patch_embed.proj.weight.shape == (48, 64, kernel, kernel)
            assert model.patch_embed.img_size == (96, 96)
            assert model.patch_embed.patch_size == (patch_size, patch_size)
            assert model(make_images(96)).shape == (2, 7)
        model.set_input_size((64, 64), 8)
        assert model.patch_embed.grid_size == (8, 8)
        assert model(make_images(64)).shape == (2, 7)

    def test_odd_patches_are_refused_and_change_nothing(self):
        with pytest.raises(ValueError, match="patch_size must be even, got 15"):
            make_model(patch_size=15)
        model = make_model()
        with pytest.raises(ValueError, match=r"patch_size must be even, got \(16, 7\)"):
            model.set_input_size(patch_size=(16, 7))
        assert model.patch_embed.patch_size == (16, 16)
        assert model(make_images(96)).shape == (2, 7)

    def test_wrong_images_are_refused(self):
        with pytest.raises(ValueError, match=r"images are 64x96, but the model takes 96x96.*set_input_size"):
            make_model()(make_images((64, 96)))
        with pytest.raises(ValueError, match="images are 96x95, which patches of 16x16 do not divide"):
            make_model(dynamic_img_size=True)(make_images((96, 95)))

    def test_dynamic_sizes_and_padding(self):
        model = make_model()
        dynamic = make_model(dynamic_img_size=True, dynamic_img_pad=True)
        dynamic.load_state_dict(model.state_dict())
        images = make_images(96)
        padded = F.pad(images[..., :90, :85], (0, 11, 0, 6))
        with torch.no_grad():
            assert (dynamic(images) - model(images)).abs().max() < 1e-5
            assert (dynamic(images[..., :90, :85]) - model(padded)).abs().max() < 1e-5
            assert dynamic(make_images((32, 128))).shape == (2, 7)


class TestHeads:
    def test_features_before_the_heads(self):
        model = make_model()
        features = model.forward_features(make_images(96))
        assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
        assert torch.equal(
            model.token_logits(features), model.aux_head(host_of(model).patch_tokens(features))
        )

    def test_without_classes_the_class_token_comes_out(self):
        model = make_model(num_classes=0)
        images = make_images(96)
        assert not any("head" in name for name in model.state_dict())
        assert torch.equal(model(images), model.forward_features(images)[:, 0])

    def test_both_heads_are_reset(self):
        model = make_model().double()
        images = make_images(96).double()
        model.reset_classifier(11)
        assert model.head.weight.shape == model.aux_head.weight.shape == (11, 48)
        assert not model.aux_head.training
        assert model(images).shape == (2, 11)
        model.reset_classifier(0)
        assert torch.equal(model(images), model.forward_features(images)[:, 0])

    def test_unpooled_tokens_have_logits_of_their_own(self):
        model = make_model()
        features = model.forward_features(make_images(96))
        model.global_pool = ""
        assert torch.equal(model.forward_head(features), model.head(features))

    def test_timm_takes_its_intermediates(self):
        extractor = make_model(features_only=True, out_indices=(0, 1))
        assert [tuple(maps.shape) for maps in extractor(make_images(96))] == [(2, 48, 6, 6)] * 2


class TestMacs:
    @untrained
    def test_published_rows(self):
        model = timm.create_model("lvvit_s")
        report = sparsifiner.count_macs(model)
        assert report.paper_mhsa == pytest.approx(476.9e6, abs=0.2e6)
        assert report.to_dict()["dense"]["attention"] == report.paper_mhsa
        for keep, published in ((0.5, 339.7e6), (0.25, 221.7e6), (0.1, 149.5e6)):
            sparsifiner.sparsify(model, preset="paper", keep=keep)
            assert sparsifiner.count_macs(model).paper_mhsa == pytest.approx(published, abs=0.2e6)

    @pytest.mark.parametrize("size", [96, (64, 128)])
    def test_dense_total_equals_torch_flop_counter(self, size):
        model = make_model(img_size=size).requires_grad_(False)
        images = make_images(size, batch=1)
        report = sparsifiner.count_macs(model, tuple(images.shape[1:])).to_dict()
        # the math backend is matrix products, which the counter sees
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images)
        assert 2 * report["dense"]["total"] == counter.get_total_flops()


class TestSparse:
    @pytest.mark.parametrize("size", [96, 160])
    def test_keeping_everything_is_the_dense_model(self, size):
        model = make_model()
        model.set_input_size((size, size))
        images = make_images(size)
        with torch.no_grad():
            dense = model(images)
            sparsifiner.sparsify(model, keep=1.0, summary=None)
            assert (model(images) - dense).abs().max() < 1e-5
            sparsifiner.sparsify(model, keep=0.1, tile=4)
            with summaries_of_single_patches(), sparsifiner.trace(model) as traces:
                assert (model(images) - dense).abs().max() < 1e-5
            assert not traces[0].dense
            assert torch.equal(sparsifiner.desparsify(model)(images), dense)

    @untrained
    @pytest.mark.parametrize("preset", ["fast", "paper"])
    def test_gradients_reach_stem_and_both_heads(self, preset):
        model = sparsifiner.sparsify(make_model(), preset=preset, keep=0.25).train()
        features = model.forward_features(make_images(96))
        (
            model.forward_head(features).square().mean() + model.token_logits(features).square().mean()
        ).backward()
        for name, parameter in model.named_parameters():
            if ".scorer." not in name:  # no gradient flows through the selection
                assert parameter.grad.abs().max() > 0, name

    @untrained
    @pytest.mark.parametrize("preset", ["fast", "paper"])
    def test_another_size_than_the_scorer_was_made_for(self, preset):
        model = sparsifiner.sparsify(make_model(), preset=preset, keep=0.25)
        model.set_input_size((128, 64))
        with sparsifiner.trace(model) as traces:
            assert model(make_images((128, 64))).shape == (2, 7)
        assert traces[1].connectivity.grid == (8, 4)

    @untrained
    @pytest.mark.parametrize("name", SHAPES)
    def test_the_paper_preset_has_a_name(self, name):
        model = timm.create_model(f"sparsifiner_{name}", keep=0.25, img_size=96, **SMALL).eval()
        with sparsifiner.trace(model) as traces:
            assert model(make_images(96)).shape == (2, 7)
        assert traces[0].connectivity.indices.shape == (2, 3, 36, 10)  # a quarter of 37 tokens
        assert isinstance(model.aux_head, nn.Linear)

    @untrained
    def test_compiles(self):
        model = sparsifiner.sparsify(make_model(), preset="fast", keep=0.25)
        images = make_images(96)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert (compiled(images) - model(images)).abs().max() < 1e-4
