"""Linformer: attention to learned mixtures of all keys, a peer to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.hosts import host_of
from sparsifiner.hosts.timm_vit import TimmAttentionParts
from sparsifiner.ops.dense import dense_attention
from sparsifiner.ratios import exact_ratio


class LinformerAttention(TimmAttentionParts):
    """Takes the place of a timm `Attention`, built from its submodules.

    ```
    k', v' = E_kᵀ k, E_vᵀ v over the patches              [B, H, K, d]
    out    = softmax(q [k_prefix; k']ᵀ · scale) [v_prefix; v']
    ```

    The mixtures begin as means of K groups of neighbouring patches, so that training starts from something
    that a dense model's weights can use; prefix tokens keep keys of their own.

    Args:
        dense: the module that it replaces; its submodules are shared.
        layout: the tokens; the mixtures are tied to them.
        size: K, mixtures of keys.

    Source:
        Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, with projections shared by the
        heads of a layer.
    """

    def __init__(self, dense: nn.Module, layout: TokenLayout, size: int) -> None:
        super().__init__()
        self.stand_in_for(dense)
        self.prefix = layout.prefix
        weight = self.qkv.weight
        means = _group_means(layout, size).to(device=weight.device, dtype=weight.dtype)
        self.key_mixture = nn.Parameter(means.clone())
        self.value_mixture = nn.Parameter(means.clone())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attends: [B, N, C] to [B, N, C].

        Raises:
            ValueError: a mask or causality is asked for, or there are more or fewer patches.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("Linformer mixes all keys: attn_mask and is_causal are not supported")
        patches = x.shape[1] - self.prefix
        if patches != len(self.key_mixture):
            raise ValueError(
                f"Linformer was made for {len(self.key_mixture)} patches, got {patches}; make one for these"
            )
        q, k, v = self.project(x)
        k = torch.cat([k[:, :, : self.prefix], self.key_mixture.to(k.dtype).mT @ k[:, :, self.prefix :]], 2)
        v = torch.cat([v[:, :, : self.prefix], self.value_mixture.to(v.dtype).mT @ v[:, :, self.prefix :]], 2)
        out = dense_attention(q, k, v, self.scale, fused=self.fused_attn)
        return self.combine(x, out)

    def macs(self, layout: TokenLayout) -> tuple[int, int, int]:
        """MACs of attention and of the mixtures per image, and the keys of a query."""
        keys = self.prefix + self.key_mixture.shape[1]
        attention = 2 * self.num_heads * self.head_dim * layout.tokens * keys
        mixing = 2 * self.num_heads * self.head_dim * layout.patches * self.key_mixture.shape[1]
        return attention, mixing, keys

    def extra_repr(self) -> str:
        """Sizes."""
        patches, size = self.key_mixture.shape
        return f"patches={patches}, size={size}"


def linformer(model: nn.Module, keep: float) -> nn.Module:
    """Gives a dense model Linformer attention, in place, with `ceil(keep · N)` keys for every query.

    Args:
        model: a plain timm Vision Transformer.
        keep: keys of a query as a share of the tokens, prefix tokens included.

    Raises:
        ValueError: that leaves no mixture.
    """
    host = host_of(model)
    layout = host.native
    numerator, denominator = exact_ratio(keep)
    size = -(-numerator * layout.tokens // denominator) - layout.prefix
    if not 1 <= size <= layout.patches:
        raise ValueError(f"keep={keep} leaves {size} mixtures of {layout.patches} patches; raise it")
    for block in host.blocks:
        host.put_attention(block, LinformerAttention(host.attention_of(block), layout, size))
    return model


def _group_means(layout: TokenLayout, size: int) -> Tensor:
    """[patches, size], weights of the means of groups of neighbours along the rows of the grid's squares."""
    # squares of about the right number first, so that a group is compact; then runs of equal length
    side = max(1, round((layout.patches / size) ** 0.5))
    order = layout.square_tokens(side, torch.device("cpu")).flatten()
    order = order[order >= 0] - layout.prefix
    group = torch.empty(layout.patches, dtype=torch.long)
    group[order] = torch.arange(layout.patches) * size // layout.patches
    member = F.one_hot(group, size).float()
    return member / member.sum(0)
