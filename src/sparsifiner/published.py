"""The paper's own count of MACs, fitted to its tables: what they print, not what anything here computes.

Source: Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision
Transformers", CVPR 2023, tables 1 to 3. `python benchmarks/published.py` prints them beside our counts.
"""

from collections.abc import Sequence

from sparsifiner.attention import SparseAttention
from sparsifiner.hosts import Host
from sparsifiner.models.linformer import LinformerAttention
from sparsifiner.tokens import Counts, TokenMethod

# Predictor MACs of the whole model at 197 tokens, by (layers, heads, width): what the formulas below lack of
# the published rows. The predictor as released counts to 87.1 M for DeiT-S.
_PREDICTOR_MACS = {
    (12, 6, 384): 73.46e6,  # DeiT-S
    (16, 6, 384): 98.87e6,  # LV-ViT-S
    (20, 8, 512): 164.27e6,  # LV-ViT-M
}
_TOKENS = 197


def paper_mhsa(layers: int, heads: int, width: int, keep: tuple[int, int] | None) -> float | None:
    """QKᵀ, AV and predictor as the paper's tables count them, at 197 tokens.

    `L · 2 · width · ((N - 1) · k + N) + predictor` with `k = ceil(keep · N)`; dense
    `L · 2 · width · N²`.

    Args:
        layers: L.
        heads: number of heads.
        width: heads times head dim.
        keep: share of keys as an integer ratio, None for the dense model.

    Returns:
        MACs, or None for models that the tables do not have.
    """
    predictor = _PREDICTOR_MACS.get((layers, heads, width))
    if predictor is None:
        return None
    N = _TOKENS
    if keep is None:
        return float(layers * 2 * width * N * N)
    keys = -(-keep[0] * N // keep[1])
    return layers * 2 * width * ((N - 1) * keys + N) + predictor


def paper_mhsa_with_tokens(
    heads: int, width: int, tokens: Sequence[int], keep: tuple[int, int] | None
) -> float | None:
    """The same where tokens are dropped, for a model whose layers see 197 tokens at first.

    `Σ 2 · width · ((n - 1) · min(n, k) + n) + predictor · n / 197` with `k = ceil(keep · 196)`; dense
    `Σ 2 · width · n²`. It gives the published rows 193.1, 113.3 and 149.1 M of DeiT-S; 86.6, 256.0 and
    198.8 M follow from no count that we know.

    Args:
        heads: number of heads.
        width: heads times head dim.
        tokens: n, of each layer's attention.
        keep: share of keys as an integer ratio, None for dense attention.
    """
    predictor = _PREDICTOR_MACS.get((len(tokens), heads, width))
    if predictor is None:
        return None
    if keep is None:
        return float(sum(2 * width * n * n for n in tokens))
    keys = -(-keep[0] * (_TOKENS - 1) // keep[1])
    each = predictor / len(tokens) / _TOKENS
    return sum(2 * width * ((n - 1) * min(n, keys) + n) + each * n for n in tokens)


def paper_mhsa_of(host: Host, counts: Sequence[Counts], method: TokenMethod | None) -> float | None:
    """The same of a model, or None where the tables count no such method.

    Args:
        host: of the model.
        counts: tokens that each layer sees.
        method: how tokens are dropped, None for not at all.
    """
    attentions = host.attentions
    first = attentions[0]
    heads, head_dim = host.heads_of(first)
    shape = (heads, heads * head_dim)
    tokens = [count.attention for count in counts]
    if tokens[0] != _TOKENS or isinstance(first, LinformerAttention):
        return None
    keep = None
    if isinstance(first, SparseAttention):
        keeps = {attention.keep for attention in attentions}
        if keeps != {(1, 1)}:
            config = first.config
            is_counted = config.scorer.COUNTED_IN_PAPER
            if (is_counted, config.tile, config.summary, config.share) != (True, 1, None, 1):
                return None
            if tokens[0] < config.min_tokens or len(keeps) > 1:
                return None
            keep = keeps.pop()
        elif (
            method is None and first.config.scorer.COUNTED_IN_PAPER
        ):  # the tables count the predictor here too
            keep = (1, 1)
    if method is not None:
        return paper_mhsa_with_tokens(*shape, tokens, keep)
    return paper_mhsa(len(attentions), *shape, keep=keep)
