"""Makes a timm model sparse in place, and dense again."""

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sparsifiner.attention import SHARED_MODULES, CurrentGrid, SparseAttention
from sparsifiner.config import SparsifyConfig, change_config, make_config
from sparsifiner.layout import TokenLayout
from sparsifiner.scorers import BorrowingScorer, LowRankScorer, Scorer, SharedLists, make_scorer
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
    scorers of the same kind keep their weights in every layer that scores before and after.

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
    config = _resolve_config(model, config, preset, options)
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
    sparse_before = sparse_layers(model, required=False)
    grid = sparse_before[0].grid if sparse_before else CurrentGrid(model)
    native = TokenLayout(grid.native(), model.num_prefix_tokens)
    try:
        replaced = _make_layers(model, config, grid, native)
    except BaseException:
        if not sparse_before:
            grid.remove()
        raise
    # nothing fails from here on, so that a model is converted as a whole or not at all
    untrained = False
    for block, (layer, scorer, lists) in zip(model.blocks, replaced, strict=True):
        untrained |= isinstance(scorer, LowRankScorer) and getattr(block.attn, "scorer", None) is not scorer
        block.attn, layer.scorer, layer.lists = layer, scorer, lists
        layer.configure(config)
    _arrange_blocks(model, config, native)
    if untrained:
        warnings.warn(
            "the low-rank scorer is untrained and chooses keys by chance: load trained weights, or train it",
            stacklevel=2,
        )
    if native.tokens < config.min_tokens:
        _logger.info(
            "sparsifiner: layers stay dense at the native %d tokens (min_tokens=%d)",
            native.tokens,
            config.min_tokens,
        )
    return cast("Model", model)


def _make_layers(
    model: VisionTransformer, config: SparsifyConfig, grid: CurrentGrid, native: TokenLayout
) -> list[tuple[SparseAttention, Scorer, SharedLists | None]]:
    """The sparse layer of each block, its scorer, and where it puts lists for the layers behind."""
    made: list[tuple[SparseAttention, Scorer, SharedLists | None]] = []
    depth = len(model.blocks)
    lists: SharedLists | None = None
    for index, layer in enumerate(block.attn for block in model.blocks):
        scores = index % config.share == 0
        if scores:
            lists = SharedLists() if index + 1 < depth and config.share > 1 else None
        if isinstance(layer, SparseAttention) and _keeps_scorer(layer, config, scores):
            has_them = layer.config.share == config.share
            made.append((layer, layer.scorer, layer.lists if has_them else lists))
            continue
        scorer: Scorer
        if scores:
            scorer = make_scorer(config, index, native, layer.num_heads, layer.head_dim)
        else:
            assert lists is not None
            scorer = BorrowingScorer(lists, index + 1 == depth or (index + 1) % config.share == 0)
        place = _place_of(layer)
        scorer = scorer.to(device=place.device, dtype=place.dtype).train(layer.training)
        if not isinstance(layer, SparseAttention):
            layer = SparseAttention(layer, scorer, grid, model.num_prefix_tokens, index, depth, config)
        made.append((layer, scorer, lists if scores else None))
    return made


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
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TokenBlocks):
                setattr(module, name, child.dense_blocks())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SparseAttention):
                child.grid.remove()
                setattr(module, name, child.dense_module())
    return model


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
    assert isinstance(attn, nn.Module)
    own = _own_parts(attn, SHARED_MODULES)
    return own and f"has an attention with {own}, which would be lost"


def _own_parts(module: nn.Module, known: Collection[str]) -> str:
    """What was put into a module of timm's, which another in its place would not have; empty for nothing."""
    if "forward" in vars(module):
        return "a forward of its own"
    names = [name for name, _ in module.named_children() if name not in known]
    return f"modules of its own: {', '.join(names)}" if names else ""


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


def _arrange_blocks(model: VisionTransformer, config: SparsifyConfig, native: TokenLayout) -> None:
    """Gives the model blocks that drop tokens as configured, or those that it came with."""
    learned: dict[int, dict[str, Tensor]] = {}
    if isinstance(model.blocks, TokenBlocks):
        if model.blocks.method == config.tokens:
            return
        learned = {
            index: block.reducer.state_dict()
            for index, block in enumerate(model.blocks)
            if isinstance(block, TokenBlock) and block.reducer is not None
        }
        model.blocks = model.blocks.dense_blocks()
    if config.tokens is None:
        return
    blocks, layers = [], sparse_layers(model)
    depth, untrained = len(layers), False
    for index, block in enumerate(model.blocks):
        reducer = config.tokens.reducer(index, depth, model.embed_dim, native.patches)
        if reducer is not None:
            place = _place_of(layers[index])
            reducer = reducer.to(device=place.device, dtype=place.dtype).train(block.training)
            before, own = learned.get(index, {}), reducer.state_dict()
            if {name: each.shape for name, each in before.items()} == {n: e.shape for n, e in own.items()}:
                reducer.load_state_dict(before)
            else:
                untrained = True
        assert isinstance(block, Block | ResPostBlock)
        blocks.append(TokenBlock(block, reducer))
    model.blocks = TokenBlocks(model.blocks, blocks, config.tokens)
    if untrained:
        warnings.warn(
            "the token predictor is untrained and drops tokens by chance: load trained weights, or train it",
            stacklevel=3,
        )


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
    # groups of another size have other lists to take
    if not scores and layer.config.share != config.share:
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
