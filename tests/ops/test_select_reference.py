"""The selection rules, on the reference that every backend is compared with."""

import pytest
import torch

from sparsifiner.ops import select_topk


def select(scores, budget, **options):
    return select_topk(scores, budget, backend="reference", **options)


def rows(*values):
    return torch.tensor(values).view(1, 1, len(values), -1)


def test_largest_scores_win_and_come_ascending():
    indices = select(rows([0.1, 3.0, -1.0, 2.0, 0.5]), 3)
    assert indices.dtype == torch.int32
    assert indices[0, 0, 0].tolist() == [1, 3, 4]


def test_ties_go_to_the_lowest_index():
    assert select(torch.zeros(2, 3, 4, 7), 3).tolist() == torch.arange(3).expand(2, 3, 4, 3).tolist()
    assert select(rows([1.0, 2.0, 1.0, 2.0, 1.0]), 3)[0, 0, 0].tolist() == [0, 1, 3]


def test_negative_zero_ties_with_zero():
    assert select(rows([-1.0, -0.0, 0.0, -0.0]), 2)[0, 0, 0].tolist() == [1, 2]


def test_scores_are_compared_in_fp32():
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64).view(1, 1, 1, 2)
    assert select(close, 1).item() == 0


def test_nan_is_minus_infinity_and_never_selected():
    scores = rows([float("nan"), 1.0, float("-inf"), 2.0])
    assert select(scores, 3)[0, 0, 0].tolist() == [1, 3, -1]


def test_infinity_is_an_ordinary_large_score():
    assert select(rows([0.0, float("inf"), 1.0]), 2)[0, 0, 0].tolist() == [1, 2]


def test_row_without_a_score_selects_itself():
    # five tokens, one of them prefix: row r is token r + 1
    scores = torch.full((1, 1, 4, 5), float("nan"))
    assert select(scores, 2)[0, 0].tolist() == [[1, -1], [2, -1], [3, -1], [4, -1]]


def test_row_without_a_score_selects_its_tile_beside_forced_prefix():
    scores = torch.full((1, 1, 2, 6), float("-inf"))
    own = torch.tensor([[2, 3], [4, 5]])
    assert select(scores, 2, forced=1, own=own)[0, 0].tolist() == [[0, 2], [0, 4]]
    assert select(scores, 4, forced=1, own=own)[0, 0].tolist() == [[0, 2, 3, -1], [0, 4, 5, -1]]


def test_forced_prefix_is_inside_the_budget():
    scores = rows([float("nan"), -5.0, 1.0, 3.0, 2.0])
    assert select(scores, 3, forced=2)[0, 0, 0].tolist() == [0, 1, 3]
    assert select(rows([-1.0, float("inf"), float("inf")]), 2, forced=1)[0, 0, 0].tolist() == [0, 1]


def test_all_keys_and_one_key():
    scores = torch.randn(2, 2, 5, 5)
    assert torch.equal(select(scores, 5), torch.arange(5).int().expand(2, 2, 5, 5))
    assert torch.equal(select(scores, 1)[..., 0].long(), scores.argmax(-1))


def test_inputs_stay_untouched_and_carry_no_gradient():
    scores = torch.randn(1, 1, 3, 4, requires_grad=True)
    before = scores.detach().clone()
    indices = select(scores, 2, forced=1)
    assert torch.equal(scores, before)
    assert not indices.requires_grad


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.zeros(1, 1, 2, 3, dtype=torch.int64), {"budget": 1}, "scores must be floating point"),
        (torch.zeros(2, 3), {"budget": 1}, r"scores must be \[B, H, rows, N\]"),
        (torch.zeros(1, 1, 2, 3), {"budget": 0}, "budget must lie in 1..3"),
        (torch.zeros(1, 1, 2, 3), {"budget": 4}, "budget must lie in 1..3"),
        (torch.zeros(1, 1, 2, 3), {"budget": 1, "forced": 2}, "forced must lie in 0..1"),
        (torch.zeros(1, 1, 2, 3), {"budget": 1, "own": torch.zeros(3, 1)}, r"own must be \[rows=2"),
        (torch.zeros(1, 1, 2, 3), {"budget": 1, "backend": "cuda"}, "backend='cuda' is not available"),
    ],
)
def test_bad_arguments_are_named(scores, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        select_topk(scores, **options)
