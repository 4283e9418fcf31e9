"""Makes a timm model sparse in place, and dense again."""

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sparsifiner.attention import SHARED_MODULES, CurrentGrid, SparseAttention
from sparsifiner.config import SparsifyConfig, change_config, make_config
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.scorers import BorrowingScorer, LowRankScorer, Scorer, SharedLists, make_scorer
from sparsifiner.standin import StandIn
from sparsifiner.tokens.blocks import SHARED_BLOCK_MODULES, TokenBlock, TokenBlocks

_logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# fields that shape a scorer: with these equal, calling sparsify again keeps the scorer and its weights
_SHAPING_FIELDS = ("scorer", "basis", "reduced_dim")


def sparsify(
    model: Model, config: SparsifyConfig | None = None, *, preset: str | None = None, **options: Any
) -> Model:
    """Makes the attention of a timm `VisionTransformer` sparse, in place, keeping its weights.

    On a sparse model it changes only the configuration: options alone change the one that it has, and
    scorers of the same kind keep their weights in every layer that scores before and after. Layers count as
    they are in the model now, whatever was removed or moved since the last call.

    Args:
        model: a plain timm Vision Transformer; `why_not(model)` says whether it will do.
        config: the whole configuration, or
        preset: "fast" (the default for a dense model: training-free, made for wall-clock time) or
            "paper" (the learned low-rank scorer, one key list per query), with
        **options: fields of `SparsifyConfig` to change, such as `keep=0.1`.

    Returns:
        The same model.

    Raises:
        TypeError: `config` is no SparsifyConfig.
        ValueError: the model cannot be converted or the configuration is impossible; the model is
            then as it was.

    Example:
        >>> model = sparsify(timm.create_model("deit_small_patch16_224"), keep=0.1)
    """
    plan = plan_sparsity(model, _resolve_config(model, config, preset, options))
    for warning in plan.warnings:  # which may be errors: the model is as it was
        warnings.warn(warning, stacklevel=2)
    plan.carry_out()
    if plan.native.tokens < plan.config.min_tokens:
        _logger.info(
            "sparsifiner: layers stay dense at the native %d tokens (min_tokens=%d)",
            plan.native.tokens,
            plan.config.min_tokens,
        )
    return model


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        layer: the layer, new or the one that is there.
        scorer: its scorer, likewise.
        lists: where it puts lists for the layers behind, None where there are none.
        borrowed: where it takes its lists from, see `BorrowingScorer.borrow`; None where it scores.
    """

    layer: SparseAttention
    scorer: Scorer
    lists: SharedLists | None
    borrowed: tuple[SharedLists, int, bool] | None


@dataclass(frozen=True)
class SparsityPlan:
    """All that `sparsify` is about to do; until `carry_out` the model is as it was.

    Attributes:
        model: the model.
        config: what its layers will do.
        native: its tokens.
        grid: where its layers will look for the grid.
        layers: one for each block.
        blocks: those that drop tokens, new or those that are there; None for the model's own.
        warnings: what the user should know.
    """

    model: VisionTransformer
    config: SparsifyConfig
    native: TokenLayout
    grid: CurrentGrid
    layers: list[LayerPlan]
    blocks: TokenBlocks | None
    warnings: list[str]

    def carry_out(self) -> None:
        """Changes the model; there is nothing left that could fail."""
        model, depth = self.model, len(self.layers)
        if self.blocks is None:
            _put_back(model, TokenBlocks)
            _put_back(model, TokenBlock)
        else:
            model.blocks = self.blocks
        for index, (block, plan) in enumerate(zip(model.blocks, self.layers, strict=True)):
            block.attn, plan.layer.scorer, plan.layer.lists = plan.layer, plan.scorer, plan.lists
            if plan.borrowed is not None:
                cast("BorrowingScorer", plan.scorer).borrow(*plan.borrowed)
            plan.layer.grid = self.grid
            plan.layer.configure(self.config, index, depth)
        self.grid.attach()


def plan_sparsity(model: nn.Module, config: SparsifyConfig) -> SparsityPlan:
    """Builds everything that a model needs to become sparse, and leaves the model as it is.

    Args:
        model: dense or sparse.
        config: what its layers shall do.

    Raises:
        ValueError: the model cannot be converted, or the configuration does not fit it.
    """
    reasons = why_not(model)
    if reasons:
        raise ValueError(
            "model cannot be made sparse: " + "; ".join(reasons) + ". Use a plain timm VisionTransformer"
        )
    assert isinstance(model, VisionTransformer)
    if isinstance(config.keep, tuple) and len(config.keep) != len(model.blocks):
        raise ValueError(
            f"keep has {len(config.keep)} entries, but the model has {len(model.blocks)} layers; "
            "give one number, or one per layer"
        )
    _check_tokens(model, config)
    grids = (layer.grid for layer in sparse_layers(model, required=False) if layer.grid.model is model)
    grid = next(grids, None) or CurrentGrid(model)
    native = TokenLayout(grid.native(), model.num_prefix_tokens)
    layers = _plan_layers(model, config, grid, native)
    untrained: list[str] = []
    for block, plan in zip(model.blocks, layers, strict=True):
        new = getattr(block.attn, "scorer", None) is not plan.scorer
        if new and isinstance(plan.scorer, LowRankScorer) and not untrained:
            untrained.append(
                "the low-rank scorer is untrained and chooses keys by chance: load trained weights, "
                "or train it"
            )
    blocks, predicts_by_chance = _plan_blocks(model, config, native, layers)
    if predicts_by_chance:
        untrained.append(
            "the token predictor is untrained and drops tokens by chance: load trained weights, or train it"
        )
    return SparsityPlan(model, config, native, grid, layers, blocks, untrained)


def _plan_layers(
    model: VisionTransformer, config: SparsifyConfig, grid: CurrentGrid, native: TokenLayout
) -> list[LayerPlan]:
    """The sparse layer of each block, its scorer, and where lists go and come from."""
    plans: list[LayerPlan] = []
    depth = len(model.blocks)
    lists: SharedLists | None = None
    for index, layer in enumerate(block.attn for block in model.blocks):
        place = index % config.share
        if not place:
            lists = SharedLists() if index + 1 < depth and config.share > 1 else None
        borrowed = None
        if place:
            assert lists is not None
            borrowed = (lists, place, index + 1 == depth or place + 1 == config.share)
        scorer: Scorer
        if isinstance(layer, SparseAttention) and _keeps_scorer(layer, config, borrowed is None):
            scorer = layer.scorer
        else:
            if borrowed is None:
                scorer = make_scorer(config, index, native, layer.num_heads, layer.head_dim)
            else:
                scorer = BorrowingScorer(*borrowed)
            like = _place_of(layer)
            scorer = scorer.to(device=like.device, dtype=like.dtype).train(layer.training)
        if not isinstance(layer, SparseAttention):
            layer = SparseAttention(layer, scorer, grid, model.num_prefix_tokens, index, depth, config)
        plans.append(LayerPlan(layer, scorer, lists if borrowed is None else None, borrowed))
    return plans


@contextmanager
def about_to_train(*, scorer: bool = True, predictor: bool = True) -> Iterator[None]:
    """Does not warn of parts that choose by chance until they are trained: they are about to be.

    Args:
        scorer: low-rank scorers.
        predictor: DynamicViT's predictors.
    """
    with warnings.catch_warnings():
        for name, known in (("low-rank scorer", scorer), ("token predictor", predictor)):
            if known:
                warnings.filterwarnings("ignore", f"the {name} is untrained")
        yield


def desparsify(model: Model) -> Model:
    """Makes a sparse model dense again, in place, with the weights that it has now.

    Args:
        model: a model that `sparsify` converted; a dense one is left as it is.

    Returns:
        The same model, its original attention modules back in their places.
    """
    for layer in sparse_layers(model, required=False):
        layer.grid.remove()
    for kind in (TokenBlocks, TokenBlock, SparseAttention):
        _put_back(model, kind)
    return model


def _put_back(model: nn.Module, kind: type[StandIn]) -> None:
    """Puts the modules back in whose places those of a kind stand."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                setattr(module, name, child.dense_module())


