"""Losses, the differentiable scores behind them and the schedule: against their formulas in fp64."""

import math

import pytest
import torch
from torch import nn

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.scorers import ListSpec, LowRank, Pooled, Released
from sparsifiner.training.loop import make_schedule
from sparsifiner.training.losses import (
    classification_loss,
    distillation_loss,
    reconstruction_loss,
    token_loss,
)
from sparsifiner.training.recipe import Stage
from tests.ops.cases import build_scorer, make_qkv
from tests.test_memory import LargestTensor

SCALE = 0.3


def make_attention(q, k, layout):
    """Attention rows of the patch queries."""
    return (q[:, :, layout.prefix :] @ k.mT * SCALE).softmax(-1)


def spread_over_queries(rows, layout, tile):
    """Each patch query's row, from the row of the tile that it lies in."""
    height, width = layout.grid
    columns = -(-width // tile)
    own = [y // tile * columns + x // tile for y in range(height) for x in range(width)]
    return rows[:, :, own]


def make_factors(layout, tile, size, *, sparse):
    """C [B, H, rows, K] and U [N, K] in fp64, as leaves."""
    coefficients = torch.randn(2, 2, layout.squares(tile), size, dtype=torch.float64)
    basis = torch.randn(layout.tokens, size, dtype=torch.float64)
    if sparse:
        coefficients = coefficients.softmax(-1)
        coefficients = torch.where(coefficients > coefficients.median(), coefficients, 0)
        basis = torch.where(basis.abs() > 0.7, basis.abs(), 0)
    return coefficients.requires_grad_(), basis.requires_grad_()


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("size", [5, 12])  # below and above the head dim of 8
@pytest.mark.parametrize("tile", [1, 3])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_reconstruction_is_the_closed_form_with_its_gradients(prefix, tile, size, sparse):
    layout = TokenLayout((5, 7), prefix)
    q, k, _ = make_qkv(layout, head_dim=8, batch=2, dtype=torch.float64)
    factors = make_factors(layout, tile, size, sparse=sparse)
    attention = make_attention(q, k, layout)
    loss = reconstruction_loss(*factors, q, k, layout=layout, tile=tile, scale=SCALE)
    scores = spread_over_queries(factors[0] @ factors[1].mT, layout, tile)
    expected = (scores - attention).square().sum() / 2
    assert relative_error(loss + attention.square().sum() / 2, expected) < 1e-10
    actual_gradients = torch.autograd.grad(loss, factors)
    for actual, wanted in zip(actual_gradients, torch.autograd.grad(expected, factors), strict=True):
        assert relative_error(actual, wanted) < 1e-10


@pytest.mark.parametrize("tile", [1, 3])
def test_reconstruction_does_not_depend_on_the_batch_size(tile):
    layout = TokenLayout((5, 7), 1)
    q, k, _ = make_qkv(layout, batch=2, dtype=torch.float64)
    coefficients, basis = make_factors(layout, tile, 6, sparse=False)
    once, twice = (
        reconstruction_loss(
            coefficients.repeat(times, 1, 1, 1),
            basis,
            *(x.repeat(times, 1, 1, 1) for x in (q, k)),
            layout=layout,
            tile=tile,
            scale=SCALE,
        )
        for times in (1, 2)
    )
    assert relative_error(twice, once) < 1e-12
    assert relative_error(*(torch.autograd.grad(loss, basis)[0] for loss in (twice, once))) < 1e-12


@pytest.mark.parametrize("tile", [1, 5])
def test_reconstruction_allocates_nothing_of_n_by_n(tile):
    layout = TokenLayout((32, 32), 1)
    N = layout.tokens
    q, k, _ = make_qkv(layout, heads=1)
    scorer = build_scorer(LowRank(), layout, num_heads=1)
    with LargestTensor() as largest:
        factors = scorer.factors(q, k, layout, tile)
        reconstruction_loss(*factors, q, k, layout=layout, tile=tile, scale=SCALE).backward()
    assert largest.elements < N * N / 4
    with LargestTensor() as largest:  # shows that the measurement sees such tensors
        make_attention(q, k, layout)
    assert largest.elements >= N * (N - 1)


def test_distillation_is_the_divergence_of_teacher_from_student():
    logits, teacher = torch.randn(2, 4, 7, dtype=torch.float64).unbind(0)
    p, s = teacher.softmax(1), logits.softmax(1)
    expected = (p * (p / s).log()).sum() / 4
    assert relative_error(distillation_loss(logits, teacher), expected) < 1e-12
    assert distillation_loss(logits, logits).abs() < 1e-15


def test_classification_is_the_cross_entropy_with_soft_targets():
    logits = torch.randn(4, 7, dtype=torch.float64)
    targets = torch.rand(4, 7, dtype=torch.float64).softmax(1)
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = -(targets * probabilities.log()).sum() / 4
    assert relative_error(classification_loss(logits, targets), expected) < 1e-12


def test_token_loss_is_the_mean_squared_error():
    tokens, teacher = torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind(0)
    expected = (tokens - teacher).pow(2).sum() / (3 * 5 * 4)
    assert relative_error(token_loss(tokens, teacher), expected) < 1e-12


class TestFactors:
    """What the low-rank scorer learns through."""

    layout = TokenLayout((5, 7), 1)

    def make_scorer(self, options=LowRank()):  # noqa: B008
        scorer = build_scorer(options, self.layout).double()
        with torch.no_grad():
            for parameter in scorer.parameters():
                # for up, about half of the entries then exceed the threshold
                parameter.copy_(torch.randn_like(parameter) * (0.03 if parameter is scorer.up else 1))
        return scorer

    def test_basis_is_the_magnitude_above_the_threshold(self):
        scorer = self.make_scorer()
        magnitude = scorer.up.abs()
        kept = magnitude > 0.02
        assert 0.2 < kept.double().mean() < 0.8
        assert torch.equal(scorer.basis(self.layout), magnitude * kept)

    def test_basis_passes_its_gradient_through_the_threshold(self):
        scorer = self.make_scorer()
        upstream = torch.randn_like(scorer.up)
        (upstream * scorer.basis(self.layout)).sum().backward()
        assert torch.equal(scorer.up.grad, upstream * scorer.up.sign())

    @pytest.mark.parametrize("tile", [1, 3])
    def test_coefficients_pass_gradient_only_where_they_are_kept(self, tile):
        scorer = self.make_scorer(LowRank(basis=12, reduced_dim=4, coef_topk=3))
        q, k, _ = make_qkv(self.layout, batch=2, dtype=torch.float64)
        members = self.layout.square_tokens(tile, q.device)
        query = torch.stack([q[:, :, row[row >= 0]].mean(2) for row in members], 2)
        reduced_q = query @ scorer.query.weight.T + scorer.query.bias
        reduced_k = k @ scorer.key.weight.T + scorer.key.bias
        key_down = torch.einsum("nk,bhnc->bhkc", scorer.down, reduced_k)
        full = (reduced_q @ key_down.mT / 2).softmax(-1)
        # counting the larger ones settles which are kept, without a gradient
        kept = (full.unsqueeze(-1) < full.unsqueeze(-2)).sum(-1) < 3
        expected = full * kept.detach()
        actual, basis = scorer.factors(q, k, self.layout, tile)
        assert relative_error(actual, expected) < 1e-12
        assert torch.equal(basis, scorer.basis(self.layout))
        upstream = torch.randn_like(actual)
        learned = [scorer.down, *scorer.query.parameters(), *scorer.key.parameters()]
        gradients = torch.autograd.grad((upstream * actual).sum(), learned)
        for actual_gradient, wanted in zip(
            gradients, torch.autograd.grad((upstream * expected).sum(), learned), strict=True
        ):
            assert relative_error(actual_gradient, wanted) < 1e-10

    def test_the_released_one_learns_all_coefficients_and_the_signed_basis(self):
        scorer = self.make_scorer(Released())
        q, k, _ = make_qkv(self.layout, dtype=torch.float64)
        coefficients, basis = scorer.factors(q, k, self.layout, 1)
        assert torch.equal(coefficients, scorer.coefficients(q, k, self.layout))
        assert basis is scorer.up
        assert (coefficients.sum(-1) - 1).abs().max() < 1e-12

    def test_products_of_the_factors_are_the_scores(self):
        scorer = self.make_scorer()
        q, k, v = make_qkv(self.layout, dtype=torch.float64)
        spec = ListSpec(self.layout, tile=1, budget=3, forced=0, scale=SCALE)
        coefficients, basis = scorer.factors(q, k, self.layout, 1)
        assert relative_error(coefficients @ basis.mT, scorer.scores(q, k, v, spec)) < 1e-12

    def test_other_scorers_have_no_factors(self):
        q, k, _ = make_qkv(self.layout)
        with pytest.raises(TypeError, match="PooledScorer has nothing to learn"):
            build_scorer(Pooled(), self.layout).factors(q, k, self.layout, 1)


def rates(stage, steps_per_epoch, warmup_lr):
    """Learning rate of every step of a stage."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=stage.peak_lr)
    schedule = make_schedule(optimizer, stage, steps_per_epoch, warmup_lr)
    for step in range(stage.epochs * steps_per_epoch):
        schedule.step_update(step)
        yield optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("warmup_epochs", "warmup"), [(0, 0), (0.3, 2), (1.5, 10), (3, 21)], ids=["none", "2", "10", "21 steps"]
)
def test_the_schedule_is_a_line_and_a_cosine(warmup_epochs, warmup):
    stage = Stage("distil", 4, warmup_epochs=warmup_epochs, lr=3e-4, min_lr=2e-5)
    cosine = 28 - warmup
    expected = [1e-6 + (3e-4 - 1e-6) * step / warmup for step in range(warmup)]
    expected += [2e-5 + (3e-4 - 2e-5) / 2 * (1 + math.cos(math.pi * step / cosine)) for step in range(cosine)]
    assert list(rates(stage, 7, 1e-6)) == pytest.approx(expected, rel=1e-12, abs=0)


def test_the_warm_up_starts_no_higher_than_it_ends():
    stage = Stage("distil", 2, warmup_epochs=1, lr=1e-5, min_lr=1e-6)
    assert list(rates(stage, 3, 1e-2))[:4] == pytest.approx([1e-5] * 4, rel=1e-12)


@pytest.mark.parametrize(("epochs", "warmup_epochs", "steps_per_epoch"), [(1, 0.9, 3), (1, 0.6, 1)])
def test_a_fractional_warm_up_leaves_a_step_to_the_cosine(epochs, warmup_epochs, steps_per_epoch):
    stage = Stage("distil", epochs, warmup_epochs=warmup_epochs)
    found = list(rates(stage, steps_per_epoch, 1e-6))
    assert found[-1] == pytest.approx(stage.peak_lr, rel=1e-12)
