"""The torch backend on a GPU against the reference in fp64."""

import itertools

import pytest
import torch

import sparsifiner
from sparsifiner.config import make_config
from sparsifiner.measure.bench_model import ModelBenchmark, benchmark_model
from sparsifiner.measure.bench_ops import EVERYTHING, FORWARD, OpsBenchmark, benchmark_operations
from sparsifiner.ops import select_topk, sparse_attention
from tests.models import make_images, make_model
from tests.ops.cases import assert_within_budget, largest_terms, layout_of, make_connectivity, make_qkv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patches", [4, 62, 196, 576])
@pytest.mark.parametrize(("tile", "summary"), [(1, None), (8, 4), (4, 2)])
def test_forward_and_gradients_within_fp64_budget(dtype, patches, tile, summary):
    layout = layout_of(patches, 1)
    connectivity = make_connectivity(layout, 0.25, tile, summary, device="cuda")
    inputs = make_qkv(layout, dtype=dtype, device="cuda")
    upstream = torch.randn(inputs[0].shape, dtype=torch.float64, device="cuda").to(dtype)

    def run(backend, inputs, upstream):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        out = sparse_attention(*inputs, connectivity, summary, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]

    actual = run("torch", inputs, upstream)
    single = run("reference", inputs, upstream)
    double = run("reference", [x.double() for x in inputs], upstream.double())
    terms = largest_terms(inputs, upstream, inputs[0].shape[-1] ** -0.5)
    for quantities in zip(actual, single, double, terms, strict=True):
        assert_within_budget(*quantities)


def test_selection_equals_the_reference_on_the_cpu():
    scores = torch.randint(-20, 20, (2, 3, 50, 1025)) / 4
    scores[:, :, ::7, ::3] = torch.nan
    expected = select_topk(scores, 103, backend="reference")
    assert torch.equal(select_topk(scores.cuda(), 103, backend="torch").cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_a_kernel_launches(dtype):
    layout = layout_of(196, 1)
    connectivity = make_connectivity(layout, 0.04, 1, None, heads=6, batch=64, device="cuda")
    q, k, v = make_qkv(layout, heads=6, batch=64, dtype=dtype, device="cuda")
    out = sparse_attention(q, k, v, connectivity, backend="torch")
    expected = sparse_attention(q.double(), k.double(), v.double(), connectivity, backend="reference")
    assert (out - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("name", ["deit", "qk norm"])
def test_autocast(name):
    model = sparsifiner.sparsify(make_model(name), keep=0.2, tile=4).cuda()
    images = make_images(model.patch_embed.img_size[0]).cuda()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert torch.isfinite(model(images)).all()


@pytest.mark.parametrize(
    "scorer", ["lowrank", "impact", "pooled", "oracle", "random", "bigbird", "window", "strided"]
)
@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_model_on_the_gpu_equals_the_cpu(scorer):
    model = sparsifiner.sparsify(make_model("deit"), keep=0.2, tile=4, scorer=scorer)
    images = make_images(224)
    with torch.no_grad():
        expected = model(images)
        assert (model.cuda()(images.cuda()).cpu() - expected).abs().max() < 1e-3


@pytest.mark.parametrize("scorer", ["impact", "pooled", "lowrank"])
def test_operations_are_timed_as_graphs(scorer):
    settings = OpsBenchmark(grid=16, batch_size=2, scorer=scorer, backward=True, runs=3, device="cuda")
    (rows,) = benchmark_operations(settings)
    named = {(row["part"], row["measure"]): row for row in rows}
    assert all(row["graph"] for row in rows if row["left_out"] is None)
    assert named["dense: flash", FORWARD]["left_out"] is None
    assert named["flex attention", FORWARD]["left_out"] is None
    everything = named[EVERYTHING, FORWARD]
    assert everything["ratio"] > 0
    assert everything["memory_bytes"] > 0


@pytest.mark.parametrize("train", [False, True])
def test_models_and_training_steps_are_called_in_every_way(train):
    settings = ModelBenchmark(
        model="deit_tiny_patch16_224",
        model_args={"depth": 2},
        img_size=256,
        batch_size=2,
        train=train,
        runs=3,
        device="cuda",
    )
    every = [row for rows in benchmark_model(settings, make_config("fast", keep=0.2)) for row in rows]
    ways = ["eager", "compiled"] if train else ["eager", "compiled", "reduce-overhead"]
    batches = [2] if train else [2, 1]
    seen = [(row["batch"], row["way"], row["part"]) for row in every]
    assert seen == list(itertools.product(batches, ways, ["dense", "sparse"]))
    for row in every:
        assert row["left_out"] is None
        assert 0 < row["host_ms"] <= row["high_ms"]
        assert row["kernel_ms"] > 0
        assert (row["memory_bytes"] is None) == (row["way"] == "reduce-overhead")
        assert row["sparse_layers"] == row["layers"] == 2
