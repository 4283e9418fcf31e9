"""The layer: tokens -> q, k, v -> scores -> key lists -> sparse attention -> tokens."""

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsifiner.config import SparsifyConfig
from sparsifiner.eager import is_plain
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout
from sparsifiner.plan import Call, backend_of, batch_class, keep_at, lists_at, plan
from sparsifiner.scorers import ListSpec, Place, Scorer, SharedLists
from sparsifiner.scorers.base import attending_arguments
from sparsifiner.scorers.options import ScorerOptions
from sparsifiner.standin import StandIn, is_proxy, leaf_node
from sparsifiner.tokens.attending import attend_tokens
from sparsifiner.tokens.state import TokenState

# image sizes that are remembered
_REMEMBERED = 1024


class GridOfCall(Protocol):
    """Tells the patch grid of the input being computed, for all layers of a model."""

    @property
    def model(self) -> nn.Module:
        """The whole model."""

    def current(self) -> tuple[int, int]:
        """Patches along height and width.

        Raises:
            ValueError: they cannot be told of this call.
        """

    def computes_again(self) -> bool:
        """Whether layers are computed a second time for gradients (gradient checkpointing)."""

    def remove(self) -> None:
        """Takes away what was put on the model to know its grid."""


class SparseAttention(StandIn):
    """Takes the place of a model's attention module, built from its submodules, and attends sparsely.

    A host's subclass says how a module of its family is taken apart: `project`, `combine` and what they need.

    Args:
        dense: the module that it replaces; its submodules are shared, not copied.
        scorer: chooses the keys.
        grid: tells the patch grid of the current input.
        place: which layer it is.
        config: what to do.

    Attributes:
        num_heads: H.
        head_dim: d.
        scale: factor of the logits.
        fused_attn: take fused kernels, which have no second derivatives.
        lists: where the layers behind find the lists of this one, if they share them, else None.
    """

    fused_attn = True

    def __init__(
        self, dense: nn.Module, scorer: Scorer, grid: GridOfCall, place: Place, config: SparsifyConfig
    ) -> None:
        super().__init__()
        self.stand_in_for(dense)
        self.scorer = scorer
        self.lists: SharedLists | None = None
        self.grid = grid
        self.configure(config, place)

    def configure(self, config: SparsifyConfig, place: Place) -> None:
        """Changes what the layer does and which of the model's layers it is; its weights stay."""
        self.config = config
        self.place = place
        self.num_heads, self.head_dim, self.scale = place.num_heads, place.head_dim, place.scale
        self.scorer.configure(config.scorer)
        self.scorer.place_at(place.index)
        # two attributes: compilers can make variables of numbers, not of a tuple
        self._keep_numerator, self._keep_denominator = keep_at(Call(place.native), config, place)

    @property
    def keep(self) -> tuple[int, int]:
        """Share of the keys that the layer lists at the native image size, as an `exact_ratio`."""
        return self._keep_numerator, self._keep_denominator

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        state: TokenState | None = None,
        **given: Any,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Attends: [B, N, C] to [B, N, C].

        Args:
            x: tokens.
            attn_mask: None; masks are not supported.
            is_causal: False.
            state: which tokens these are, given by blocks that drop tokens; None for all of the image.
            **given: what else the model's blocks give to its attention.

        Returns:
            The tokens; with a state also q and k, [B, H, N, d].

        Raises:
            ValueError: a mask or causality is asked for, attention dropout is active, lists are shared while
                the model's gradient checkpointing is on, or the tokens do not fit the grid.
            RuntimeError: TorchScript is tracing.
        """
        if is_proxy(x):
            return leaf_node(self, x, attn_mask=attn_mask, is_causal=is_causal, **given)
        self._check_call(attn_mask, is_causal)
        q, k, v = self.project(x, **given)
        at_once = self.attend_at_once(q, k, v) if state is None else None
        if at_once is not None:
            return self.combine(x, at_once)
        tokens = state or self.current_tokens(x.shape[1])
        lists = self.plan(q, tokens)
        out, connectivity = attend_tokens(
            *(q, k, v, tokens, lists, self.scorer, self.scale),
            fused=self.fused_attn,
            lists_wanted=self.lists is not None,
        )
        if self.lists is not None and connectivity is not None:
            self.lists.put(connectivity)
        combined = self.combine(x, out)
        return combined if state is None else (combined, q, k)

    @abstractmethod
    def project(self, *x: Any, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N, C] to q, k, v [B, H, N, d] as attention sees them: norms and biases applied."""

    @abstractmethod
    def combine(self, x: Tensor, out: Tensor) -> Tensor:
        """Heads [B, H, N, d] to the module's output [B, N, C]; `x` is what the module got."""

    @abstractmethod
    def dropout(self) -> float:
        """Probability with which attention is dropped in training."""

    def attend_at_once(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """Attention by one kernel call, where nobody follows the tensors or asks for lists, else None.

        All that it depends on is looked up at once: this is the path of inference, whose host time counts.

        Args:
            q: [B, H, N, d] queries of all tokens of the image.
            k: [B, H, N, d] keys.
            v: [B, H, N, d] values.

        Returns:
            [B, H, N, d].
        """
        scorer = self.scorer
        if scorer.ATTENDING is None or self.lists is not None or not self.fused_attn or not is_plain(q, k, v):
            return None
        if scorer._forward_hooks or scorer._forward_pre_hooks:
            return None
        kind = (self.grid.current(), q.shape, q.dtype, q.device)
        call = _call_at_once(scorer.options, self.config, self.place, *kind)
        return None if call is None else call[0](q, k, v, *call[1])

    def plan(self, q: Tensor, tokens: TokenState) -> ListSpec | None:
        """The lists wanted for queries [B, H, N, d], or None where this layer is dense attention."""
        call = Call.of(q, tokens.layout, None if tokens.positions is None else tokens.whole)
        if not call.compiled:
            return plan(call, self.config, self.place)
        keep = self.keep
        if self.config.tokens is not None and tokens.whole.patches != self.place.native.patches:
            keep = _constant_keep(tokens.whole.patches, tokens.whole.prefix, self.config, self.place)
        return lists_at(call, self.config, keep, self.scale)

    def current_tokens(self, tokens: int) -> TokenState:
        """The tokens of the current input, all of them.

        Raises:
            ValueError: their number does not fit the grid.
        """
        whole = _all_tokens.__wrapped__ if torch.compiler.is_compiling() else _all_tokens
        state = whole(self.grid.current(), self.place.native.prefix)
        layout = state.whole
        if tokens != layout.tokens:
            height, width = layout.grid
            raise ValueError(
                f"layer {self.place.index}: got {tokens} tokens, but the grid is {height}x{width} patches "
                f"after {layout.prefix} prefix tokens = {layout.tokens}; call model.set_input_size(...) for "
                "another image size, and switch patch_drop off (sparse attention needs every patch)"
            )
        return state

    def current_layout(self, tokens: int) -> TokenLayout:
        """Where the tokens of the current input lie, see `current_tokens`."""
        return self.current_tokens(tokens).whole

    @property
    def backend(self) -> str:
        """Backend of both operations."""
        return backend_of(self.config)

    def extra_repr(self) -> str:
        """Configuration in short."""
        keep, config = self.keep[0] / self.keep[1], self.config
        return f"keep={keep:.4g}, tile={config.tile}, summary={config.summary}, backend={self.backend!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        rename_released_keys(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_call(self, attn_mask: Tensor | None, is_causal: bool) -> None:
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "torch.jit.trace: TorchScript is not supported by sparse models; use torch.export.export or "
                "torch.compile, or call sparsifiner.desparsify(model) first"
            )
        if attn_mask is not None or is_causal:
            argument = "is_causal" if is_causal else "attn_mask"
            raise ValueError(
                f"layer {self.place.index}: {argument} is not supported, keys are chosen per image; "
                "call sparsifiner.desparsify(model) to use it"
            )
        if self.training and self.dropout() > 0:
            raise ValueError(
                f"layer {self.place.index}: attn_drop={self.dropout()} is not supported in training; "
                "create the model with attn_drop_rate=0"
            )
        if self.config.share > 1 and self.grid.computes_again():
            raise ValueError(
                f"share={self.config.share} and gradient checkpointing, which computes later layers again "
                "first, do not go together; call sparsifiner.sparsify(model, share=1), or "
                "model.set_grad_checkpointing(False)"
            )


