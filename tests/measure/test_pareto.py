"""Fronts by brute force, intervals against their known spread."""

import numpy as np
import pytest

from sparsifiner.measure.pareto import bootstrap_interval, pareto_front


def test_the_front_is_what_nothing_beats():
    draw = np.random.default_rng(0)
    costs, gains = draw.integers(0, 9, 40).tolist(), draw.integers(0, 9, 40).tolist()
    front = pareto_front(costs, gains)
    for point in range(40):
        beaten = any(
            (costs[other] <= costs[point] and gains[other] > gains[point])
            or (costs[other] < costs[point] and gains[other] >= gains[point])
            for other in range(40)
        )
        same = [other for other in front if (costs[other], gains[other]) == (costs[point], gains[point])]
        assert bool(same) == (not beaten)
    assert [costs[point] for point in front] == sorted(costs[point] for point in front)


def test_of_equal_points_one_stands():
    assert pareto_front([1, 1, 2], [5, 5, 5]) == [0]
    assert pareto_front([], []) == []


def test_intervals_have_the_spread_of_the_mean():
    draw = np.random.default_rng(1)
    differences = draw.choice([-100.0, 0.0, 100.0], 5000, p=[0.06, 0.9, 0.04])
    low, high = bootstrap_interval(differences)
    half = 1.96 * differences.std() / 5000**0.5
    assert low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(differences) == (low, high)
    assert bootstrap_interval(np.zeros(10)) == (0.0, 0.0)
