"""Blocks that pass on which tokens are left."""

from collections.abc import Sequence
from typing import Any, cast

from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from sparsifiner.attention import SparseAttention
from sparsifiner.tokens.method import TokenMethod, TokenReducer
from sparsifiner.tokens.state import TokenState

# everything of timm's block that its forward uses
SHARED_BLOCK_MODULES = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


class TokenBlock(nn.Module):
    """Takes the place of a timm block, built from its submodules, and drops or merges tokens.

    Args:
        dense: the block; its attention is a `SparseAttention`, which tells queries and keys.
        reducer: what happens to the tokens, None for nothing.
    """

    norm1: nn.Module
    attn: SparseAttention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, dense: Block | ResPostBlock, reducer: TokenReducer | None) -> None:
        super().__init__()
        for name in SHARED_BLOCK_MODULES:
            if hasattr(dense, name):
                setattr(self, name, getattr(dense, name))
        self.normalises_after = isinstance(dense, ResPostBlock)
        self.reducer = reducer
        self._dense = (dense,)  # in a tuple: not a child, its weights are this module's already
        self.training = dense.training

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
                "forward_intermediates and attention masks do: call model.set_grad_checkpointing(False) and "
                "the whole model without a mask, or "
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

    def dense_block(self) -> Block | ResPostBlock:
        """The block that this one replaced, with the submodules of now."""
        dense = self._dense[0]
        for name in SHARED_BLOCK_MODULES:
            if hasattr(self, name):
                setattr(dense, name, getattr(self, name))
        dense.training = self.training
        return dense


class TokenBlocks(nn.Sequential):
    """Takes the place of a timm model's blocks, with the same children, and starts the state of each call.

    Args:
        dense: the blocks that it replaces.
        blocks: one for each of them.
        method: what they do.
    """

    def __init__(self, dense: nn.Sequential, blocks: Sequence[TokenBlock], method: TokenMethod) -> None:
        super().__init__(*blocks)
        self.method = method
        self._dense = (dense,)  # in a tuple: not a child
        self.training = dense.training

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
        return TokenBlocks(nn.Sequential(*(block.dense_block() for block in blocks)), blocks, self.method)

    def dense_blocks(self) -> nn.Sequential:
        """The blocks that these replaced, with the submodules of now."""
        dense = self._dense[0]
        for index, block in enumerate(self):
            dense[index] = cast("TokenBlock", block).dense_block()
        dense.training = self.training
        return dense
