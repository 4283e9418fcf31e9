"""What benchmarks compute with: random inputs, as attention layers make them."""

import math

import torch
from torch import Tensor

# Sets of inputs together exceed the caches, as long as they are no more than these.
_CACHE_BYTES = {"cpu": 2**26, "cuda": 2**28}
_FEWEST_SETS, _MOST_SETS = 2, 8


def projected_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sets of q, k and v, strided views of one normal projection each, as attention layers make them.

    Args:
        shape: B, N, 3, H, d.
        dtype: of q, k and v.
        generator: source of chance; its device is theirs.

    Returns:
        At least two sets of q, k and v [B, H, N, d], enough to outgrow the caches.
    """
    cache = _CACHE_BYTES.get(generator.device.type, _CACHE_BYTES["cpu"])
    count = min(_MOST_SETS, max(_FEWEST_SETS, -(-cache // (math.prod(shape) * dtype.itemsize))))
    sets = []
    for _ in range(count):
        projection = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
        q, k, v = projection.permute(2, 0, 3, 1, 4).unbind(0)
        sets.append((q, k, v))
    return sets