@functools.lru_cache(_REMEMBERED)
def _all_tokens(grid: tuple[int, int], prefix: int) -> TokenState:
    """One value for all layers: what plans are looked up by is then hashed once."""
    return TokenState(TokenLayout(grid, prefix))


@functools.lru_cache(_REMEMBERED)
def _call_at_once(
    options: ScorerOptions,
    config: SparsifyConfig,
    place: Place,
    grid: tuple[int, int],
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Callable[..., Tensor], tuple[Any, ...]] | None:
    """The kernel of `Scorer.ATTENDING` and what it takes behind q, k and v; None where lists are needed.

    Args:
        options: of the layer's scorer.
        config: of the layer.
        place: of the layer.
        grid: patches along height and width.
        shape: [B, H, N, d] of q, k and v.
        dtype: of q, k and v.
        device: where they are.
    """
    B, H, N, d = shape
    layout = TokenLayout(grid, place.native.prefix)
    spec = plan(Call(layout, None, H, d, device.type, dtype, batch_class(B)), config, place)
    if spec is None or layout.tokens != N:
        return None
    scorer: Any = options.scorer_class()
    arguments = attending_arguments(scorer, options, spec, dtype, device, B * H, d)
    if arguments is None:
        return None
    operator, *sizes, backend = arguments
    return operator.kernel(backend), tuple(sizes)


def dense_connectivity(batch: int, heads: int, layout: Layout, tile: int, like: Tensor) -> Connectivity:
    """Lists of all keys: what a layer that stays dense attends to."""
    every = torch.arange(layout.tokens, dtype=torch.int32, device=like.device)
    lists = every.expand(batch, heads, layout.squares(tile), -1)
    return Connectivity.over(layout, lists, tile, check=False)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_keep(patches: int, prefix: int, config: SparsifyConfig, place: Place) -> tuple[int, int]:
    # what it depends on are arguments: a graph is made anew where one of them differs
    return keep_at(Call(TokenLayout((patches, 1), prefix)), config, place)


def rename_released_keys(module: SparseAttention, state_dict: dict[str, Any], prefix: str) -> None:
    """Lets released checkpoints load: their predictor is our scorer under other names."""
    old_prefix = prefix + "mask_predictor."
    names = getattr(module.scorer, "RELEASED_NAMES", ())
    for key in [key for key in state_dict if key.startswith(old_prefix)]:
        name = key.removeprefix(old_prefix)
        for old, new in names:
            if name.partition(".")[0] == old:
                state_dict[prefix + "scorer." + name.replace(old, new, 1)] = state_dict.pop(key)