def why_not(model: nn.Module) -> list[str]:
    """Reasons why a model cannot be made sparse; empty if it can.

    Args:
        model: any module.
    """
    return reasons_against(model, (Attention,))


def reasons_against(model: nn.Module, attentions: Collection[type[nn.Module]]) -> list[str]:
    """Reasons why a model is none of blocks that are known here; empty if it is.

    Args:
        model: any module.
        attentions: types of attention that will do, besides `SparseAttention`.
    """
    if not isinstance(model, VisionTransformer):
        inside = (name for name, each in model.named_modules() if isinstance(each, VisionTransformer))
        found = next(inside, None)
        hint = "" if found is None else f", but its {found} is one, which can be made sparse in its place"
        return [f"{type(model).__name__} is not a timm VisionTransformer{hint}"]
    reasons = []
    if getattr(model.patch_embed, "grid_size", None) is None:
        reasons.append(f"{type(model.patch_embed).__name__} has no patch grid (grid_size)")
    if not len(model.blocks):
        reasons.append("it has no blocks")
    against: dict[str, list[int]] = {}
    for index, block in enumerate(model.blocks):
        reason = _reason_against_block(block, attentions)
        if reason:
            against.setdefault(reason, []).append(index)
    for reason, indices in against.items():
        more = f" (and {len(indices) - 1} more)" if len(indices) > 1 else ""
        reasons.append(f"block {indices[0]} {reason}{more}")
    return reasons


