"""Budgets and key lists."""

import pytest
import torch

from sparsifiner.geometry.connectivity import (
    Connectivity,
    ScoredLists,
    forced_prefix,
    key_budget,
)
from sparsifiner.geometry.curve import CurveLayout
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ratios import exact_ratio


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


def test_lists_along_a_curve_have_a_row_for_each_run():
    indices = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32).view(1, 1, 2, 2)
    connectivity = Connectivity(indices, tile=2, prefix=1, survivors=5)  # runs of 4 and of 1 survivors
    assert connectivity.layout == CurveLayout(5, 1)
    expected = [[1] * 6, *[[1, 1, 0, 0, 0, 0]] * 4, [0, 0, 1, 0, 0, 0]]
    assert connectivity.to_mask()[0, 0].int().tolist() == expected
    assert connectivity.density() == pytest.approx((4 * 2 + 1) / (5 * 6))
    with pytest.raises(ValueError, match="a curve of 9 patches with tile=2 has 3 rows, got indices with 2"):
        Connectivity(indices, tile=2, prefix=1, survivors=9)
    with pytest.raises(ValueError, match="token 9, but a curve of 5 patches behind 1 prefix tokens has the"):
        Connectivity(torch.full_like(indices, 9), tile=2, prefix=1, survivors=5)


@pytest.mark.parametrize("layout", [TokenLayout((3, 3), 2), CurveLayout(9, 2)])
@pytest.mark.parametrize("kind", [Connectivity, ScoredLists])
def test_lists_over_a_layout_keep_it(kind, layout):
    indices = torch.zeros(1, 1, layout.squares(2), 1, dtype=torch.int32)
    lists = kind.over(layout, indices, 2, selected=True)
    assert (type(lists), lists.layout, lists.tile, lists.selected) == (kind, layout, 2, True)
    alone = lists.alone()
    assert (type(alone), alone.layout, alone.tile, alone.selected) == (Connectivity, layout, 2, True)


def test_patches_lie_in_a_grid_or_along_a_curve():
    indices = torch.zeros(1, 1, 4, 1, dtype=torch.int32)
    with pytest.raises(TypeError, match="got grid=None and survivors=None; give one of them"):
        Connectivity(indices)
    with pytest.raises(TypeError, match=r"got grid=\(2, 2\) and survivors=4; give one of them"):
        Connectivity(indices, (2, 2), survivors=4)


def test_patches_of_a_query_are_those_of_its_tile():
    indices = torch.tensor([[0, 1], [8, 2], [3, 13], [5, -1]], dtype=torch.int32)
    lists = Connectivity(indices.expand(1, 1, 4, 2), (3, 4), 2, 1, check=False)
    assert lists.patches_of((1, 3), head=0) == [7, 1]  # tokens 8 and 2 after one prefix token
    # prefix keys, empty slots and tokens that are not there have no place
    assert lists.patches_of((0, 0), head=0) == [0]
    assert lists.patches_of((2, 1), head=0) == [2]
    assert lists.patches_of((2, 3), head=0) == [4]
    with pytest.raises(ValueError, match=r"query=\(3, 0\) lies outside the grid of 3x4"):
        lists.patches_of((3, 0), head=0)


def test_lists_along_a_curve_have_no_place_in_the_image():
    lists = Connectivity(torch.zeros(1, 1, 2, 1, dtype=torch.int32), tile=2, prefix=1, survivors=5)
    with pytest.raises(ValueError, match="saw a curve of 5 patches, others were dropped before; ask"):
        lists.patches_of((0, 0), head=0)
