"""Grids of patches, cut into squares."""

import math

import pytest
import torch

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Run


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


@pytest.mark.parametrize("grid", [(16, 16), (5, 7), (4, 16), (3, 2)])
@pytest.mark.parametrize(("tile", "pool"), [(8, 4), (8, 8), (6, 2), (4, 1)])
def test_tiles_are_made_up_of_squares(grid, tile, pool):
    layout, cpu = TokenLayout(grid, 2), torch.device("cpu")
    members = layout.squares_of_tiles(tile, pool, cpu)
    assert members.shape == (layout.squares(tile), layout.squares_per_tile(tile, pool))
    tokens = layout.square_tokens(pool, cpu)
    for own, whole in zip(members, layout.square_tokens(tile, cpu), strict=True):
        found = tokens[own.unique()].flatten()
        assert sorted(found[found >= 0].tolist()) == whole[whole >= 0].tolist()


def test_the_whole_is_one_square():
    layout = TokenLayout((5, 7), 1)
    assert layout.squares(layout.whole()) == 1
    assert layout.square_patches(layout.whole()) == 35
    assert layout.square_patches(4) == 16
    assert layout.square_patches(6) == 30


def test_kernels_take_a_grid_as_it_is():
    assert TokenLayout((5, 7), 1).for_kernels(4, None, 2) == (5, 7, 1, 4, 0, 2)
    assert TokenLayout((2, 3)).positions(torch.device("cpu")).tolist() == [
        *([0, 0], [0, 1], [0, 2]),
        *([1, 0], [1, 1], [1, 2]),
    ]


def test_a_grid_has_no_runs():
    with pytest.raises(TypeError, match=r"a grid is cut into squares, got Run\(length=3\); give their side"):
        TokenLayout((5, 7)).squares(Run(3))