def _reason_against_block(block: nn.Module, attentions: Collection[type[nn.Module]]) -> str:
    """Why a block will not do, as the end of a sentence; empty if it will."""
    attn = getattr(block, "attn", None)
    if type(block) not in {Block, ResPostBlock, TokenBlock}:
        return f"is a {type(block).__name__}, which is not supported"
    if isinstance(attn, SparseAttention):
        return ""
    if type(attn) not in attentions:
        return f"has a {type(attn).__name__} where an Attention is needed"
    if isinstance(attn, StandIn):
        return ""
    assert isinstance(attn, nn.Module)
    own = _own_parts(attn, SHARED_MODULES)
    return own and f"has an attention with {own}, which would be lost"


def _own_parts(module: nn.Module, known: Collection[str]) -> str:
    """What was put into a module of timm's, which another in its place would not have; empty for nothing."""
    if "forward" in vars(module):
        return "a forward of its own"
    names = [name for name, _ in module.named_children() if name not in known]
    if names:
        return f"modules of its own: {', '.join(names)}"
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return f"tensors of its own: {', '.join(name for name, _ in own)}" if own else ""


def sparse_layers(model: nn.Module, *, required: bool = True) -> list[SparseAttention]:
    """The sparse attention layers of a model, in order.

    Args:
        model: any module.
        required: whether there must be one.

    Raises:
        ValueError: there is none, though one is required.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseAttention)]
    if required and not layers:
        raise ValueError("model has no sparse attention; call sparsifiner.sparsify(model) first")
    return layers


def _check_tokens(model: VisionTransformer, config: SparsifyConfig) -> None:
    if config.tokens is None:
        return
    reason = config.tokens.why_not(bool(model.has_class_token))
    if reason:
        raise ValueError(f"tokens: {reason}")
    hooked = [
        index
        for index, block in enumerate(model.blocks)
        if not isinstance(block, TokenBlock) and (block._forward_hooks or block._forward_pre_hooks)
    ]
    if hooked:
        raise ValueError(
            f"tokens: blocks {hooked} have forward hooks, which blocks that drop tokens would not call; "
            "remove them, and hook their attn or mlp"
        )
    for index, block in enumerate(model.blocks):
        own = "" if isinstance(block, TokenBlock) else _own_parts(block, SHARED_BLOCK_MODULES)
        if own:
            raise ValueError(f"tokens: block {index} has {own}, which blocks that drop tokens would not have")
    config.tokens.counts(len(model.blocks), 1, model.num_prefix_tokens)  # names blocks that are not there


def _plan_blocks(
    model: VisionTransformer, config: SparsifyConfig, native: TokenLayout, layers: list[LayerPlan]
) -> tuple[TokenBlocks | None, bool]:
    """Blocks that drop tokens as configured, None for none; and whether any of them has new weights."""
    present, method = model.blocks, config.tokens
    if method is None:
        return None, False
    if isinstance(present, TokenBlocks) and present.method == method and present.is_as_planned:
        return present, False
    blocks, untrained = [], False
    for index, (block, plan) in enumerate(zip(present, layers, strict=True)):
        reducer = method.reducer(index, len(layers), model.embed_dim, native.patches)
        if reducer is not None:
            like = _place_of(plan.layer)
            reducer = reducer.to(device=like.device, dtype=like.dtype).train(block.training)
            learned = getattr(block, "reducer", None)
            before, own = {} if learned is None else learned.state_dict(), reducer.state_dict()
            if {name: each.shape for name, each in before.items()} == {n: e.shape for n, e in own.items()}:
                reducer.load_state_dict(before)
            else:
                untrained = True
        assert isinstance(block, Block | ResPostBlock | TokenBlock)
        blocks.append(TokenBlock(block, plan.layer, reducer))
    return TokenBlocks(present, blocks, method), untrained


def _resolve_config(
    model: nn.Module, config: SparsifyConfig | None, preset: str | None, options: dict[str, Any]
) -> SparsifyConfig:
    """What the arguments of `sparsify` ask for."""
    if config is not None:
        if not isinstance(config, SparsifyConfig):
            raise TypeError(f"config must be a SparsifyConfig, got {type(config).__name__}")
        if preset is not None or options:
            given = ", ".join([*(["preset"] if preset else []), *options])
            raise ValueError(f"give either config or {given}, not both")
        return config
    present = sparse_layers(model, required=False)
    if present and preset is None:
        return change_config(present[0].config, **options)
    return make_config(preset or "fast", **options)


def _keeps_scorer(layer: SparseAttention, config: SparsifyConfig, scores: bool) -> bool:
    """Whether a layer keeps its scorer, given whether it scores or takes the lists of another."""
    if isinstance(layer.scorer, BorrowingScorer) is scores:
        return False
    if any(getattr(layer.config, name) != getattr(config, name) for name in _SHAPING_FIELDS):
        return False
    scorer = layer.scorer
    if isinstance(scorer, LowRankScorer):  # legacy counts its basis by the image size
        return scorer.up.shape[1] == scorer.basis_size(config, scorer.native_layout)
    return True


def _place_of(module: nn.Module) -> Tensor:
    """A tensor that is where a module computes, in the dtype that it computes in."""
    # quantised layers have no parameters
    return next((each for each in module.parameters() if each.is_floating_point()), torch.empty(0))
