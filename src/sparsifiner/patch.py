"""Makes a timm model sparse in place, and dense again."""

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sparsifiner.attention import CurrentGrid, SparseAttention
from sparsifiner.config import SparsifyConfig, change_config, make_config
from sparsifiner.layout import TokenLayout
from sparsifiner.scorers import BorrowingScorer, LowRankScorer, Scorer, SharedLists, make_scorer
from sparsifiner.tokens.blocks import TokenBlock, TokenBlocks

_logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# fields that shape a scorer: with these equal, calling sparsify again keeps the scorer and its weights
_SHAPING_FIELDS = ("scorer", "basis", "reduced_dim", "share")


def sparsify(
    model: Model, config: SparsifyConfig | None = None, *, preset: str | None = None, **options: Any
) -> Model:
    """Makes the attention of a timm `VisionTransformer` sparse, in place, keeping its weights.

    On a sparse model it changes only the configuration: options alone change the one that it has, and
    scorers of the same kind keep their weights.

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
    layers = [block.attn for block in model.blocks]
    sparse_before = [layer for layer in layers if isinstance(layer, SparseAttention)]
    grid = sparse_before[0].grid if sparse_before else CurrentGrid(model)
    native = TokenLayout(grid.native(), model.num_prefix_tokens)
    untrained = False
    lists: SharedLists | None = None
    for index, (block, layer) in enumerate(zip(model.blocks, layers, strict=True)):
        scores = index % config.share == 0
        if scores:
            lists = SharedLists() if index + 1 < len(layers) and config.share > 1 else None
        if isinstance(layer, SparseAttention) and _keeps_scorer(layer, config):
            layer.configure(config)
            continue
        if scores:
            scorer = make_scorer(config, index, native, layer.num_heads, layer.head_dim)
        else:
            assert lists is not None
            scorer = BorrowingScorer(lists, index + 1 == len(layers) or (index + 1) % config.share == 0)
        scorer = _place(scorer, layer)
        if isinstance(layer, SparseAttention):
            layer.scorer = scorer
            layer.configure(config)
        else:
            layer = SparseAttention(layer, scorer, grid, model.num_prefix_tokens, index, len(layers), config)
            block.attn = layer
        layer.lists = lists if scores else None
        untrained = True
    _arrange_blocks(model, config, native)
    if untrained and config.scorer == "lowrank":
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
        return [f"{type(model).__name__} is not a timm VisionTransformer"]
    reasons = []
    if getattr(model.patch_embed, "grid_size", None) is None:
        reasons.append(f"{type(model.patch_embed).__name__} has no patch grid (grid_size)")
    if not len(model.blocks):
        reasons.append("it has no blocks")
    for index, block in enumerate(model.blocks):
        attn = getattr(block, "attn", None)
        if type(block) not in {Block, ResPostBlock, TokenBlock}:
            reasons.append(f"block {index} is a {type(block).__name__}, which is not supported")
        elif not (type(attn) in attentions or isinstance(attn, SparseAttention)):
            reasons.append(f"block {index} has a {type(attn).__name__} where an Attention is needed")
    return reasons


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
            weight = layers[index].qkv.weight
            reducer = reducer.to(device=weight.device, dtype=weight.dtype).train(block.training)
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


def _keeps_scorer(layer: SparseAttention, config: SparsifyConfig) -> bool:
    if any(getattr(layer.config, name) != getattr(config, name) for name in _SHAPING_FIELDS):
        return False
    scorer = layer.scorer
    if isinstance(scorer, LowRankScorer):  # legacy counts its basis by the image size
        return scorer.up.shape[1] == scorer.basis_size(config, scorer.native_layout)
    return True


def _place(scorer: Scorer, layer: SparseAttention | Attention) -> Scorer:
    """Moves a new scorer to where its layer computes."""
    weight = layer.qkv.weight
    return scorer.to(device=weight.device, dtype=weight.dtype).train(layer.training)
