"""Every backend of the selection against the reference: the same sets, whatever the scores."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifiner.ops import select_topk
from sparsifiner.ops.backends import HAS_TRITON
from sparsifiner.scorers import Impact, ListSpec, LowRank, Pooled
from tests.ops.cases import build_scorer, layout_of, make_qkv

if HAS_TRITON:
    from sparsifiner.ops.select import triton_backend, triton_lowrank, triton_tiles

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# interpreted kernels take their time
KEYS = 70 if GPU else 40
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def special_scores(seed, rows, keys, levels):
    """Few levels, so many ties, with every special value among them and rows without any score."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (2, 1, rows, keys), generator=generator) / 3
    special = torch.rand(scores.shape, generator=generator)
    for value, share in ((torch.nan, 0.1), (torch.inf, 0.15), (-torch.inf, 0.3), (-0.0, 0.4), (3e38, 0.45)):
        scores = torch.where((special < share) & (special >= share - 0.05), value, scores)
    scores[:, :, ::3] = torch.nan
    return scores


def assert_equals_reference(scores, budget, backend, **options):
    expected = select_topk(scores, budget, backend="reference", **options)
    actual = select_topk(scores.to(DEVICE), budget, backend=backend, **options)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    keys=st.integers(1, KEYS),
    levels=st.sampled_from([1, 2, 5, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_any_scores(backend, seed, rows, keys, levels, dtype, data):
    budget = data.draw(st.integers(1, keys))
    forced = data.draw(st.integers(0, min(budget, 5)))
    scores = special_scores(seed, rows, keys, levels).to(dtype)
    assert_equals_reference(scores, budget, backend, forced=forced)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [1, 103, 1025])
def test_many_keys(backend, budget):
    rows = 50 if GPU or backend == "torch" else 2
    assert_equals_reference(torch.randn(2, 3, rows, 1025), budget, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [17, 64])  # 64 need no padding, which would copy them in order
@pytest.mark.parametrize("forced", [0, 1])
def test_scores_of_any_strides(backend, keys, forced):
    scores = torch.randn(1, 1, 5, keys)
    for strided in (scores.mT.contiguous().mT, scores[:, :, :1].expand(2, 3, 5, keys)):
        assert_equals_reference(strided, 7, backend, forced=forced)


@needs_triton
@pytest.mark.matrix(sample=lambda budget: budget in {1, 70})
@pytest.mark.parametrize("budget", [1, 3, 37, 70])
def test_rows_longer_than_a_block(budget, monkeypatch):
    monkeypatch.setattr(triton_backend, "LARGEST_BLOCK", 16)
    for seed in range(3):
        assert_equals_reference(special_scores(seed, 4, 70, 5), budget, "triton", forced=1)
    assert_equals_reference(torch.randn(1, 2, 3, 70), budget, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_score_take_their_own_tokens(backend):
    scores = torch.full((1, 1, 2, 6), float("-inf"))
    own = torch.tensor([[2, 3], [4, 5]])
    for budget in (1, 2, 4):
        expected = select_topk(scores, budget, forced=1, own=own, backend="reference")
        actual = select_topk(scores.to(DEVICE), budget, forced=1, own=own.to(DEVICE), backend=backend)
        assert torch.equal(actual.cpu(), expected)


def assert_forced_keys_are_listed_once(backend, device):
    """Rows without a score, of which the first two stand for the forced keys."""
    scores = torch.full((1, 1, 8, 8), torch.nan, device=device)
    lists = select_topk(scores, 4, forced=2, backend=backend)[0, 0]
    assert lists.tolist() == [[0, 1, -1, -1]] * 2 + [[0, 1, row, -1] for row in range(2, 8)]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_forced_keys_are_listed_once(backend):
    assert_forced_keys_are_listed_once(backend, DEVICE)


def lowrank_scorer(layout, head_dim, basis, kept):
    """A scorer with weights of the size that training leaves."""
    options = LowRank(basis=basis, coef_topk=kept)
    scorer = build_scorer(options, layout, head_dim=head_dim).to(DEVICE)
    with torch.no_grad():
        scorer.up.copy_(torch.rand_like(scorer.up) * (torch.rand_like(scorer.up) > 0.5))
        for weight in (
            scorer.query.weight,
            scorer.query.bias,
            scorer.key.weight,
            scorer.key.bias,
            scorer.down,
        ):
            weight.normal_(std=0.3)
    return scorer


@needs_triton
def test_empty_batches_have_empty_lists():
    layout = layout_of(16, 1)
    q, k, v = (x[:0] for x in make_qkv(layout, device=DEVICE))
    spec = ListSpec(layout, 2, 5, 1, 1.0, "triton")
    training_free = (build_scorer(options, layout) for options in (Pooled(), Impact()))
    for scorer in (*training_free, lowrank_scorer(layout, 16, 8, 3)):
        assert scorer(q, k, v, spec).indices.shape == (0, 2, 4, 5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])])
