"""The low-rank scorer where its weights are offloaded, quantised, adapted or on another device."""

import copy
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import sparsifiner
from sparsifiner.ops import native
from sparsifiner.ops.select import cpu_backend

pytestmark = pytest.mark.filterwarnings(
    "ignore:the low-rank scorer is untrained", "ignore:torch.ao.quantization", "ignore:.*quantize"
)


def make_sparse(**options):
    model = VisionTransformer(
        img_size=128, patch_size=8, depth=4, embed_dim=96, num_heads=3, num_classes=10
    ).eval()
    sparsifiner.sparsify(model, preset="paper", keep=0.2, **options)
    for block in model.blocks:
        for projection in (block.attn.scorer.query, block.attn.scorer.key):
            nn.init.normal_(projection.bias, std=0.1)
    return model


def check_offloaded():
    for options in ({}, {"tile": 4, "summary": 2}, {"backend": "torch"}):
        model, images = make_sparse(**options), torch.randn(2, 3, 128, 128)
        with torch.no_grad():
            expected = model(images)
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert model.blocks[0].attn.scorer.query.weight.is_meta
            assert torch.equal(model(images), expected)


def check_nowhere():
    for part in ("query", "key", ""):
        model = make_sparse()
        model.blocks[0].attn.scorer.get_submodule(part).to("meta")
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="meta"):
            model(torch.randn(1, 3, 128, 128))


def test_weights_elsewhere_are_fetched_or_an_error_and_never_end_the_process():
    checks = "from tests.test_lowrank_weights import check_nowhere, check_offloaded\n"
    program = f"{checks}check_offloaded(); print('offloaded'); check_nowhere(); print('nowhere')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["offloaded", "nowhere"], done.stderr
    assert done.returncode == 0


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def check_quantised(quantise):
    """Quantised likewise, the sparse model loses at most 1.25 times as much as the dense one."""
    dense_errors, sparse_errors = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        sparse, images = make_sparse(), torch.randn(4, 3, 128, 128)
        dense = sparsifiner.desparsify(copy.deepcopy(sparse))
        with torch.no_grad():
            dense_errors.append(relative_error(quantise(dense)(images), dense(images)))
            sparse_errors.append(relative_error(quantise(sparse)(images), sparse(images)))
    assert 0 < sum(sparse_errors) <= 1.25 * sum(dense_errors)


def test_dynamic_quantisation():
    def quantise(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    check_quantised(quantise)


def test_weight_only_quantisation():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def quantise(model):
        model = copy.deepcopy(model)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    check_quantised(quantise)


class Adapted(nn.Module):
    """A projection with something added, as low-rank adapters do; `weight` tells half of it."""

    def __init__(self, base, added):
        super().__init__()
        self.base = base
        self.register_buffer("added", added)

    @property
    def weight(self):
        return self.base.weight

    @property
    def out_features(self):
        return self.base.out_features

    def forward(self, x):
        return self.base(x) + x @ self.added.mT


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_projections_apply_counts_not_what_they_hold(backend):
    images = torch.randn(1, 3, 128, 128)
    adapted, merged = make_sparse(backend=backend), None
    merged = copy.deepcopy(adapted)
    for one, other in zip(adapted.blocks, merged.blocks, strict=True):
        added = torch.randn_like(one.attn.scorer.query.weight)
        one.attn.scorer.query = Adapted(one.attn.scorer.query, added)
        other.attn.scorer.query.weight.data += added
    with torch.no_grad(), sparsifiner.trace(adapted) as actual, sparsifiner.trace(merged) as expected:
        adapted(images)
        merged(images)
    lists = [(actual[layer].connectivity.indices, expected[layer].connectivity.indices) for layer in range(4)]
    # sums in another order may swap keys of all but equal scores
    assert sum(float((a == b).double().mean()) for a, b in lists) / 4 > 0.99


@pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "runs")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"down": torch.zeros(9, 8)}, r"k must be torch.float32 \[1, 2, 9, 16\] on the CPU, got .*17, 16\]"),
        ({"down": torch.zeros(17, 8, device="meta")}, r"down must be .* on the CPU, got .* on meta"),
        ({"query_weight": torch.zeros(4, 8)}, r"query_weight must be torch.float32 \[4, 16\]"),
        ({"query_bias": torch.zeros(3)}, r"query_bias must be torch.float32 \[4\] on the CPU, got .*\[3\]"),
        ({"key_weight": torch.zeros(3, 16)}, r"key_weight must be torch.float32 \[4, 16\]"),
        ({"key_bias": torch.zeros(4, device="meta")}, r"key_bias must be .* got .* on meta"),
        ({"k": torch.zeros(1, 2, 17, 32)}, r"k must be torch.float32 \[1, 2, 17, 16\]"),
        ({"q": torch.zeros(1, 2, 16, 16, device="meta")}, r"q must be .* on the CPU, got .* on meta"),
        ({"q": torch.zeros(1, 2, 16, 16).double()}, r"q must be fp32 or bf16"),
    ],
)
def test_native_coefficients_refuse_what_they_would_read_beyond(changed, message):
    given = {
        "q": torch.zeros(1, 2, 16, 16),
        "k": torch.zeros(1, 2, 17, 16),
        "query_weight": torch.zeros(4, 16),
        "query_bias": torch.zeros(4),
        "key_weight": torch.zeros(4, 16),
        "key_bias": torch.zeros(4),
        "down": torch.zeros(17, 8),
    }
    with pytest.raises(ValueError, match=message):
        cpu_backend.lowrank_coefficients(**(given | changed), temperature=1.0)
