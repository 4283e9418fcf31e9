"""Survivors along a curve, cut into runs."""

import pytest
import torch

from sparsifiner.geometry.curve import CurveLayout, places_on_curve
from sparsifiner.geometry.layout import Run

CPU = torch.device("cpu")
SIZES = [1, 9, 41, 100]
SIDES = [(1, 1), (2, 4), (3, 9), (8, 64), (Run(1), 1), (Run(3), 3), (Run(50), 50)]


@pytest.mark.parametrize("survivors", SIZES)
@pytest.mark.parametrize(("side", "length"), SIDES)
@pytest.mark.parametrize("prefix", [0, 2])
def test_runs_follow_each_other_and_have_as_many_patches_as_squares(survivors, side, length, prefix):
    layout = CurveLayout(survivors, prefix)
    assert (layout.patches, layout.tokens) == (survivors, prefix + survivors)
    order = list(range(prefix, layout.tokens))
    runs = [order[start : start + length] for start in range(0, survivors, length)]
    tokens = layout.square_tokens(side, CPU)
    assert [[token for token in row if token >= 0] for row in tokens.tolist()] == runs
    assert tokens.shape == (layout.squares(side), layout.square_patches(side))
    assert layout.square_patches(side) == min(length, survivors)
    assert layout.square_sizes(side, CPU).tolist() == [len(run) for run in runs]
    expected = [index for index, run in enumerate(runs) for _ in run]
    assert layout.square_of_token(torch.tensor(order), side).tolist() == expected
    outside = torch.tensor([-1, *range(prefix)])
    assert (layout.square_of_token(outside, side) == len(runs)).all()


@pytest.mark.parametrize("survivors", SIZES)
@pytest.mark.parametrize(("side", "length"), SIDES)
def test_split_and_merge_are_inverse_and_means_are_true_means(survivors, side, length):
    layout = CurveLayout(survivors, 2)
    patches = torch.randn(2, 3, survivors, 4, dtype=torch.float64)
    assert torch.equal(layout.merge_squares(layout.split_squares(patches, side), side), patches)
    means = torch.stack([run.mean(2) for run in patches.split(length, 2)], 2)
    assert (layout.square_means(patches, side) - means).abs().max() < 1e-14


@pytest.mark.parametrize("survivors", SIZES)
@pytest.mark.parametrize(("tile", "pool"), [(8, 4), (4, 4), (6, 2), (4, 1)])
def test_tiles_are_made_up_of_shorter_runs(survivors, tile, pool):
    layout = CurveLayout(survivors, 2)
    members = layout.squares_of_tiles(tile, pool, CPU)
    assert members.shape == (layout.squares(tile), layout.squares_per_tile(tile, pool))
    tokens = layout.square_tokens(pool, CPU)
    for own, whole in zip(members, layout.square_tokens(tile, CPU), strict=True):
        found = tokens[own.unique()].flatten()
        assert found[found >= 0].tolist() == whole[whole >= 0].tolist()


def test_auto_summary_is_the_longest_run_of_which_there_are_48_but_at_least_2():
    assert CurveLayout(5).auto_summary() == CurveLayout(141).auto_summary() == Run(2)
    assert CurveLayout(142).auto_summary() == Run(3)  # two of 48 windows have 3, the last one has 1
    assert CurveLayout(480).auto_summary() == Run(10)
    assert CurveLayout(480).squares(CurveLayout(480).auto_summary()) == 48


def test_the_whole_is_one_run():
    layout = CurveLayout(41, 1)
    assert layout.squares(layout.whole()) == 1
    assert layout.square_patches(layout.whole()) == 41


def test_kernels_take_a_curve_as_one_row_of_runs():
    assert CurveLayout(41, 2).for_kernels(4, None, 2, Run(3)) == (1, 41, 2, 16, 0, 4, 3)
    assert CurveLayout(3).positions(CPU).tolist() == [[0, 0], [0, 1], [0, 2]]


def test_a_run_has_a_patch():
    with pytest.raises(ValueError, match="a run has a length of at least 1 patch, got 0"):
        Run(0)


def test_the_curve_visits_the_grid_by_squares():
    patch, exists = places_on_curve((2, 4), CPU)
    assert patch.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert exists.all()
    patch, exists = places_on_curve((3, 3), CPU)
    assert patch[exists].tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
