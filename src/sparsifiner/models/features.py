"""What a Vision Transformer gives besides its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparsifiner.blocks import TokenBlock
from sparsifiner.tokens import TokenState
from sparsifiner.tokens.state import take_tokens


def same_patches(tokens: Tensor, state: TokenState | None) -> Tensor:
    """Of patch tokens [B, patches, C] of a whole image those that are left in another model, in its order."""
    if state is None or state.positions is None:
        return tokens
    return take_tokens(tokens, state.positions)


@contextmanager
def token_states(model: nn.Module) -> Iterator[list[TokenState]]:
    """Records which tokens each block of the last forward left, while the context is open.

    Args:
        model: any model; one without token sparsity gives an empty list.
    """
    states: list[TokenState] = []
    blocks = [module for module in model.modules() if isinstance(module, TokenBlock)]

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if module is blocks[0]:
            states.clear()
        states.append(output[1])

    handles = [block.register_forward_hook(record) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
