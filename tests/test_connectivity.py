"""Layouts, budgets and key lists."""

import math

import pytest
import torch

from sparsifiner.geometry.connectivity import Connectivity, exact_ratio, forced_prefix, key_budget
from sparsifiner.geometry.grid import TokenLayout


@pytest.mark.parametrize("grid", [(1, 1), (2, 31), (14, 14), (5, 7)])
@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_squares_partition_the_grid(grid, side, prefix):
    layout = TokenLayout(grid, prefix)
    tokens = layout.square_tokens(side, torch.device("cpu"))
    assert tokens.shape == (layout.squares(side), math.prod(layout.square_shape(side)))
    assert sorted(tokens[tokens >= 0].tolist()) == list(range(prefix, layout.tokens))
    assert (tokens >= 0).sum(1).tolist() == layout.square_sizes(side, tokens.device).tolist()
    for square, members in enumerate(tokens):
        members = members[members >= 0]
        assert (layout.square_of_token(members, side) == square).all()
        y, x = (members - prefix) // grid[1], (members - prefix) % grid[1]
        assert len((y // side).unique()) == len((x // side).unique()) == 1
    outside = torch.tensor([-1, *range(prefix)])
    assert (layout.square_of_token(outside, side) == layout.squares(side)).all()


@pytest.mark.parametrize("grid", [(2, 31), (14, 14), (5, 7)])
@pytest.mark.parametrize("side", [1, 3, 8])
def test_split_and_merge_are_inverse_and_means_are_true_means(grid, side):
    layout = TokenLayout(grid, 2)
    patches = torch.randn(2, 3, layout.patches, 4, dtype=torch.float64)
    split = layout.split_squares(patches, side)
    assert torch.equal(layout.merge_squares(split, side), patches)
    members = layout.square_tokens(side, torch.device("cpu"))
    for square, mean in enumerate(layout.square_means(patches, side).unbind(2)):
        own = members[square][members[square] >= 0] - 2
        assert (mean - patches[:, :, own].mean(2)).abs().max() < 1e-14


def test_auto_summary_is_the_largest_side_with_48_windows_but_at_least_2():
    assert TokenLayout((14, 14)).auto_summary() == 2
    assert TokenLayout((16, 16)).auto_summary() == 2
    assert TokenLayout((32, 32)).auto_summary() == 5
    assert TokenLayout((64, 64)).auto_summary() == 10
    assert TokenLayout((12, 12)).auto_summary() == TokenLayout((4, 4)).auto_summary() == 2


@pytest.mark.parametrize(
    ("keep", "tokens", "forced", "budget"),
    [
        (0.25, 197, 0, 50),
        (0.1, 197, 0, 20),
        (0.01, 197, 0, 2),
        (1.0, 197, 5, 197),
        (0.01, 197, 5, 6),
        (0.07, 100, 0, 7),
        (1 / 257, 257, 0, 1),
        (0.5, 2, 5, 2),
    ],
)
def test_key_budget(keep, tokens, forced, budget):
    assert key_budget(exact_ratio(keep), tokens, forced) == budget


def test_prefix_is_forced_with_tiles_or_summaries_only():
    assert [forced_prefix(2, *geometry) for geometry in ((1, None), (8, None), (1, 4), (8, 4))] == [
        0,
        2,
        2,
        2,
    ]


def test_mask_and_density_of_ragged_tiles():
    indices = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32).view(1, 1, 2, 2)
    connectivity = Connectivity(indices, grid=(1, 3), tile=2, prefix=1)  # tiles of 2 and of 1 patches
    expected = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]
    assert connectivity.to_mask()[0, 0].int().tolist() == expected
    assert connectivity.density() == pytest.approx((2 + 2 + 1) / (3 * 4))


def test_bad_lists_are_named():
    with pytest.raises(TypeError, match="indices must be int32"):
        Connectivity(torch.zeros(1, 1, 4, 2), (2, 2))
    with pytest.raises(ValueError, match=r"indices must be \[B, H, rows, k\]"):
        Connectivity(torch.zeros(4, 2, dtype=torch.int32), (2, 2))
    with pytest.raises(ValueError, match="2x2 grid with tile=2 has 1 rows"):
        Connectivity(torch.zeros(1, 1, 4, 2, dtype=torch.int32), (2, 2), tile=2)
    with pytest.raises(ValueError, match="tile must be at least 1"):
        Connectivity(torch.zeros(1, 1, 4, 2, dtype=torch.int32), (2, 2), tile=0)
