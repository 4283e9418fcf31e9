"""The layer: tokens -> q, k, v -> scores -> key lists -> sparse attention -> tokens."""

import threading
from dataclasses import replace
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsifiner.config import SparsifyConfig
from sparsifiner.geometry.connectivity import Connectivity, exact_ratio, forced_prefix, key_budget
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout
from sparsifiner.ops.dense import dense_attention
from sparsifiner.ops.sparse_attention.api import attend_scored
from sparsifiner.scorers import ListSpec, Origin, Scorer, SharedLists
from sparsifiner.standin import StandIn, is_proxy, leaf_node
from sparsifiner.tokens.policy import attend_with_policy
from sparsifiner.tokens.sizes import log_sizes, prefers_bias, weigh_by_size
from sparsifiner.tokens.state import TokenState

# everything of timm's module that its forward uses, by the names that checkpoints know
SHARED_MODULES = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


class SparseAttention(StandIn):
    """Takes the place of a timm `Attention`, built from its submodules, and attends sparsely.

    Args:
        dense: the module that it replaces; its submodules are shared, not copied.
        scorer: chooses the keys.
        grid: tells the patch grid of the current input.
        prefix: number of prefix tokens.
        layer: index of the layer.
        depth: number of layers of the model.
        config: what to do.

    Attributes:
        lists: where the layers behind find the lists of this one, if they share them, else None.
    """

    SHARED_MODULES = SHARED_MODULES

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
    scorer: Scorer

    def __init__(
        self,
        dense: Attention,
        scorer: Scorer,
        grid: "CurrentGrid",
        prefix: int,
        layer: int,
        depth: int,
        config: SparsifyConfig,
    ) -> None:
        super().__init__()
        take_over(self, dense)
        self.scorer = scorer
        self.lists: SharedLists | None = None
        self.grid = grid
        self.prefix = prefix
        self.configure(config, layer, depth)

    def configure(self, config: SparsifyConfig, layer: int, depth: int) -> None:
        """Changes what the layer does and which of the model's layers it is; its weights stay."""
        self.config = config
        self.layer = layer
        self.depth = depth
        self.scorer.configure(config)
        self.scorer.place_at(layer)
        height, width = self.grid.native()
        self._configured_patches = height * width
        self.keep = self._keep_at(self._configured_patches)

    @property
    def keep(self) -> tuple[int, int]:
        """Share of the keys that the layer lists at the native image size, as an `exact_ratio`."""
        # two attributes: compilers can make variables of numbers, not of a tuple
        return self._keep_numerator, self._keep_denominator

    @keep.setter
    def keep(self, keep: tuple[int, int]) -> None:
        self._keep_numerator, self._keep_denominator = keep

    def _keep_at(self, patches: int) -> tuple[int, int]:
        """Share of the keys that the layer lists, in images of so many patches."""
        keep: tuple[int, int] = _keep_of(self.config, self.layer, self.depth, patches, self.prefix)
        return keep

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        state: TokenState | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Attends: [B, N, C] to [B, N, C].

        Args:
            x: tokens.
            attn_mask: None; masks are not supported.
            is_causal: False.
            state: which tokens these are, given by blocks that drop tokens; None for all of the image.

        Returns:
            The tokens; with a state also q and k, [B, H, N, d].

        Raises:
            ValueError: a mask or causality is asked for, attention dropout is active, lists are shared while
                the model's gradient checkpointing is on, or the tokens do not fit the grid.
            RuntimeError: TorchScript is tracing.
        """
        if is_proxy(x):
            return leaf_node(self, x, attn_mask=attn_mask, is_causal=is_causal)
        self._check_call(attn_mask, is_causal)
        q, k, v = self.project(x)
        if state is None:
            return self.combine(x, self._attend(q, k, v, TokenState(self.current_layout(x.shape[1]))))
        return self.combine(x, self._attend(q, k, v, state)), q, k

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: TokenState) -> Tensor:
        """Attention of q, k, v [B, H, N, d] to the keys that the scorer lists."""
        spec = self.list_spec(state.layout, None if state.positions is None else state.whole)
        sized, bias = (q, k, v), None
        if state.sizes is not None and spec is None and prefers_bias(q):
            bias = log_sizes(state.sizes, q.dtype)[:, None, None]
        elif state.sizes is not None:
            sized = weigh_by_size(q, k, v, state.sizes, self.scale)
        connectivity = None
        if spec is not None:
            if state.positions is not None:
                spec = replace(spec, origin=Origin(state.whole, state.tokens_of_image(q.shape[0], q.device)))
            if state.policy is not None:
                spec = replace(spec, present=state.policy > 0)
            connectivity = self.scorer(*(sized if self.scorer.TAKES_SIZES else (q, k, v)), spec)
            if self.lists is not None:
                self.lists.put(connectivity)
        summary = None if spec is None else spec.summary
        if state.policy is not None:
            return attend_with_policy(q, k, v, state.policy, self.scale, connectivity, summary)
        if connectivity is None:
            out = dense_attention(*sized, self.scale, bias, fused=self.fused_attn)
        else:
            out = attend_scored(
                *sized, connectivity, summary, self.scale, self.backend, fused=self.fused_attn
            )
        return out[..., : q.shape[-1]]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N, C] to q, k, v [B, H, N, d], q and k normalised where the model does so."""
        return split_heads(self, self.qkv(x))

    def combine(self, x: Tensor, out: Tensor) -> Tensor:
        """Heads [B, H, N, d] to tokens [B, N, C]: norm, gate and output projection."""
        return merge_heads(self, x, out)

    def current_layout(self, tokens: int) -> TokenLayout:
        """Where the tokens of the current input lie.

        Raises:
            ValueError: the number of tokens does not fit the grid.
        """
        layout = TokenLayout(self.grid.current(), self.prefix)
        if tokens != layout.tokens:
            height, width = layout.grid
            raise ValueError(
                f"layer {self.layer}: got {tokens} tokens, but the grid is {height}x{width} patches after "
                f"{self.prefix} prefix tokens = {layout.tokens}; call model.set_input_size(...) for another "
                "image size, and switch patch_drop off (sparse attention needs every patch)"
            )
        return layout

    def list_spec(self, layout: Layout, whole: Layout | None = None) -> ListSpec | None:
        """The lists wanted, or None where this layer stays dense.

        A layer is dense attention where its lists and summaries would be no shorter than all keys, and below
        `min_tokens`.

        Args:
            layout: where the tokens lie.
            whole: where all tokens of the image lie, if some were dropped: lists are as long as for all of
                them.
        """
        config = self.config
        whole = whole or layout
        keep = self.keep
        if config.tokens is not None and whole.patches != self._configured_patches:
            keep = self._keep_at(whole.patches)  # how many queries each layer has depends on the image size
        forced = forced_prefix(layout.prefix, config.tile, config.summary)
        budget = min(layout.tokens, _key_budget(keep, whole.tokens, forced))
        summary = layout.auto_summary() if config.summary == "auto" else config.summary
        visits = budget + (0 if summary is None else layout.squares(summary))
        if layout.tokens < config.min_tokens or visits >= layout.tokens:
            return None
        return ListSpec(layout, config.tile, budget, forced, self.scale, self.backend, summary)

    @property
    def backend(self) -> str:
        """Backend of both operations."""
        return "reference" if self.config.legacy else self.config.backend

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
                f"layer {self.layer}: {argument} is not supported, keys are chosen per image; "
                "call sparsifiner.desparsify(model) to use it"
            )
        if self.training and self.attn_drop.p > 0:
            raise ValueError(
                f"layer {self.layer}: attn_drop={self.attn_drop.p} is not supported in training; "
                "create the model with attn_drop_rate=0"
            )
        if self.config.share > 1 and self.grid.model.grad_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                f"share={self.config.share} and gradient checkpointing, which computes later layers again "
                "first, do not go together; call sparsifiner.sparsify(model, share=1), or "
                "model.set_grad_checkpointing(False)"
            )


