"""Whole models on the Triton backend: interpreted at small sizes without a GPU, compiled with one."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsifiner
from sparsifiner.ops.backends import HAS_TRITON
from tests.models import make_images, make_model

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained"),
]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CONFIGS = {
    "impact": {"tile": 4, "summary": 2},
    "impact, lists for two layers": {"tile": 4, "summary": 2, "share": 2},
    "impact, no summaries": {"tile": 4, "summary": None},
    "pooled": {"tile": 4, "summary": 2, "scorer": "pooled"},
    "pooled, no summaries": {"tile": 2, "summary": None, "scorer": "pooled"},
    "low-rank by tile": {"tile": 4, "summary": 2, "scorer": "lowrank"},
    "per query": {"preset": "paper", "keep": 0.2},
}


def sparse_model(config, backend, **options):
    torch.manual_seed(0)
    depth = CONFIGS[config].get("share", 1)
    model = make_model("deit distilled", img_size=96, depth=depth, **options)
    model = sparsifiner.sparsify(model, **{"keep": 0.2, **CONFIGS[config]}, backend=backend).to(DEVICE)
    for name, parameter in model.named_parameters():
        if name.endswith("scorer.up"):  # what training leaves is above the threshold
            torch.nn.init.uniform_(parameter, 0.03, 0.2)
    return model


def logits_and_gradients(model, images):
    logits = model(images)
    logits.square().sum().backward()
    return logits, model.blocks[0].attn.qkv.weight.grad


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_and_gradients_equal_the_reference(config):
    images = make_images(96, batch=1).to(DEVICE)
    actual = logits_and_gradients(sparse_model(config, "triton"), images)
    expected = logits_and_gradients(sparse_model(config, "reference"), images)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() < 2e-5 * e.abs().max()


@pytest.mark.matrix(sample=lambda config: config in {"impact, lists for two layers", "per query"})
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not GPU, reason="needs a GPU"))]
)
def test_compiles_in_one_graph(config, mode):
    model, images = sparse_model(config, "triton"), make_images(96, batch=1).to(DEVICE)
    expected = logits_and_gradients(model, images)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=mode, fullgraph=True)
    logits = compiled(images)
    logits.square().sum().backward()
    assert (logits - expected[0]).abs().max() < 1e-4 * expected[0].abs().max()
    gradient = model.blocks[0].attn.qkv.weight.grad
    assert (gradient - expected[1]).abs().max() < 1e-4 * expected[1].abs().max()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("config", CONFIGS)
def test_runs_in_a_cuda_graph(config):
    model, images = sparse_model(config, "triton"), make_images(96, batch=1).to(DEVICE)
    with torch.no_grad():
        for _ in range(2):
            expected = model(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(images)
        logits.zero_()
        graph.replay()
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("config", ["impact", "pooled"])
def test_flop_counter_sees_what_the_macs_say(config):
    model, images = sparse_model(config, "triton"), make_images(96, batch=1).to(DEVICE)
    model.requires_grad_(False)
    report = sparsifiner.count_macs(model, (3, 96, 96)).to_dict()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() == 2 * report["sparse"]["total"]
