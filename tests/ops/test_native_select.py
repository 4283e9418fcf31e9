"""Native selection against the reference, on every instruction set that this machine has."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import native, select_topk
from sparsifiner.ops.select import cpu_backend
from sparsifiner.scorers import Impact, ListSpec
from sparsifiner.training.losses import reconstruction_loss
from tests.ops.cases import build_scorer, layout_of, make_qkv
from tests.ops.test_select_backends import (
    assert_equals_reference,
    assert_forced_keys_are_listed_once,
    lowrank_scorer,
    special_scores,
)

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "runs")
INSTRUCTION_SETS = [isa.name.lower() for isa in native.Isa if isa and isa <= native.best_isa()]


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def _isa(request, monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    yield
    torch.set_num_threads(1)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    keys=st.integers(1, 200),
    levels=st.sampled_from([1, 2, 5, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_any_scores(seed, rows, keys, levels, dtype, data):
    budget = data.draw(st.integers(1, keys))
    forced = data.draw(st.integers(0, min(budget, 5)))
    assert_equals_reference(special_scores(seed, rows, keys, levels).to(dtype), budget, "cpu", forced=forced)


@pytest.mark.parametrize("keys", [1, 7, 8, 9, 15, 16, 17, 577, 1025, 20_000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_distributions(keys, share):
    budget = max(1, round(share * keys))
    normal = torch.randn(1, 2, 4, keys)
    skewed = [normal.exp(), normal**3, (normal - 5).relu(), normal.abs().pow(40), normal * 1e-42]
    for scores in (normal, *skewed, torch.arange(keys).expand(1, 1, 2, keys).float()):
        assert_equals_reference(scores, budget, "cpu")


def test_threads_change_nothing():
    scores = torch.randn(2, 3, 40, 300)
    expected = select_topk(scores, 30, backend="reference")
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(select_topk(scores, 30, backend="cpu"), expected)


def test_rows_without_a_score_take_their_own_tokens():
    scores = torch.full((1, 2, 2, 6), float("-inf"))
    own = torch.tensor([[2, 3], [4, -1]])
    for budget in (1, 2, 4):
        expected = select_topk(scores, budget, forced=1, own=own, backend="reference")
        assert torch.equal(select_topk(scores, budget, forced=1, own=own, backend="cpu"), expected)


def test_forced_keys_are_listed_once():
    assert_forced_keys_are_listed_once("cpu", "cpu")


def test_empty_batch():
    assert select_topk(torch.randn(0, 2, 3, 9), 4, backend="cpu").shape == (0, 2, 3, 4)
    layout = layout_of(16, 1)
    q, k, v = (x[:0] for x in make_qkv(layout))
    spec = ListSpec(layout, 1, 9, 0, 1.0, "cpu")
    assert lowrank_scorer(layout, 16, 8, 3)(q, k, v, spec).indices.shape == (0, 2, 16, 9)


def test_impossible_bases_are_named():
    coefficients, basis, own = torch.rand(1, 1, 2, 4), torch.rand(4, 9), torch.zeros(2, 1)
    for kept in (0, 5):
        with pytest.raises(ValueError, match=f"select_lowrank: {kept} of 4 coefficients do not go"):
            cpu_backend.select_lowrank(coefficients, basis, kept, 3, 0, own)


def train(scorer, layout, tile):
    """Fits the scorer to the attention of two images, so that its basis looks like a learned one."""
    q, k, _ = make_qkv(layout, batch=2)
    q, k = 3 * q, 3 * k
    optimizer = torch.optim.Adam(scorer.parameters(), 0.02)
    for _ in range(30):
        coefficients, basis = scorer.factors(q, k, layout, tile)
        loss = reconstruction_loss(coefficients, basis, q, k, layout=layout, tile=tile, scale=0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("patches", "prefix", "tile", "basis", "kept", "budget"),
    [
        (4, 1, 1, 4, 2, 3),
        (62, 0, 1, 32, 8, 7),
        (196, 5, 4, 32, 8, 20),
        (62, 2, 8, 6, 6, 64),
        (256, 1, 1, 33, 1, 26),
    ],
)
def test_lowrank_lists(patches, prefix, tile, basis, kept, budget, dtype, trained):
    layout = layout_of(patches, prefix)
    scorer = lowrank_scorer(layout, 16, basis, kept)
    if trained:
        train(scorer, layout, tile)
    q, k, v = make_qkv(layout, batch=2, dtype=dtype)
    q[0, 0, -1] = torch.nan
    spec = ListSpec(layout, tile, min(budget, layout.tokens), 0, 1.0, "cpu")
    indices = scorer(q, k, v, spec).indices
    # rounding differs from torch's sums, so lists are compared by the scores that they hold
    scores = scorer.scores(q, k, v, spec)
    expected = select_topk(scores, spec.budget, own=layout.square_tokens(tile, q.device), backend="reference")
    assert (indices.diff(dim=-1) > 0)[indices[..., 1:] >= 0].all()
    held, best = (scores.nan_to_num().gather(-1, each.clamp(min=0).long()) for each in (indices, expected))
    held, best = (each.masked_fill(lists < 0, 0) for each, lists in ((held, indices), (best, expected)))
    assert torch.equal((indices >= 0).sum(-1), (expected >= 0).sum(-1))
    assert torch.allclose(held.sort(-1).values, best.sort(-1).values, rtol=1e-5, atol=1e-7)


def test_lowrank_sums_follow_the_largest_coefficients_in_order():
    # powers of two: sums are exact, ties of coefficients and of scores are many
    generator = torch.Generator().manual_seed(0)
    coefficients = 2.0 ** -torch.randint(0, 4, (1, 2, 50, 12), generator=generator)
    basis = torch.randint(0, 5, (12, 90), generator=generator).float()
    own = torch.arange(50).unsqueeze(1)
    indices = cpu_backend.select_lowrank(coefficients, basis, 5, 17, 1, own)
    # of equal coefficients the first ones
    order = coefficients.argsort(dim=-1, descending=True, stable=True)[..., :5]
    sparse = torch.zeros_like(coefficients).scatter(-1, order, coefficients.gather(-1, order))
    expected = select_topk(sparse @ basis, 17, forced=1, own=own, backend="reference")
    assert torch.equal(indices, expected)


def test_operators():
    scores, own = torch.randn(1, 2, 3, 9), torch.arange(3).unsqueeze(1)
    torch.library.opcheck(torch.ops.sparsifiner.select_topk.default, (scores, 4, 1, own, "cpu"))
    q, k, _ = make_qkv(layout_of(16, 1))
    shapes = ((8, 16), (8,), (8, 16), (8,), (17, 4), (4, 17))
    weights = [torch.rand(shape) for shape in shapes]
    sizes = ((4, 4, 1, 2), 0.5, 2, 5, 1, "cpu")
    torch.library.opcheck(torch.ops.sparsifiner.select_lowrank.default, (q, k, *weights, *sizes))


def test_scorers_select_natively():
    layout = TokenLayout((9, 7), 1)
    q, k, v = make_qkv(layout)
    spec = ListSpec(layout, 1, 9, 0, 1.0, "cpu")
    scorer = lowrank_scorer(layout, 16, 8, 3)
    reference = scorer(q, k, v, ListSpec(layout, 1, 9, 0, 1.0, "reference")).indices
    assert (scorer(q, k, v, spec).indices == reference).float().mean() > 0.99


@pytest.mark.parametrize("dtypes", itertools.product([torch.float32, torch.bfloat16], repeat=2))
@pytest.mark.parametrize(
    ("patches", "prefix", "head_dim", "basis"),
    [(4, 0, 16, 1), (62, 1, 64, 32), (62, 5, 80, 33), (16, 2, 48, 7)],
)
def test_coefficients_are_those_of_the_formula(patches, prefix, head_dim, basis, dtypes):
    layout = layout_of(patches, prefix)
    scorer = lowrank_scorer(layout, head_dim, basis, 1)
    q, k, _ = make_qkv(layout, batch=2, head_dim=head_dim)
    q, k = q.to(dtypes[0]), k.to(dtypes[1])
    q[0, 1, -1, 3], q[1, 0, -1, 0] = torch.nan, torch.inf
    weights = (scorer.query.weight, scorer.query.bias, scorer.key.weight, scorer.key.bias, scorer.down)
    rows = q[:, :, prefix:]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        actual = cpu_backend.lowrank_coefficients(rows, k, *weights, scorer.temperature)
        exact = copy.deepcopy(scorer).double().coefficients(q.double(), k.double(), layout)
        assert torch.allclose(actual.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("patches", "prefix", "tile", "pool", "summary", "head_dim", "budget"),
    [
        (4, 1, 1, 1, 2, 16, 2),
        (62, 3, 1, 1, None, 16, 9),
        (62, 1, 4, 2, 3, 16, 9),
        (62, 5, 8, 8, 4, 32, 20),
        (16, 0, 2, 1, 2, 16, 3),
        (196, 2, 14, 7, 2, 64, 60),
        (196, 40, 6, 2, 4, 16, 60),
        (256, 1, 4, 2, 4, 64, 27),
    ],
)
def test_impact_lists_are_those_of_exact_scores(
    patches, prefix, tile, pool, summary, head_dim, budget, dtype
):
    layout, scale = layout_of(patches, prefix), head_dim**-0.5
    q, k, v = make_qkv(layout, head_dim=head_dim, batch=2, dtype=dtype)
    q[1, 1, -1], v[0, 1, -2], k[0, 0, -1] = torch.nan, torch.nan, torch.nan
    v[0, 0, prefix : prefix + 2] = 0.0
    forced = prefix if tile > 1 else 0  # the prefix competes
    spec = ListSpec(layout, tile, budget, forced, scale, "cpu", summary)
    scorer = build_scorer(Impact(pool=pool), layout)
    indices = scorer(q, k, v, spec).indices.long()
    exact = scorer.scores(q.double(), k.double(), v.double(), spec).nan_to_num(nan=-torch.inf)
    exact[..., :forced] = torch.inf
    best = exact.topk(budget, -1).values
    own = layout.square_tokens(tile, q.device)
    for batch, head, row in np.ndindex(indices.shape[:3]):
        listed = indices[batch, head, row]
        listed = listed[listed >= 0]
        assert torch.equal(listed, listed.sort().values.unique())
        scores = exact[batch, head, row]
        if (scores[forced:] > -torch.inf).any():
            # as good as the best, but for rounding in fp32
            expected = best[batch, head, row]
            expected = expected[expected > -torch.inf]
            actual = scores[listed].sort(descending=True).values
            assert len(actual) == len(expected)
            finite = expected < torch.inf
            assert (actual[finite] - expected[finite]).abs().max() < 1e-5
        else:
            mine = own[row][own[row] >= 0][: budget - forced]
            assert torch.equal(listed, torch.cat([torch.arange(forced), mine]))


def test_impact_operator():
    q, k, v = make_qkv(layout_of(16, 1))
    sizes = ((4, 4, 1, 2, 1, 2), 0.25, 5, 1, "cpu")
    operator = torch.ops.sparsifiner.select_impact.default
    torch.library.opcheck(operator, (q, k, v, *sizes))
    assert operator(*(x[:0] for x in (q, k, v)), *sizes)[0].shape[0] == 0