class CurrentGrid:
    """The patch grid of the input being computed, shared by all layers of a model.

    It is `patch_embed.grid_size` at each forward; where images may change size from call to call
    (`dynamic_img_size`), a hook on `patch_embed` notes the size of this thread's call, once it is attached.

    Args:
        model: the whole model.
    """

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model
        self._call = threading.local()
        self._hook: RemovableHandle | None = None

    def current(self) -> tuple[int, int]:
        """Patches along height and width.

        Raises:
            ValueError: the model's gradient checkpointing would compute layers again after the grid of
                another call was noted.
        """
        model = self.model
        if model.dynamic_img_size and model.grad_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "dynamic_img_size and gradient checkpointing do not go together in a sparse model; create it "
                "with dynamic_img_size=False, or call model.set_grad_checkpointing(False)"
            )
        if model.dynamic_img_size and hasattr(self._call, "grid"):
            grid: tuple[int, int] = self._call.grid
            return grid
        return self.native()

    def native(self) -> tuple[int, int]:
        """Patches along height and width at the size that the model is made for."""
        height, width = self.model.patch_embed.grid_size
        return int(height), int(width)

    def attach(self) -> None:
        """Puts the hook on the patch embedding that the model has now, if it needs one."""
        self.remove()
        if self.model.dynamic_img_size:
            self._hook = self.model.patch_embed.register_forward_hook(self._hear)

    def remove(self) -> None:
        """Takes the hook away."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def note(self, embedded: Tensor) -> Tensor:
        """Notes the grid of embedded patches [B, gh, gw, C], and gives them back."""
        self._call.grid = (embedded.shape[1], embedded.shape[2])
        return embedded

    def _hear(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        if is_proxy(output):  # the size is that of each call of the graph, of which this makes a node
            traced: Any = output
            return traced.tracer.create_proxy("call_function", self.note, (output,), {})
        return self.note(output)

    def __getstate__(self) -> dict[str, Any]:
        """All but the thread-local note, which neither copies nor pickles."""
        return {name: value for name, value in self.__dict__.items() if name != "_call"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state with no call noted."""
        self.__dict__.update(state)
        self._call = threading.local()


