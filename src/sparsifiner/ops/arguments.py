"""What kernels of operations with many arguments take, whichever backend they are of."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class AttendArguments(NamedTuple):
    """What kernels of `attend` take, whichever backend they are of.

    Attributes:
        q: [B, H, N, d] queries, like `k` and `v` of any strides.
        k: keys.
        v: values.
        indices: int32 [B, H, rows, keys].
        ascending: whether lists ascend as those of `select_topk` do; then they are read as they are.
        means: of keys and values over the windows [2, B, H, windows, d], None if they are to be computed.
        geometry: rows, columns, prefix and the sides of a tile and of a window, 0 for no summaries.
        scale: factor of the logits, above 0.
        training: whether the backward pass will read what is returned beside the result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    ascending: bool
    means: Tensor | None
    geometry: Sequence[int]
    scale: float
    training: bool


class LowRankArguments(NamedTuple):
    """What kernels of `select_lowrank` take, whichever backend they are of.

    Attributes:
        q: [B, H, N, d] queries.
        k: [B, H, N, d] keys.
        query_weight: W_q [c, d], like the other weights at the size of the input and in one floating dtype.
        query_bias: b_q [c].
        key_weight: W_k [c, d].
        key_bias: b_k [c].
        down: W_down [N, K].
        basis: Ũᵀ [K, N].
        geometry: rows, columns, prefix and the side of a tile.
        temperature: factor of the coefficients' logits.
        coef_topk: coefficients of a row that count, the largest.
        budget: list length.
        forced: the first keys, in every list.
    """

    q: Tensor
    k: Tensor
    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    down: Tensor
    basis: Tensor
    geometry: Sequence[int]
    temperature: float
    coef_topk: int
    budget: int
    forced: int

    def check(self) -> None:
        """Refuses weights that kernels would read beyond, or on another device than queries.

        Raises:
            ValueError: a shape or device does not fit.
        """
        (N, d), c, K = self.q.shape[2:], self.query_weight.shape[0], self.down.shape[-1]
        shapes = ((c, d), (c,), (c, d), (c,), (N, K), (K, N))
        for name, weight, shape in zip(self._fields[2:8], self[2:8], shapes, strict=True):
            if weight.shape != shape or weight.device != self.q.device:
                raise ValueError(
                    f"select_lowrank: {name} must be {list(shape)} on {self.q.device}, "
                    f"got {list(weight.shape)} on {weight.device}"
                )
