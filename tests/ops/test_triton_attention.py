"""The Triton backend against the reference: on a GPU at real sizes, else small ones, interpreted."""

import pytest
import torch

from sparsifiner import tuned
from sparsifiner.geometry.connectivity import Connectivity, ScoredLists
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import sparse_attention
from sparsifiner.ops.backends import HAS_TRITON
from sparsifiner.ops.sparse_attention.api import attend_scored
from tests.ops.cases import (
    assert_within_budget,
    largest_terms,
    layout_of,
    make_connectivity,
    make_qkv,
)

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from sparsifiner.ops.sparse_attention.triton_forward import summary_counts

pytestmark = pytest.mark.usefixtures("poisoned")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# the interpreter takes bf16 for integers in products
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
PATCHES = [4, 62, 196, 256, 576, 1024, 4096] if GPU else [4, 62]


@triton.jit
def first_summary_counts_kernel(missing, counts, patches, windows, size: tl.constexpr):
    pair = tl.program_id(1).to(tl.int64)
    if pair == 0:
        window = tl.arange(0, size)
        token = tl.zeros([1], tl.int64)
        count = summary_counts(missing, pair, token, 0, patches, pair, window, windows, False)
        tl.store(counts + window[None, :], count)


def forward_and_gradients(backend, inputs, connectivity, summary, upstream):
    inputs = [x.detach().requires_grad_() for x in inputs]
    attend = attend_scored if isinstance(connectivity, ScoredLists) else sparse_attention
    out = attend(*inputs, connectivity, summary=summary, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def check_against_reference(layout, keep, tile, summary, dtype=torch.float32, head_dim=16, heads=2, batch=1):
    size = {"heads": heads, "batch": batch}
    connectivity = make_connectivity(layout, keep, tile, summary, **size, device=DEVICE)
    inputs = make_qkv(layout, **size, head_dim=head_dim, dtype=dtype, device=DEVICE)
    upstream = torch.randn(inputs[0].shape, dtype=torch.float64, device=DEVICE).to(dtype)
    actual = forward_and_gradients("triton", inputs, connectivity, summary, upstream)
    single = forward_and_gradients("reference", inputs, connectivity, summary, upstream)
    double = forward_and_gradients(
        "reference", [x.double() for x in inputs], connectivity, summary, upstream.double()
    )
    terms = largest_terms(inputs, upstream, head_dim**-0.5)
    for quantities in zip(actual, single, double, terms, strict=True):
        assert_within_budget(*quantities)


@pytest.mark.matrix(sample=lambda prefix, dtype: prefix == (5 if dtype == torch.float32 else 0))
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize(("tile", "summary"), [(8, 8), (8, 2), (4, None), (2, 4), (1, None), (1, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_within_fp64_budget(prefix, patches, tile, summary, dtype):
    check_against_reference(layout_of(patches, prefix), 0.1, tile, summary, dtype)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("tile", "summary"), [(4, 2), (1, 2)])
def test_batches_of_heads(tile, summary, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        check_against_reference(TokenLayout((5, 7), 1), 0.3, tile, summary, heads=3, batch=2)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tile", [1, 4])
def test_upstream_gradients_of_any_strides(tile):
    layout = TokenLayout((5, 7), 1)
    size = {"heads": 2, "batch": 2, "device": DEVICE}
    connectivity = make_connectivity(layout, 0.3, tile, 2, **size)
    inputs = make_qkv(layout, **size)
    weight = torch.randn(2, 2, 16, layout.tokens, device=DEVICE).mT
    one = torch.ones((), device=DEVICE)
    for upstream in (one.expand(weight.shape), weight, weight[:1].expand(weight.shape)):
        actual = forward_and_gradients("triton", inputs, connectivity, 2, upstream)
        expected = forward_and_gradients("reference", inputs, connectivity, 2, upstream)
        for a, e in zip(actual, expected, strict=True):
            assert (a - e).abs().max() < 1e-5


def test_many_summaries_of_many_heads_do_not_overflow():
    # heads x patches x windows exceed 2 ** 31; one program reads the counts of the first list
    missing = torch.full((16,), 4, dtype=torch.uint8, device=DEVICE)
    counts = torch.full((16,), torch.nan, device=DEVICE)
    first_summary_counts_kernel[(1, 768)](missing, counts, 4096, 1024, size=16)
    assert (counts == 4).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_inputs_on_another_than_the_current_gpu():
    layout = TokenLayout((6, 6), 1)
    connectivity = make_connectivity(layout, 0.3, 4, 2, device="cuda:1")
    inputs = make_qkv(layout, device="cuda:1")
    upstream = torch.randn(inputs[0].shape, device="cuda:1")
    actual = forward_and_gradients("triton", inputs, connectivity, 2, upstream)
    expected = forward_and_gradients("reference", inputs, connectivity, 2, upstream)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() < 1e-5


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128])
def test_head_dims(head_dim):
    check_against_reference(TokenLayout((5, 7), 1), 0.3, 4, 3, torch.float32, head_dim)


@pytest.mark.parametrize("keep", [1e-6, 1.0])
def test_one_key_and_all_keys(keep):
    for prefix, tile in ((0, 4), (1, 4), (1, 1)):
        check_against_reference(TokenLayout((6, 5), prefix), keep, tile, 2)


@pytest.mark.parametrize("side", [3, 14, 16, 40])
def test_tiles_and_windows_of_odd_and_large_sides(side):
    check_against_reference(TokenLayout((14, 18), 1), 0.2, side, side)


def test_more_prefix_tokens_than_queries_in_a_program():
    for tile in (1, 2):
        check_against_reference(TokenLayout((4, 4), 70), 0.7, tile, 2)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tile", [1, 4])
def test_prefix_in_several_splits(tile, deterministic, monkeypatch):
    monkeypatch.setattr(tuned, "PREFIX_KEYS", 16)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for prefix in (1, 20):
            check_against_reference(TokenLayout((5, 7), prefix), 0.3, tile, 2)
    finally:
        torch.use_deterministic_algorithms(False)


def test_scales_of_both_signs_and_zero():
    layout = TokenLayout((5, 7), 1)
    q, k, v = make_qkv(layout, device=DEVICE)
    connectivity = make_connectivity(layout, 0.3, 4, 2, device=DEVICE)
    for scale in (-0.7, 0.0, 1.3):
        actual = sparse_attention(q, k, v, connectivity, 2, scale, backend="triton")
        expected = sparse_attention(q, k, v, connectivity, 2, scale, backend="reference")
        assert (actual - expected).abs().max() < 1e-5


@pytest.mark.matrix(sample=lambda tile: tile in {1, 14})  # others are in several splits above
@pytest.mark.parametrize(("prefix", "tile"), [(1, 4), (20, 2), (0, 14), (1, 1)])
def test_deterministic_gradients_within_fp64_budget(prefix, tile):
    torch.use_deterministic_algorithms(True)
    try:
        check_against_reference(TokenLayout((9, 15), prefix), 0.4, tile, 2)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not GPU, reason="needs a GPU: interpreted programs run one by one")
def test_deterministic_gradients_are_the_same_twice():
    layout = layout_of(4096, 1)
    connectivity = make_connectivity(layout, 0.1, 8, 8, device=DEVICE)
    inputs = make_qkv(layout, head_dim=64, dtype=torch.bfloat16, device=DEVICE)
    upstream = torch.randn_like(inputs[0])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (forward_and_gradients("triton", inputs, connectivity, 8, upstream) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_lists_and_slots_equal_the_reference():
    q, k, v = make_qkv(TokenLayout((4, 4), 1), device=DEVICE)
    indices = torch.tensor([[2, -1], [-1, -1], [0, 3], [1, 4]], dtype=torch.int32, device=DEVICE)
    upstream = torch.randn(q.shape, device=DEVICE)
    for tile, summary in ((2, None), (2, 2), (1, None), (1, 2)):
        lists = indices.repeat(4 // tile**2, 1)
        connectivity = Connectivity(lists.expand(1, 2, -1, 2), (4, 4), tile=tile, prefix=1)
        actual = forward_and_gradients("triton", (q, k, v), connectivity, summary, upstream)
        expected = forward_and_gradients("reference", (q, k, v), connectivity, summary, upstream)
        for a, e in zip(actual, expected, strict=True):
            assert (a - e).abs().max() < 1e-6


@pytest.mark.parametrize("deterministic", [False, True])
def test_empty_batch(deterministic):
    layout = TokenLayout((4, 4), 1)
    connectivity = make_connectivity(layout, 0.3, 2, 2, device=DEVICE)
    connectivity = Connectivity(connectivity.indices[:0], (4, 4), tile=2, prefix=1)
    inputs = [x[:0] for x in make_qkv(layout, device=DEVICE)]
    torch.use_deterministic_algorithms(deterministic)
    try:
        results = forward_and_gradients(
            "triton", inputs, connectivity, 2, torch.empty(0, 2, 17, 16).to(DEVICE)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.shape == (0, 2, 17, 16) for result in results)


def test_huge_logits_equal_the_reference():
    layout = TokenLayout((9, 7), 1)
    q, k, v = (x * 100 for x in make_qkv(layout, device=DEVICE))
    connectivity = make_connectivity(layout, 0.1, 4, 4, device=DEVICE)
    actual = sparse_attention(q, k, v, connectivity, 4, backend="triton")
    expected = sparse_attention(q.double(), k.double(), v.double(), connectivity, 4, backend="reference")
    assert torch.isfinite(actual).all()
    assert ((actual - expected).norm() / expected.norm()) < 1e-3


def test_unlisted_keys_are_never_read():
    layout = TokenLayout((4, 4), 0)
    q, k, v = make_qkv(layout, device=DEVICE)
    connectivity = make_connectivity(layout, 0.2, 2, None, device=DEVICE)
    unlisted = ~connectivity.to_mask().any(2)
    assert unlisted.any()
    k[unlisted], v[unlisted] = torch.nan, torch.nan
    assert torch.isfinite(sparse_attention(q, k, v, connectivity, backend="triton")).all()


@pytest.mark.parametrize(
    ("tile", "head_dim", "dtype", "message"),
    [
        (2, 12, torch.float32, "multiples of 8 up to 128, got 12"),
        (2, 16, torch.float64, "got fp64"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(tile, head_dim, dtype, message):
    layout = TokenLayout((4, 4), 0)
    inputs = make_qkv(layout, head_dim=head_dim, dtype=dtype, device=DEVICE)
    connectivity = make_connectivity(layout, 0.5, tile, None, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        sparse_attention(*inputs, connectivity, backend="triton")


def test_second_derivatives_are_refused():
    layout = TokenLayout((4, 4), 1)
    inputs = [x.requires_grad_() for x in make_qkv(layout, device=DEVICE)]
    connectivity = make_connectivity(layout, 0.3, 2, 2, device=DEVICE)
    out = sparse_attention(*inputs, connectivity, 2, backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attend_backward has no gradient; take backend='torch'"):
        torch.autograd.grad(first.sum(), inputs[1])


def test_operator():
    layout = TokenLayout((4, 6), 1)
    inputs = [x.detach().requires_grad_() for x in make_qkv(layout, heads=1, device=DEVICE)]
    indices = make_connectivity(layout, 0.3, 2, 2, heads=1, device=DEVICE).indices
    means = torch.randn(2, 1, 1, 6, inputs[0].shape[-1], device=DEVICE)
    for given in (None, means):
        torch.library.opcheck(
            torch.ops.sparsifiner.attend.default,
            (*inputs, indices, True, given, (4, 6, 1, 2, 2), 0.25, True, "triton"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_means_are_those_that_would_be_computed(dtype):
    layout = TokenLayout((5, 6), 2)
    inputs = make_qkv(layout, dtype=dtype, device=DEVICE)
    connectivity = make_connectivity(layout, 0.3, 4, 2, device=DEVICE)
    upstream = torch.randn_like(inputs[0])
    means = torch.stack([layout.square_means(x[:, :, 2:].float(), 2) for x in inputs[1:]]).to(dtype)
    computed = forward_and_gradients("triton", inputs, connectivity, 2, upstream)
    fields = (connectivity.indices, connectivity.grid, connectivity.tile, connectivity.prefix)
    given = forward_and_gradients(
        "triton", inputs, ScoredLists(*fields, window_means=means, selected=True), 2, upstream
    )
    for one, other in zip(computed, given, strict=True):
        torch.testing.assert_close(one, other)
    others = ScoredLists(*fields, window_means=means + 1, selected=True)
    other = forward_and_gradients("triton", inputs, others, 2, upstream)
    assert not torch.allclose(computed[0], other[0], atol=1e-2)  # they are what is attended to
    without = forward_and_gradients("triton", inputs, others, None, upstream)
    assert torch.equal(without[0], forward_and_gradients("triton", inputs, connectivity, None, upstream)[0])
    # whoever gives keys of their own gets what belongs to these
    public = sparse_attention(*inputs, others, 2, backend="triton")
    torch.testing.assert_close(public, computed[0])
