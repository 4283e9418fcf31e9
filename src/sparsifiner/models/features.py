"""What a Vision Transformer gives besides its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sparsifiner.tokens import TokenState
from sparsifiner.tokens.blocks import TokenBlock
from sparsifiner.tokens.state import take_tokens


def patch_tokens(model: VisionTransformer, features: Tensor, state: TokenState | None = None) -> Tensor:
    """Patch tokens behind the final norm: what a detection or segmentation head would see.

    Args:
        model: the model.
        features: [B, N, C], what `model.forward_features` gave.
        state: which tokens these are, None for all.

    Returns:
        [B, patches, C], those that are left.
    """
    tokens = features[:, model.num_prefix_tokens if state is None else state.prefix :]
    if isinstance(model.norm, nn.Identity):  # average pooling puts the final norm behind it
        tokens = model.fc_norm(tokens)
    return tokens


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
