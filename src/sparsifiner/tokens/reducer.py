"""What a token method adds to a block."""

from torch import Tensor, nn

from sparsifiner.tokens.method import Counts
from sparsifiner.tokens.state import TokenState


class TokenReducer(nn.Module):
    """Drops or merges the tokens of one block; in its place in the block, or nowhere."""

    def before_attention(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Tokens [B, N, C] to those that the block's attention sees."""
        return x, state

    def after_attention(
        self, x: Tensor, q: Tensor, k: Tensor, scale: float, state: TokenState
    ) -> tuple[Tensor, TokenState]:
        """Tokens [B, N, C] behind the attention to those that the block's MLP sees.

        Args:
            x: the residual stream.
            q: [B, H, N, d] queries of the block's attention.
            k: [B, H, N, d] keys.
            scale: factor of its logits.
            state: which tokens these are.
        """
        return x, state

    def macs(self, counts: Counts, prefix: int, width: int, head_dim: int) -> int:
        """Multiply-accumulates per image of choosing, where some tokens go.

        Args:
            counts: tokens of the block.
            prefix: prefix tokens, without fused ones.
            width: channels of a token.
            head_dim: d.
        """
        return 0