@pytest.mark.parametrize(
    ("patches", "prefix", "tile", "head_dim", "basis", "kept", "budget"),
    [(4, 1, 1, 8, 4, 2, 3), (62, 0, 1, 16, 32, 8, 7), (196, 5, 4, 64, 32, 8, 20), (62, 2, 8, 24, 6, 6, 64)],
)
def test_lowrank_scores_and_their_selection(patches, prefix, tile, head_dim, basis, kept, budget, dtype):
    layout = layout_of(patches, prefix)
    scorer = lowrank_scorer(layout, head_dim, basis, kept).to(dtype)
    q, k, v = make_qkv(layout, head_dim=head_dim, batch=2, dtype=dtype, device=DEVICE)
    q[0, 0, -1] = torch.nan
    spec = ListSpec(layout, tile, min(budget, layout.tokens), 0, 1.0)
    exact = copy.deepcopy(scorer).double().scores(q.double(), k.double(), v.double(), spec)
    with torch.no_grad():
        indices, scores = triton_lowrank.select_lowrank(
            *(q, k, scorer.query.weight, scorer.query.bias, scorer.key.weight, scorer.key.bias),
            *(scorer.down, scorer.basis(layout)),
            geometry=layout.for_kernels(tile),
            temperature=scorer.temperature,
            coef_topk=kept,
            budget=spec.budget,
            forced=0,
            with_scores=True,
        )
    assert torch.allclose(scores.double(), exact, rtol=2e-5, atol=2e-6, equal_nan=True)
    own = layout.square_tokens(tile, q.device)
    assert torch.equal(indices, select_topk(scores, spec.budget, own=own, backend="reference"))


@needs_triton
@pytest.mark.matrix(sample=lambda dtype, rows_at_once: (dtype == torch.float32) == (rows_at_once is None))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])])
@pytest.mark.parametrize(
    ("patches", "prefix", "tile", "head_dim", "budget"),
    [(62, 1, 4, 16, 9), (62, 5, 8, 24, 20), (16, 0, 2, 8, 3), (196, 2, 14, 64, 30)],
)
@pytest.mark.parametrize("rows_at_once", [None, 3])
def test_pooled_scores_and_their_selection(
    dtype, patches, prefix, tile, head_dim, budget, rows_at_once, monkeypatch
):
    if rows_at_once:
        monkeypatch.setattr(triton_tiles, "scratch_rows", lambda *sizes: rows_at_once)
    layout = layout_of(patches, prefix)
    q, k, _ = make_qkv(layout, head_dim=head_dim, batch=2, dtype=dtype, device=DEVICE)
    q[1, 1, -1] = torch.nan
    own = layout.square_tokens(tile, q.device)
    exact = layout.square_means(q[:, :, prefix:].double(), tile) @ k[:, :, prefix:].double().mT
    sizes = {"budget": budget, "forced": prefix, "with_scores": True}
    indices, scores = triton_tiles.select_pooled(q, k, geometry=layout.for_kernels(tile), **sizes)
    scores = scores.float().view(*exact.shape[:3], -1)[..., : exact.shape[-1]]
    # 16-bit inputs give means in their own dtype and scores in bf16
    eps = 1e-6 if dtype == torch.float32 else torch.finfo(torch.bfloat16).eps
    assert torch.equal(scores.isnan(), exact.isnan())
    assert (scores - exact).nan_to_num().abs().max() <= eps * exact.nan_to_num().abs().max()
    every = torch.nn.functional.pad(scores, (prefix, 0))
    expected = select_topk(every, budget, forced=prefix, own=own, backend="reference")
    assert torch.equal(indices, expected)


