"""Attention among the tokens of a call: what they weigh, where they lay, which of them would be gone."""

from dataclasses import replace

from torch import Tensor

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.ops.dense import dense_attention
from sparsifiner.ops.sparse_attention.api import attend_scored
from sparsifiner.scorers import ListSpec, Origin, Scorer
from sparsifiner.tokens.policy import attend_with_policy
from sparsifiner.tokens.sizes import log_sizes, prefers_bias, weigh_by_size
from sparsifiner.tokens.state import TokenState


def attend_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: TokenState,
    lists: ListSpec | None,
    scorer: Scorer,
    scale: float,
    *,
    fused: bool = True,
    lists_wanted: bool = True,
) -> tuple[Tensor, Connectivity | None]:
    """Attends to the keys that the scorer lists, or to all.

    Args:
        q: [B, H, N, d] queries.
        k: [B, H, N, d] keys.
        v: [B, H, N, d] values.
        state: which tokens these are.
        lists: the lists wanted, None for dense attention.
        scorer: chooses the keys.
        scale: factor of the logits.
        fused: take fused kernels, which have no second derivatives.
        lists_wanted: whether the lists must be returned.

    Returns:
        [B, H, N, d], and the lists; None for dense attention, or where they are not wanted and were not made.
    """
    if lists is not None and not lists_wanted and fused and state.is_plain:
        attended = scorer.attend(q, k, v, lists)
        if attended is not None:
            return attended, None
    weighted, bias = (q, k, v), None
    if state.sizes is not None and lists is None and prefers_bias(q):
        bias = log_sizes(state.sizes, q.dtype)[:, None, None]
    elif state.sizes is not None:
        weighted = weigh_by_size(q, k, v, state.sizes, scale)
    connectivity = None
    if lists is not None:
        scored = weighted if scorer.TAKES_SIZES else (q, k, v)
        connectivity = scorer(*scored, _among(lists, state, q))
    summary = None if lists is None else lists.summary
    if state.policy is not None:
        return attend_with_policy(q, k, v, state.policy, scale, connectivity, summary), connectivity
    if lists is None or connectivity is None:
        out = dense_attention(*weighted, scale, bias, fused=fused)
    else:
        out = attend_scored(
            *weighted, connectivity, summary=summary, scale=scale, backend=lists.backend, fused=fused
        )
    return out[..., : q.shape[-1]], connectivity


def _among(lists: ListSpec, state: TokenState, q: Tensor) -> ListSpec:
    """The lists wanted, with what scorers must know of tokens that are gone."""
    if state.positions is not None:
        lists = replace(lists, origin=Origin(state.whole, state.tokens_of_image(q.shape[0], q.device)))
    if state.policy is not None:
        lists = replace(lists, present=state.policy > 0)
    return lists
