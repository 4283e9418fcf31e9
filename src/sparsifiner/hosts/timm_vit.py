"""timm's plain `VisionTransformer`: DeiT, AugReg, CLIP and SigLIP towers, DINOv2, DeiT III and more."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsifiner.attention import SparseAttention
from sparsifiner.blocks import TokenBlock, TokenBlocks
from sparsifiner.hosts.base import Host, Tell
from sparsifiner.standin import StandIn
from sparsifiner.tokens.state import TokenState


class TimmAttentionParts(StandIn):
    """What whoever takes the place of a timm `Attention` does around the heads, by its submodules."""

    # everything of timm's module that its forward uses, by the names that checkpoints know
    SHARED_MODULES = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")

    num_heads: int
    head_dim: int
    attn_dim: int
    scale: float
    fused_attn: bool
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Linear | None
    proj: nn.Linear
    proj_drop: nn.Dropout

    def stand_in_for(self, present: nn.Module) -> None:
        """See `StandIn.stand_in_for`; sizes are taken over, too."""
        for name in ("num_heads", "head_dim", "attn_dim", "scale", "fused_attn"):
            setattr(self, name, getattr(present, name))
        super().stand_in_for(present)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `SparseAttention.project`."""
        return split_heads(self, self.qkv(x))

    def combine(self, x: Tensor, out: Tensor) -> Tensor:
        """See `SparseAttention.combine`: norm, gate and output projection."""
        out = self.norm(out.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected

    def dropout(self) -> float:
        """See `SparseAttention.dropout`."""
        return self.attn_drop.p


class TimmSparseAttention(TimmAttentionParts, SparseAttention):
    """Takes the place of a timm `Attention` and attends sparsely."""


class TimmTokenBlock(TokenBlock):
    """Takes the place of a timm block, with norms before its branches or behind them, and drops tokens."""

    # everything of timm's block that its forward uses
    SHARED_MODULES = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")

    norm1: nn.Module
    attn: SparseAttention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def stand_in_for(self, present: nn.Module) -> None:
        """See `StandIn.stand_in_for`."""
        super().stand_in_for(present)
        self.normalises_after = isinstance(self._dense[0], ResPostBlock)

    def put_attention(self, attention: SparseAttention) -> None:
        """See `TokenBlock.put_attention`."""
        self.attn = attention

    @property
    def attention(self) -> SparseAttention:
        """See `TokenBlock.attention`."""
        return self.attn

    def attend(self, x: Tensor, state: TokenState) -> tuple[Tensor, Tensor, Tensor]:
        """See `TokenBlock.attend`."""
        out, q, k = self.attn(x if self.normalises_after else self.norm1(x), state=state)
        out = self.norm1(out) if self.normalises_after else self.ls1(out)
        return x + self.drop_path1(out), q, k

    def transform(self, x: Tensor) -> Tensor:
        """See `TokenBlock.transform`."""
        out: Tensor = self.mlp(x if self.normalises_after else self.norm2(x))
        out = self.norm2(out) if self.normalises_after else self.ls2(out)
        return x + cast("Tensor", self.drop_path2(out))


class TimmViT(Host):
    """A timm `VisionTransformer`."""

    FAMILY = "timm VisionTransformer"
    ATTENTION = "attn"
    ATTENTIONS = (Attention,)
    BLOCKS = (Block, ResPostBlock)
    SPARSE_ATTENTION = TimmSparseAttention
    TOKEN_BLOCK = TimmTokenBlock

    model: VisionTransformer

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        """See `Host.owns`."""
        return isinstance(model, VisionTransformer)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Host.blocks`."""
        blocks: Sequence[nn.Module] = self.model.blocks
        return blocks

    def put_blocks(self, blocks: TokenBlocks) -> None:
        """See `Host.put_blocks`."""
        self.model.blocks = blocks

    @property
    def prefix(self) -> int:
        """See `Host.prefix`."""
        return int(self.model.num_prefix_tokens)

    @property
    def has_class_token(self) -> bool:
        """See `Host.has_class_token`."""
        return bool(self.model.has_class_token)

    @property
    def width(self) -> int:
        """See `Host.width`."""
        return int(self.model.embed_dim)

    @property
    def num_classes(self) -> int:
        """See `Host.num_classes`."""
        return int(self.model.num_classes)

    @property
    def image_size(self) -> tuple[int, int]:
        """See `Host.image_size`."""
        height, width = self.model.patch_embed.img_size
        return int(height), int(width)

    @property
    def native_grid(self) -> tuple[int, int]:
        """See `Host.native_grid`."""
        height, width = self.model.patch_embed.grid_size
        return int(height), int(width)

    @property
    def takes_any_size(self) -> bool:
        """See `Host.takes_any_size`: `dynamic_img_size`."""
        return bool(self.model.dynamic_img_size)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Host.grid_of`."""
        height, width = self.model.patch_embed.dynamic_feat_size(size)
        return int(height), int(width)

    @property
    def embedding(self) -> nn.Module:
        """See `Host.embedding`."""
        embedding: nn.Module = self.model.patch_embed
        return embedding

    def embed(self, images: Tensor) -> Tensor:
        """See `Host.embed`."""
        patches: Tensor = self.model.patch_embed(images)
        return patches

    def features(self, images: Tensor) -> Tensor:
        """See `Host.features`."""
        features: Tensor = self.model.forward_features(images)
        return features

    def features_from(self, block: int, x: Tensor) -> Tensor:
        """See `Host.features_from`."""
        for each in self.blocks[block:]:
            x = each(x)
        normed: Tensor = self.model.norm(x)
        return normed

    @property
    def last_module(self) -> nn.Module:
        """See `Host.last_module`: an Identity in models that norm behind their pooling."""
        norm: nn.Module = self.model.norm
        return norm

    def logits(self, features: Tensor) -> Tensor:
        """See `Host.logits`."""
        logits: Tensor = self.model.forward_head(features)
        return logits

    def patch_tokens(self, features: Tensor, state: TokenState | None = None) -> Tensor:
        """See `Host.patch_tokens`."""
        tokens = super().patch_tokens(features, state)
        if isinstance(self.model.norm, nn.Identity):  # average pooling puts the final norm behind it
            tokens = self.model.fc_norm(tokens)
        return tokens

    def watch_projections(self, attention: Any, tell: Tell) -> RemovableHandle:
        """See `Host.watch_projections`."""

        def hook(module: nn.Module, args: Any, qkv: Tensor) -> None:
            with torch.no_grad():
                q, k, _ = split_heads(attention, qkv)
            tell(q, k)

        handle: RemovableHandle = attention.qkv.register_forward_hook(hook)
        return handle

    def why_not_masked(self) -> str:
        """See `Host.why_not_masked`."""
        if self.model.attn_pool is None and self.model.global_pool in {"token", "avg"}:
            return ""
        return f"its head (global_pool={self.model.global_pool!r}) would look at all of them"

    def masked(self, features: Tensor, policy: Tensor) -> Tensor:
        """See `Host.masked`: a mean of all tokens becomes one of those that stay."""
        if self.model.global_pool != "avg":
            return features
        counted = policy if self.model.pool_include_prefix else policy[:, self.prefix :]
        mean_of_staying = counted.shape[1] / counted.sum(1, keepdim=True).clamp(min=1.0)
        return features * (policy * mean_of_staying)[:, :, None]

    def why_no_size(self) -> str:
        """See `Host.why_no_size`."""
        embed = self.model.patch_embed
        sizes, patches = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
        if self.takes_any_size or not sizes or not patches:
            return ""
        for size, patch in zip(sizes, patches, strict=True):
            if size % patch:
                below = size // patch * patch
                nearest = f"{below} or {below + patch}" if below else f"{below + patch}"
                return f"img_size={size} is not a multiple of the patch size {patch}; use {nearest}"
        return ""

    def resampled(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Host.resampled`."""
        fitted = checkpoint_filter_fn(dict(state), self.model)
        # of names it drops some; what does not belong to the model is for others to say
        return {**state, **{key: fitted[key] for key in state if key in fitted}}

    def why_no_model(self) -> list[str]:
        """See `Host.why_no_model`."""
        if getattr(self.model.patch_embed, "grid_size", None) is None:
            return [f"{type(self.model.patch_embed).__name__} has no patch grid (grid_size)"]
        return []


def split_heads(attention: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projected tokens [B, N, 3 * H * d] to q, k, v [B, H, N, d], q and k normalised as the model does."""
    B, N, _ = qkv.shape
    heads = qkv.reshape(B, N, 3, attention.num_heads, attention.head_dim)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if q.dtype != v.dtype or k.dtype != v.dtype:  # under autocast norms return fp32
        q, k = q.to(v.dtype), k.to(v.dtype)
    return q, k, v