@needs_triton
@pytest.mark.matrix(sample=lambda dtype, rows_at_once: (dtype == torch.float32) == (rows_at_once is None))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])])
@pytest.mark.parametrize(
    ("patches", "prefix", "tile", "pool", "summary", "head_dim", "budget"),
    [
        (62, 1, 4, 2, 3, 16, 9),
        (62, 5, 8, 8, 4, 24, 20),
        (16, 0, 2, 1, 2, 8, 3),
        (196, 2, 14, 7, 2, 64, 60),
        (196, 40, 6, 2, 4, 16, 50),  # more prefix keys than one step takes, nine squares in a tile
    ],
)
@pytest.mark.parametrize("rows_at_once", [None, 3])
def test_impact_scores_and_their_selection(
    dtype, patches, prefix, tile, pool, summary, head_dim, budget, rows_at_once, monkeypatch
):
    if rows_at_once:
        monkeypatch.setattr(triton_tiles, "scratch_rows", lambda *sizes: rows_at_once)
    layout, scale = layout_of(patches, prefix), head_dim**-0.5
    q, k, v = make_qkv(layout, head_dim=head_dim, batch=2, dtype=dtype, device=DEVICE)
    q[1, 1, -1], v[0, 1, -2] = torch.nan, torch.nan
    v[0, 0, prefix : prefix + 2] = 0.0
    spec = ListSpec(layout, tile, budget, prefix, scale, summary=summary)
    exact = build_scorer(Impact(pool=pool), layout).scores(q.double(), k.double(), v.double(), spec)[
        ..., prefix:
    ]
    sizes = {"scale": scale, "budget": budget, "forced": prefix, "with_scores": True}
    geometry = layout.for_kernels(tile, pool, summary)
    indices, means, scores = triton_tiles.select_impact(q, k, v, geometry=geometry, **sizes)
    scores = scores.float().view(*exact.shape[:3], -1)[..., : exact.shape[-1]]
    for x, found in zip((k, v), means, strict=True):
        wanted = layout.square_means(x[:, :, prefix:].double(), summary)
        torch.testing.assert_close(
            found.double(),
            wanted,
            rtol=0,
            atol=torch.finfo(dtype).eps * x.abs().nan_to_num().max().item(),
            equal_nan=True,
        )
    # 16-bit inputs give mean queries in their own dtype and scores in fp16
    eps = 2e-6 if dtype == torch.float32 else torch.finfo(torch.bfloat16 if GPU else dtype).eps
    assert torch.equal(scores.isnan(), exact.isnan())
    largest = exact.nan_to_num(neginf=0.0).abs().max()
    assert (scores - exact).nan_to_num().abs().max() <= eps * largest
    every = torch.nn.functional.pad(scores, (prefix, 0))
    own = layout.square_tokens(tile, q.device)
    assert torch.equal(indices, select_topk(every, budget, forced=prefix, own=own, backend="reference"))


@needs_triton
@pytest.mark.skipif(GPU, reason="interpreted only")
def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"backend='triton' needs an NVIDIA GPU"):
        select_topk(torch.randn(1, 1, 2, 3), 1, backend="triton")


@needs_triton
def test_operators():
    ops = torch.ops.sparsifiner
    scores, own = torch.randn(1, 2, 3, 9, device=DEVICE), torch.arange(3, device=DEVICE).unsqueeze(1)
    torch.library.opcheck(ops.select_topk.default, (scores, 4, 1, own, "triton"))
    q, k, v = make_qkv(layout_of(16, 1), device=DEVICE)
    torch.library.opcheck(ops.select_pooled.default, (q, k, (4, 4, 1, 2), 5, 1, "triton"))
    impact = (q, k, v, (4, 4, 1, 2, 1, 2), 0.25, 5, 1, "triton")
    torch.library.opcheck(ops.select_impact.default, impact)
    scorer = lowrank_scorer(layout_of(16, 1), 16, 4, 2)
    weights = [scorer.query.weight, scorer.query.bias, scorer.key.weight, scorer.key.bias, scorer.down]
    weights = [weight.detach() for weight in (*weights, scorer.up.mT)]
    sizes = ((4, 4, 1, 2), 0.5, 2, 5, 1, "triton")
    torch.library.opcheck(ops.select_lowrank.default, (q, k, *weights, *sizes))
