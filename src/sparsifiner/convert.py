"""Makes a model sparse in place, and dense again."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sparsifiner.attention import SparseAttention
from sparsifiner.blocks import TokenBlock, TokenBlocks
from sparsifiner.config import SparsifyConfig, change_config, make_config
from sparsifiner.hosts import CurrentGrid, Host, host_of, reasons_against
from sparsifiner.scorers import BorrowingScorer, Place, Scorer, SharedLists
from sparsifiner.standin import StandIn

_logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model, config: SparsifyConfig | None = None, *, preset: str | None = None, **options: Any
) -> Model:
    """Makes the attention of a Vision Transformer sparse, in place, keeping its weights.

    On a sparse model it changes only the configuration: options alone change the one that it has, and
    scorers of the same kind keep their weights in every layer that scores before and after. Layers count as
    they are in the model now, whatever was removed or moved since the last call.

    Args:
        model: a model of a family in `sparsifiner.hosts`; `why_not(model)` says whether it will do.
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
    tokens = plan.host.native.tokens
    if tokens < plan.config.min_tokens:
        _logger.info(
            "sparsifiner: layers stay dense at the native %d tokens (min_tokens=%d)",
            tokens,
            plan.config.min_tokens,
        )
    return model


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        layer: the layer, new or the one that is there.
        place: which layer it is.
        scorer: its scorer, new or the one that is there.
        lists: where it puts lists for the layers behind, None where there are none.
        borrowed: where it takes its lists from, see `BorrowingScorer.borrow`; None where it scores.
    """

    layer: SparseAttention
    place: Place
    scorer: Scorer
    lists: SharedLists | None
    borrowed: tuple[SharedLists, int, bool] | None


@dataclass(frozen=True)
class SparsityPlan:
    """All that `sparsify` is about to do; until `carry_out` the model is as it was.

    Attributes:
        host: of the model.
        config: what its layers will do.
        grid: where its layers will look for the grid.
        layers: one for each block.
        blocks: those that drop tokens, new or those that are there; None for the model's own.
        warnings: what the user should know.
    """

    host: Host
    config: SparsifyConfig
    grid: CurrentGrid
    layers: list[LayerPlan]
    blocks: TokenBlocks | None
    warnings: list[str]

    def carry_out(self) -> None:
        """Changes the model; there is nothing left that could fail."""
        host = self.host
        if self.blocks is None:
            _put_back(host.model, TokenBlocks)
            _put_back(host.model, TokenBlock)
        else:
            host.put_blocks(self.blocks)
        for block, plan in zip(host.blocks, self.layers, strict=True):
            host.put_attention(block, plan.layer)
            plan.layer.scorer, plan.layer.lists = plan.scorer, plan.lists
            if plan.borrowed is not None:
                cast("BorrowingScorer", plan.scorer).borrow(*plan.borrowed)
            plan.layer.grid = self.grid
            plan.layer.configure(self.config, plan.place)
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
    host = host_of(model)
    if isinstance(config.keep, tuple) and len(config.keep) != len(host.blocks):
        raise ValueError(
            f"keep has {len(config.keep)} entries, but the model has {len(host.blocks)} layers; "
            "give one number, or one per layer"
        )
    _check_tokens(host, config)
    grids = (layer.grid for layer in sparse_layers(model, required=False) if layer.grid.model is model)
    grid = next((each for each in grids if isinstance(each, CurrentGrid)), None) or CurrentGrid(host)
    layers = _plan_layers(host, config, grid)
    untrained: list[str] = []
    for attention, plan in zip(host.attentions, layers, strict=True):
        if not untrained and set(plan.scorer.parameters()) - set(attention.parameters()):
            untrained.append(
                f"the {config.scorer.TITLE} is untrained and chooses keys by chance: load trained weights, "
                "or train it"
            )
    blocks, predicts_by_chance = _plan_blocks(host, config, layers)
    if predicts_by_chance:
        untrained.append(
            "the token predictor is untrained and drops tokens by chance: load trained weights, or train it"
        )
    return SparsityPlan(host, config, grid, layers, blocks, untrained)


def _plan_layers(host: Host, config: SparsifyConfig, grid: CurrentGrid) -> list[LayerPlan]:
    """The sparse layer of each block, its scorer, and where lists go and come from."""
    plans: list[LayerPlan] = []
    native, depth = host.native, len(host.blocks)
    lists: SharedLists | None = None
    for index, attention in enumerate(host.attentions):
        place = Place(index, depth, native, *host.heads_of(attention), host.scale_of(attention))
        place_in_group = index % config.share
        if not place_in_group:
            lists = SharedLists() if index + 1 < depth and config.share > 1 else None
        borrowed = None
        if place_in_group:
            assert lists is not None
            borrowed = (lists, place_in_group, index + 1 == depth or place_in_group + 1 == config.share)
        scorer = _kept_scorer(attention, config, place, borrowed is None)
        if scorer is None:
            scorer = config.scorer.build(place) if borrowed is None else BorrowingScorer(*borrowed)
            like = _place_of(attention)
            scorer = scorer.to(device=like.device, dtype=like.dtype).train(attention.training)
        if isinstance(attention, SparseAttention):
            layer = attention
        else:
            layer = host.SPARSE_ATTENTION(attention, scorer, grid, place, config)
        plans.append(LayerPlan(layer, place, scorer, lists if borrowed is None else None, borrowed))
    return plans


@contextmanager
def about_to_train(*, scorer: bool = True, predictor: bool = True) -> Iterator[None]:
    """Does not warn of parts that choose by chance until they are trained: they are about to be.

    Args:
        scorer: scorers that learn.
        predictor: DynamicViT's predictors.
    """
    with warnings.catch_warnings():
        for name, known in ((".*scorer", scorer), ("token predictor", predictor)):
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
    return reasons_against(model)


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


def _check_tokens(host: Host, config: SparsifyConfig) -> None:
    if config.tokens is None:
        return
    reason = config.tokens.why_not(host.has_class_token) or host.why_no_tokens()
    if reason:
        raise ValueError(f"tokens: {reason}")
    config.tokens.counts(len(host.blocks), 1, host.prefix)  # names blocks that are not there


def _plan_blocks(
    host: Host, config: SparsifyConfig, layers: list[LayerPlan]
) -> tuple[TokenBlocks | None, bool]:
    """Blocks that drop tokens as configured, None for none; and whether any of them has new weights."""
    present: Any = host.blocks
    method = config.tokens
    if method is None:
        return None, False
    if isinstance(present, TokenBlocks) and present.method == method and present.is_as_planned:
        return present, False
    assert host.TOKEN_BLOCK is not None
    blocks, untrained = [], False
    for index, (block, plan) in enumerate(zip(present, layers, strict=True)):
        reducer = method.reducer(index, len(layers), host.width, host.native.patches)
        if reducer is not None:
            like = _place_of(plan.layer)
            reducer = reducer.to(device=like.device, dtype=like.dtype).train(block.training)
            learned = getattr(block, "reducer", None)
            before, own = {} if learned is None else learned.state_dict(), reducer.state_dict()
            if {name: each.shape for name, each in before.items()} == {n: e.shape for n, e in own.items()}:
                reducer.load_state_dict(before)
            else:
                untrained = True
        blocks.append(host.TOKEN_BLOCK(block, plan.layer, reducer))
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


def _kept_scorer(layer: nn.Module, config: SparsifyConfig, place: Place, scores: bool) -> Scorer | None:
    """The scorer of a layer or one with its weights, where it scores or takes lists as before; else None."""
    if not isinstance(layer, SparseAttention) or isinstance(layer.scorer, BorrowingScorer) is scores:
        return None
    return layer.scorer.continued(config.scorer, place) if scores else layer.scorer


def _place_of(module: nn.Module) -> Tensor:
    """A tensor that is where a module computes, in the dtype that it computes in."""
    # quantised layers have no parameters
    return next((each for each in module.parameters() if each.is_floating_point()), torch.empty(0))
