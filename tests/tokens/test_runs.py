"""Runs of tokens in the place of tiles and windows: every backend of attention takes a curve."""

import pytest
import torch

from sparsifiner.geometry.curve import CurveLayout
from sparsifiner.geometry.layout import Run
from sparsifiner.ops import native, sparse_attention
from sparsifiner.ops.backends import HAS_TRITON
from tests.ops.cases import assert_within_budget, largest_terms, make_connectivity, make_qkv

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# runs of 16 queries and of 4 keys, or 3; the last ones are shorter. Without a GPU kernels are interpreted.
TILE, SUMMARY = 4, 2
LAYOUTS = [CurveLayout(41, 2), CurveLayout(9, 1)]


def forward_and_gradients(backend, inputs, connectivity, summary, upstream):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = sparse_attention(*inputs, connectivity, summary, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("summary", [SUMMARY, Run(3), None])
@pytest.mark.parametrize(
    "backend",
    [
        "torch",
        pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")),
    ],
)
def test_forward_and_gradients_within_fp64_budget(backend, layout, summary):
    connectivity = make_connectivity(layout, 0.2, TILE, summary, device=DEVICE)
    inputs = make_qkv(layout, device=DEVICE)
    upstream = torch.randn(inputs[0].shape, dtype=torch.float64).to(DEVICE)
    actual = forward_and_gradients(backend, inputs, connectivity, summary, upstream)
    single = forward_and_gradients("reference", inputs, connectivity, summary, upstream)
    double = [x.double() for x in inputs]
    exact = forward_and_gradients("reference", double, connectivity, summary, upstream)
    terms = largest_terms(inputs, upstream, inputs[0].shape[-1] ** -0.5)
    for quantities in zip(actual, single, exact, terms, strict=True):
        assert_within_budget(*quantities)


@pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "runs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("summary", [SUMMARY, Run(3), None])
def test_native_forward_within_fp64_budget(layout, summary):
    connectivity, inputs = make_connectivity(layout, 0.2, TILE, summary), make_qkv(layout)
    actual = sparse_attention(*inputs, connectivity, summary, backend="cpu")
    single = sparse_attention(*inputs, connectivity, summary, backend="reference")
    exact = sparse_attention(*(x.double() for x in inputs), connectivity, summary, backend="reference")
    term = largest_terms(inputs, torch.zeros_like(actual), inputs[0].shape[-1] ** -0.5)[0]
    assert_within_budget(actual, single, exact, term)
