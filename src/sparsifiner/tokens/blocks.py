"""Blocks that pass on which tokens are left."""

from collections.abc import Sequence
from typing import Any, cast

from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from sparsifiner.attention import SparseAttention
from sparsifiner.standin import StandIn
from sparsifiner.tokens.method import TokenMethod, TokenReducer
from sparsifiner.tokens.state import TokenState

# everything of timm's block that its forward uses
SHARED_BLOCK_MODULES = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


class TokenBlock(StandIn):
    """Takes the place of a timm block, built from its submodules, and drops or merges tokens.

    Args:
        present: the block, or another that stands in for it.
        attention: tells queries and keys, besides attending.
        reducer: what happens to the tokens, None for nothing.
    """

    SHARED_MODULES = SHARED_BLOCK_MODULES

    norm1: nn.Module
    attn: SparseAttention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(
        self,
        present: "Block | ResPostBlock | TokenBlock",
        attention: SparseAttention,
        reducer: TokenReducer | None,
    ) -> None:
        super().__init__()
        self.stand_in_for(present)
        self.attn = attention
        self.normalises_after = isinstance(self._dense[0], ResPostBlock)
        self.reducer = reducer

    def forward(
        self,
        x: Tensor,
        state: TokenState | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, TokenState]:
        """Tokens [B, N, C] and which they are, before and behind the block.

        Args:
            x: tokens.
            state: which they are.
            attn_mask: None; timm gives masks to blocks one by one.
            is_causal: False.

        Raises:
            ValueError: there is no state: somebody calls the blocks one by one.
        """
        if state is None:
            raise ValueError(
                "blocks with token sparsity cannot be called one by one, as gradient checkpointing, "
                "forward_intermediates, torch.fx and attention masks do: call "
                "model.set_grad_checkpointing(False) and the whole model without a mask, or "
                "sparsifiner.sparsify(model, tokens=None)"
            )
        if self.reducer is not None:
            x, state = self.reducer.before_attention(x, state)
        out, q, k = self.attn(x if self.normalises_after else self.norm1(x), state=state)
        out = self.norm1(out) if self.normalises_after else self.ls1(out)
        x = x + self.drop_path1(out)
        if self.reducer is not None:
            x, state = self.reducer.after_attention(x, q, k, self.attn.scale, state)
        del out, q, k  # the MLP needs their memory
        if self.normalises_after:
            return x + self.drop_path2(self.norm2(self.mlp(x))), state
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), state


class TokenBlocks(StandIn, nn.Sequential):
    """Takes the place of a timm model's blocks, with the same children, and starts the state of each call.

    Args:
        present: the blocks that it replaces, or those that stand in for them.
        blocks: one for each of them.
        method: what they do.
    """

    def __init__(self, present: nn.Sequential, blocks: Sequence[TokenBlock], method: TokenMethod) -> None:
        nn.Sequential.__init__(self, *blocks)
        self.stand_in_for(present)
        self.method = method
        self._planned = tuple(blocks)

    @property
    def is_as_planned(self) -> bool:
        """Whether no block was removed, replaced or moved, so that each does its part of the method."""
        return tuple(self) == self._planned

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] of the whole image to those that are left."""
        blocks = [cast("TokenBlock", block) for block in self]
        first = blocks[0].attn
        state = TokenState(first.current_layout(x.shape[1]), backend=first.backend)
        for block in blocks:
            x, state = block(x, state)
        return x

    def __getitem__(self, index: Any) -> Any:
        """A block, or some of them."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        blocks = [cast("TokenBlock", block) for block in self][index]
        part = TokenBlocks(nn.Sequential(), blocks, self.method)
        part._planned = self._planned
        return part

    def dense_module(self) -> nn.Module:
        """The blocks that these stand in for, with the submodules of now."""
        dense = super().dense_module()
        dense._modules.clear()
        for name, block in self.named_children():
            dense.add_module(name, block.dense_module() if isinstance(block, TokenBlock) else block)
        return dense
