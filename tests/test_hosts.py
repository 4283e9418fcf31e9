"""A model family that nobody knew: one file's worth of code and a row, and all of the product works on it."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from torch import nn

import sparsifiner
from sparsifiner.attention import SparseAttention
from sparsifiner.cli import main
from sparsifiner.convert import sparse_layers
from sparsifiner.hosts import HOSTS, Host, find_host, host_of
from sparsifiner.measure.recall import mask_recall

# The model, as somebody else wrote it: separate projections, no class token, layers in a list.


class PlainAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class PlainLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer = nn.ModuleDict({"attention": PlainAttention(width, heads)})
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.mixer["attention"](self.before(x))
        return x + self.mlp(self.between(x))


class PlainModel(nn.Module):
    def __init__(self, side=96, patch=8, width=32, heads=4, depth=3, num_classes=5):
        super().__init__()
        self.side, self.patch, self.num_classes = side, patch, num_classes
        self.stem = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.5 * torch.randn(1, (side // patch) ** 2, width))
        self.layers = nn.ModuleList(PlainLayer(width, heads) for _ in range(depth))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def tokens(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, images):
        return self.classifier(self.tokens(images).mean(1))


@register_model
def plain_toy_model(pretrained=False, img_size=96, num_classes=5, **options):
    return PlainModel(side=img_size, num_classes=num_classes)


# Its host: what one writes to have it sparse.


class PlainSparseAttention(SparseAttention):
    SHARED_MODULES = ("to_q", "to_k", "to_v", "to_out")

    def project(self, x):
        return tuple(
            each(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.to_q, self.to_k, self.to_v)
        )

    def combine(self, x, out):
        return self.to_out(out.transpose(1, 2).flatten(2))

    def dropout(self):
        return 0.0


class PlainHost(Host):
    FAMILY = "plain toy model"
    ATTENTION = "mixer.attention"
    ATTENTIONS = (PlainAttention,)
    SPARSE_ATTENTION = PlainSparseAttention

    @classmethod
    def owns(cls, model):
        return isinstance(model, PlainModel)

    @property
    def blocks(self):
        return self.model.layers

    @property
    def prefix(self):
        return 0

    @property
    def width(self):
        return self.model.norm.normalized_shape[0]

    @property
    def num_classes(self):
        return self.model.num_classes

    @property
    def image_size(self):
        return self.model.side, self.model.side

    @property
    def native_grid(self):
        return self.model.side // self.model.patch, self.model.side // self.model.patch

    def heads_of(self, attention):
        heads = getattr(attention, "num_heads", None) or attention.heads
        return heads, self.width // heads

    def embed(self, images):
        return self.model.stem(images)

    def features(self, images):
        return self.model.tokens(images)

    def features_from(self, block, x):
        for layer in self.model.layers[block:]:
            x = layer(x)
        return self.model.norm(x)

    @property
    def last_module(self):
        return self.model.norm

    def logits(self, features):
        return self.model.classifier(features.mean(1))

    def watch_projections(self, attention, tell):
        def hook(module, args):
            with torch.no_grad():
                heads = self.heads_of(attention)[0]
                q, k = (
                    each(args[0]).unflatten(-1, (heads, -1)).transpose(1, 2)
                    for each in (attention.to_q, attention.to_k)
                )
            tell(q, k)

        return attention.register_forward_pre_hook(hook)


@pytest.fixture(autouse=True)
def registered():
    HOSTS.append(PlainHost)
    yield
    HOSTS.remove(PlainHost)


def make_model():
    torch.manual_seed(0)
    return PlainModel().eval()


def make_images(batch=2):
    return torch.randn(batch, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_key_is_the_dense_model_and_dense_again_is_the_same_to_the_bit():
    model, images = make_model(), make_images()
    expected = model(images)
    sparsifiner.sparsify(model, keep=1.0)
    torch.testing.assert_close(model(images), expected)
    assert sparsifiner.why_not(model) == []
    sparsifiner.desparsify(model)
    assert not sparse_layers(model, required=False)
    assert torch.equal(model(images), expected)


@torch.no_grad()
def test_backends_agree_and_layers_are_traced():
    images, logits = make_images(), []
    for backend in ("reference", "torch"):
        model = sparsifiner.sparsify(make_model(), keep=0.2, tile=4, summary=3, backend=backend)
        with sparsifiner.trace(model) as traces:
            logits.append(model(images))
    torch.testing.assert_close(*logits)
    assert sorted(traces) == [0, 1, 2]
    assert traces[0].connectivity.grid == (12, 12)
    assert traces[2].connectivity.indices.shape[:3] == (2, 4, 9)


def test_macs_are_counted():
    model = sparsifiner.sparsify(make_model(), keep=0.2, tile=4, summary=4, profile="even")
    counted = sparsifiner.count_macs(model, (3, 96, 96)).to_dict()
    N, width, depth = 144, 32, 3
    others = N * 3 * 8 * 8 * width + depth * N * (4 * width**2 + 4 * width**2) + width * 5
    assert counted["dense"] == {
        "attention": depth * 2 * width * N * N,
        "total": others + depth * 2 * width * N * N,
    }
    assert counted["sparse"]["attention"] == depth * 2 * width * N * (29 + 9)


def test_calibration_lets_scorers_learn_and_spreads_keys(tmp_path):
    dense, batches = make_model(), [make_images(4), make_images(4)]
    with pytest.warns(UserWarning, match="untrained"):
        model = sparsifiner.sparsify(make_model(), preset="paper", keep=0.2)
    with torch.no_grad():  # attention to few keys, which is worth learning
        for each in (dense, model):
            for layer in each.layers:
                layer.mixer["attention"].to_q.weight.mul_(8)
    before = model.layers[0].mixer["attention"].scorer.up.clone()
    report = sparsifiner.calibrate(model, batches, match="tokens", fit_steps=40, progress=False)
    assert report.error <= report.error_before
    assert sum(report.budgets) <= sum(report.budgets_before)
    assert not torch.equal(model.layers[0].mixer["attention"].scorer.up, before)
    sparsifiner.save_adapter(model, tmp_path / "adapter.safetensors")
    loaded = sparsifiner.load_adapter(dense, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), model(batches[0]))
    assert mask_recall(model, [(batches[0], torch.zeros(4))])[0] > 0.2


def test_commands_know_it(tmp_path, capsys):
    assert main(["macs", "--model", "plain_toy_model", "--keep", "0.2", "--tile", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 144
    save_file(timm.create_model("plain_toy_model", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    weights = ["--model", "plain_toy_model", "--weights", str(tmp_path / "w.safetensors")]
    few = ["--limit", "8", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--json"]
    output = tmp_path / "a.safetensors"
    sparse = ["--keep", "0.2", "--tile", "4", "--output", str(output)]
    assert main(["calibrate", *weights, *sparse, *few]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 8
    assert main(["eval", *weights, "--adapter", str(output), "--against-dense", "--mask-recall", *few]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["against_dense"]["token_error"] > 0
    assert len(report["mask_recall"]) == 3


def test_what_it_cannot_is_said():
    with pytest.raises(ValueError, match="tokens: blocks of a plain toy model cannot pass on which tokens"):
        sparsifiner.sparsify(make_model(), keep=0.2, tokens=sparsifiner.ToMe(4))
    with pytest.raises(ValueError, match="images of 64x64 px do not fit"):
        sparsifiner.count_macs(make_model(), (3, 64, 64))
    model = make_model()
    model.layers[1].mixer["attention"] = nn.Identity()
    assert sparsifiner.why_not(model) == ["block 1 has a Identity where a PlainAttention is needed"]
    HOSTS.remove(PlainHost)
    try:
        assert find_host(make_model()) is None
        with pytest.raises(ValueError, match="PlainModel is not a timm VisionTransformer"):
            host_of(make_model())
    finally:
        HOSTS.append(PlainHost)
