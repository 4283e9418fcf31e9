"""The torch backend against the reference: forward and every gradient, odd sizes and edges."""

import pytest
import torch

from sparsifiner import tuned
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import sparse_attention
from sparsifiner.ops.sparse_attention import masked, reference, torch_backend
from tests.ops.cases import (
    GRIDS,
    assert_within_budget,
    largest_terms,
    layout_of,
    make_connectivity,
    make_qkv,
)

KEEPS = ["one key", 0.05, 0.25, 1.0]


def forward_and_gradients(backend, inputs, connectivity, summary, upstream):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = sparse_attention(*inputs, connectivity, summary, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def check_against_reference(layout, keep, tile, summary, dtype=torch.float32):
    keep = 1 / layout.tokens if keep == "one key" else keep
    connectivity = make_connectivity(layout, keep, tile, summary)
    inputs = make_qkv(layout, dtype=dtype)
    upstream = torch.randn(inputs[0].shape, dtype=torch.float64)
    actual = forward_and_gradients("torch", inputs, connectivity, summary, upstream)
    single = forward_and_gradients("reference", inputs, connectivity, summary, upstream)
    double = forward_and_gradients(
        "reference", [x.double() for x in inputs], connectivity, summary, upstream.to(dtype)
    )
    terms = largest_terms(inputs, upstream, inputs[0].shape[-1] ** -0.5)
    for quantities in zip(actual, single, double, terms, strict=True):
        assert_within_budget(*quantities)


@pytest.mark.parametrize("patches", GRIDS)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("tile", [1, 4, 8])
@pytest.mark.parametrize("summary", [None, 2, 4])
def test_forward_and_gradients_within_fp64_budget(patches, keep, tile, summary):
    for prefix in (0, 1, 2, 5):
        check_against_reference(layout_of(patches, prefix), keep, tile, summary)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("tile", "summary"), [(1, None), (8, 4)])
def test_other_dtypes_within_budget(dtype, tile, summary):
    check_against_reference(TokenLayout((14, 14), 1), 0.25, tile, summary, dtype)


def test_many_chunks_equal_one(monkeypatch):
    layout = TokenLayout((14, 14), 1)
    q, k, v = make_qkv(layout)
    connectivity = make_connectivity(layout, 0.1, 4, 2)
    whole = sparse_attention(q, k, v, connectivity, 2, backend="torch")
    monkeypatch.setitem(tuned.GATHERED_BYTES, "cpu", 1)
    assert (sparse_attention(q, k, v, connectivity, 2, backend="torch") - whole).abs().max() < 1e-6


def test_empty_lists_and_slots_equal_the_reference():
    q, k, v = make_qkv(TokenLayout((2, 2), 1))
    indices = torch.tensor([[2, -1], [-1, -1], [0, 3], [1, 4]], dtype=torch.int32)
    connectivity = Connectivity(indices.expand(1, 2, 4, 2), (2, 2), prefix=1)
    upstream = torch.randn(q.shape)
    actual = forward_and_gradients("torch", (q, k, v), connectivity, None, upstream)
    expected = forward_and_gradients("reference", (q, k, v), connectivity, None, upstream)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() < 1e-6


@pytest.mark.parametrize("summary", [None, 2])
def test_lists_without_a_slot_equal_the_reference(summary):
    layout = TokenLayout((4, 4), 1)
    q, k, v = make_qkv(layout)
    for tile, rows in ((1, 16), (2, 4)):
        indices = torch.zeros(*q.shape[:2], rows, 0, dtype=torch.int32)
        connectivity = Connectivity(indices, layout.grid, tile, layout.prefix)
        expected = sparse_attention(q, k, v, connectivity, summary, backend="reference")
        assert (expected[:, :, 1:] == 0).all() == (summary is None)
        actual = sparse_attention(q, k, v, connectivity, summary, backend="torch")
        assert (actual - expected).abs().max() < 1e-6


def test_huge_logits_equal_the_reference():
    layout = TokenLayout((14, 14), 1)
    q, k, v = (x * 100 for x in make_qkv(layout))
    connectivity = make_connectivity(layout, 0.1, 8, 4)
    actual = sparse_attention(q, k, v, connectivity, 4, backend="torch")
    expected = sparse_attention(q.double(), k.double(), v.double(), connectivity, 4, backend="reference")
    assert torch.isfinite(actual).all()
    assert ((actual - expected).norm() / expected.norm()) < 1e-3


def test_unlisted_keys_are_never_read():
    layout = TokenLayout((4, 4), 0)
    q, k, v = make_qkv(layout)
    connectivity = make_connectivity(layout, 0.2, 2, None)
    unlisted = ~connectivity.to_mask().any(2)
    assert unlisted.any()
    k[unlisted], v[unlisted] = torch.nan, torch.nan
    assert torch.isfinite(sparse_attention(q, k, v, connectivity, backend="torch")).all()


def masked_attention(*inputs):
    *inputs, fused = inputs
    assert fused  # the mask is for fused kernels
    return masked.sparse_attention(*inputs)


@pytest.mark.parametrize("patches", [4, 62, 196])
@pytest.mark.parametrize("summary", [None, 2])
def test_mask_for_short_inputs_within_fp64_budget(patches, summary, monkeypatch):
    for prefix in (0, 1, 5):
        layout = layout_of(patches, prefix)
        connectivity = make_connectivity(layout, 0.1, 1, summary)
        inputs = make_qkv(layout)
        upstream = torch.randn(inputs[0].shape, dtype=torch.float64)
        expected = [
            forward_and_gradients("reference", [x.to(dtype) for x in inputs], connectivity, summary, upstream)
            for dtype in (torch.float32, torch.float64)
        ]
        with monkeypatch.context() as patch:
            patch.setattr(torch_backend, "sparse_attention", masked_attention)
            actual = forward_and_gradients("torch", inputs, connectivity, summary, upstream)
        terms = largest_terms(inputs, upstream, inputs[0].shape[-1] ** -0.5)
        for quantities in zip(actual, *expected, terms, strict=True):
            assert_within_budget(*quantities)


def test_mask_of_empty_lists_and_slots_equals_the_reference():
    q, k, v = make_qkv(TokenLayout((2, 2), 1))
    indices = torch.tensor([[2, -1], [-1, -1], [0, 3], [1, 4]], dtype=torch.int32)
    connectivity = Connectivity(indices.expand(1, 2, 4, 2), (2, 2), prefix=1)
    for summary in (None, 1):
        actual = masked.sparse_attention(q, k, v, connectivity, summary, 0.25)
        expected = reference.sparse_attention(q, k, v, connectivity, summary, 0.25)
        assert (actual - expected).abs().max() < 1e-6