def take_over(module: StandIn, dense: Attention) -> None:
    """Gives a module that takes a timm attention's place its sizes and, shared, its submodules."""
    for name in ("num_heads", "head_dim", "attn_dim", "scale", "fused_attn"):
        setattr(module, name, getattr(dense, name))
    module.stand_in_for(dense)


def split_heads(attention: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projected tokens [B, N, 3 * H * d] to q, k, v [B, H, N, d], q and k normalised as the model does."""
    B, N, _ = qkv.shape
    heads = qkv.reshape(B, N, 3, attention.num_heads, attention.head_dim)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    # under autocast norms return fp32
    return attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype), v


def merge_heads(attention: Any, x: Tensor, out: Tensor) -> Tensor:
    """What an attention module does behind its heads [B, H, N, d]: norm, gate and projection to [B, N, C].

    Args:
        attention: with the submodules of timm's `Attention`.
        x: what the module got, [B, N, C].
        out: of its heads.
    """
    out = attention.norm(out.transpose(1, 2).reshape(*x.shape[:2], attention.attn_dim))
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    projected: Tensor = attention.proj_drop(attention.proj(out))
    return projected


def dense_connectivity(batch: int, heads: int, layout: Layout, tile: int, like: Tensor) -> Connectivity:
    """Lists of all keys: what a layer that stays dense attends to."""
    every = torch.arange(layout.tokens, dtype=torch.int32, device=like.device)
    lists = every.expand(batch, heads, layout.squares(tile), -1)
    return Connectivity.over(layout, lists, tile, check=False)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _keep_of(config: SparsifyConfig, layer: int, depth: int, patches: int, prefix: int) -> tuple[int, int]:
    # what it depends on are arguments: a graph is made anew where one of them differs
    queries = None
    if config.tokens is not None:
        queries = [count.attention for count in config.tokens.counts(depth, patches, prefix)]
    return exact_ratio(config.keep_of(layer, depth, queries))


def _key_budget(keep: tuple[int, int], tokens: int, forced: int) -> int:
    if not torch.compiler.is_compiling():
        return key_budget(keep, tokens, forced)
    # layers that are compiled one by one differ in this number: it becomes a variable with the second
    with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
        return key_budget(keep, tokens, forced)


def rename_released_keys(module: "SparseAttention", state_dict: dict[str, Any], prefix: str) -> None:
    """Lets released checkpoints load: their predictor is our scorer under other names."""
    old_prefix = prefix + "mask_predictor."
    names = getattr(module.scorer, "RELEASED_NAMES", ())
    for key in [key for key in state_dict if key.startswith(old_prefix)]:
        name = key.removeprefix(old_prefix)
        for old, new in names:
            if name.partition(".")[0] == old:
                state_dict[prefix + "scorer." + name.replace(old, new, 1)] = state_dict.pop(key)
