"""Blocks that pass on which tokens are left."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from sparsifiner.attention import SparseAttention
from sparsifiner.standin import StandIn
from sparsifiner.tokens.method import TokenMethod
from sparsifiner.tokens.reducer import TokenReducer
from sparsifiner.tokens.state import TokenState


class TokenBlock(StandIn):
    """Takes the place of a model's block, built from its submodules, and drops or merges tokens.

    A host's subclass says what the block of its family does around attention and MLP: `attend`, `transform`.

    Args:
        present: the block, or another that stands in for it.
        attention: tells queries and keys, besides attending.
        reducer: what happens to the tokens, None for nothing.
    """

    def __init__(self, present: nn.Module, attention: SparseAttention, reducer: TokenReducer | None) -> None:
        super().__init__()
        self.stand_in_for(present)
        self.put_attention(attention)
        self.reducer = reducer

    @abstractmethod
    def put_attention(self, attention: SparseAttention) -> None:
        """Gives the block its attention, under the name that checkpoints know."""

    @property
    @abstractmethod
    def attention(self) -> SparseAttention:
        """The block's attention."""

    @abstractmethod
    def attend(self, x: Tensor, state: TokenState) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N, C] behind the branch of attention, and its q and k [B, H, N, d]."""

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] behind the branch of the MLP."""

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
            attn_mask: None; models give masks to blocks one by one.
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
        x, q, k = self.attend(x, state)
        if self.reducer is not None:
            x, state = self.reducer.after_attention(x, q, k, self.attention.scale, state)
        del q, k  # the MLP needs their memory
        return self.transform(x), state


class TokenBlocks(StandIn, nn.Sequential):
    """Takes the place of a model's blocks, with the same children, and starts the state of each call.

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
        first = blocks[0].attention
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
