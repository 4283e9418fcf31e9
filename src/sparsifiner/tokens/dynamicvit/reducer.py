"""A small network predicts which patches stay."""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsifiner.tokens.dynamicvit.options import Placement
from sparsifiner.tokens.method import Counts, share_of
from sparsifiner.tokens.reducer import TokenReducer
from sparsifiner.tokens.state import TokenState, take_tokens


def ratio_loss(blocks: Iterable[nn.Module], states: Iterable[TokenState]) -> Tensor:
    """How far the shares of drawn patches are from those wanted: squared, mean over stages and images.

    Args:
        blocks: the model's.
        states: what each of them left, in training.
    """
    errors = []
    for block, state in zip(blocks, states, strict=True):
        reducer = getattr(block, "reducer", None)
        if isinstance(reducer, PredictingReducer) and state.policy is not None:
            share = state.policy[:, state.prefix :].mean(1)
            errors.append((share - reducer.keep**reducer.stage).square().mean())
    return torch.stack(errors).mean()


class PredictingReducer(TokenReducer):
    """Drops the patches with the lowest predicted scores; while training it masks those that it draws.

    Args:
        keep: share of the patches that the first stage leaves.
        stage: the how-manieth stage this is, from 1.
        placement: where it acts.
        width: channels of a token.
    """

    def __init__(self, keep: float, stage: int, placement: Placement, width: int) -> None:
        super().__init__()
        self.keep = keep
        self.stage = stage
        self.placement = placement
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def before_attention(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """See `TokenReducer.before_attention`."""
        return self._reduce(x, state) if self.placement == "before attention" else (x, state)

    def after_attention(
        self, x: Tensor, q: Tensor, k: Tensor, scale: float, state: TokenState
    ) -> tuple[Tensor, TokenState]:
        """See `TokenReducer.after_attention`."""
        return self._reduce(x, state) if self.placement == "after attention" else (x, state)

    def logits(self, patches: Tensor, policy: Tensor | None) -> Tensor:
        """Logits of staying and of going: [B, n, 2].

        Args:
            patches: [B, n, C].
            policy: [B, n], which of them are still there; None for all.
        """
        own, other = self.in_conv(patches).chunk(2, -1)
        if policy is None:
            mean = other.mean(1, keepdim=True)
        else:
            weight = policy[:, :, None]
            mean = (other * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1.0)
        logits: Tensor = self.out_conv(torch.cat([own, mean.expand_as(own)], -1))
        return logits

    def _reduce(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        prefix = state.prefix
        patches = x[:, prefix:]
        if self.training:
            before = torch.ones_like(patches[..., 0]) if state.policy is None else state.policy[:, prefix:]
            drawn = F.gumbel_softmax(self.logits(patches, before).float(), hard=True)[..., 0].to(x.dtype)
            policy = torch.cat([torch.ones_like(x[:, :prefix, 0]), drawn * before], 1)
            return x, replace(state, policy=policy)
        left = share_of(state.whole.patches, self.keep, self.stage)
        if left >= patches.shape[1]:
            return x, state
        stay, go = self.logits(patches, None).float().unbind(-1)
        chosen = state.best_patches(stay - go, left)
        return torch.cat([x[:, :prefix], take_tokens(patches, chosen)], 1), state.keep(chosen)

    def macs(self, counts: Counts, prefix: int, width: int, head_dim: int) -> int:
        """See `TokenReducer.macs`: the predictor's layers, on all patches that come in."""
        patches = counts.mlp - prefix + counts.gone
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return patches * sum(module.weight.numel() for module in linear)

    def extra_repr(self) -> str:
        """Options."""
        return f"keep={self.keep}, stage={self.stage}, placement={self.placement!r}"
