"""The torch backend on a GPU against the reference in fp64."""

import pytest
import torch

import sparsifiner
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


@pytest.mark.parametrize("scorer", ["pooled", "oracle", "random", "window", "strided"])
def test_model_on_the_gpu_equals_the_cpu(scorer):
    model = sparsifiner.sparsify(make_model("deit"), keep=0.2, tile=4, scorer=scorer)
    images = make_images(224)
    with torch.no_grad():
        expected = model(images)
        assert (model.cuda()(images.cuda()).cpu() - expected).abs().max() < 1e-3
