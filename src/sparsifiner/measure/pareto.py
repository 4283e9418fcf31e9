"""Which methods no other one beats, and how sure that is."""

from collections.abc import Sequence

import numpy as np

_DRAWS = 2000


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices of the points that no other one beats: none costs at most as much and gains more.

    Args:
        costs: the smaller the better.
        gains: the larger the better.

    Returns:
        Indices by ascending cost.
    """
    order = sorted(range(len(costs)), key=lambda index: (costs[index], -gains[index]))
    front: list[int] = []
    for index in order:
        if not front or gains[index] > gains[front[-1]]:
            front.append(index)
    return front


def bootstrap_interval(differences: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of paired differences: percentiles of means of images drawn anew.

    Args:
        differences: one per image, such as right (1) or wrong (0) of a model less that of another, or their
            mean over seeds.
        seed: of the draws.

    Source:
        Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    draw = np.random.default_rng(seed)
    values, counts = np.unique(differences, return_counts=True)  # few values, so that counts can be drawn
    drawn = draw.multinomial(len(differences), counts / len(differences), _DRAWS)
    low, high = np.percentile(drawn @ values / len(differences), [2.5, 97.5])
    return float(low), float(high)
