"""The methods that are compared, behind one interface: a dense model becomes a cheaper one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sparsifiner.convert import about_to_train, sparsify
from sparsifiner.hosts import host_of
from sparsifiner.models.linformer import linformer
from sparsifiner.scorers import BigBird, Impact, Oracle, Pooled, Random, Released, Strided, Window
from sparsifiner.tokens import DynamicViT, EViT, TokenMethod, ToMe


@dataclass(frozen=True)
class Budget:
    """What a method may spend.

    Attributes:
        keep: share of the keys; None where the method has no such choice.
        token_keep: share of the patches that each of three stages leaves; None likewise.
    """

    keep: float | None = None
    token_keep: float | None = None


@dataclass(frozen=True)
class Geometry:
    """What lists of all methods share.

    Attributes:
        tile: side in patches of the square of queries that share one list.
        summary: side in patches of the summary windows of our methods.
        pool: side of the squares whose mean queries score for "impact"; half the tile's if None.
    """

    tile: int = 8
    summary: int = 8
    pool: int | None = None


Build = Callable[[nn.Module, Budget, Geometry], nn.Module]
# share of the patches that each of three stages leaves, and the model -> how to get there
Drop = Callable[[float, nn.Module], TokenMethod]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        build: makes a dense model cheaper, in place.
        spends: which shares it takes: "keys", "tokens", "both" or "nothing".
        ours: whether it is this package's own.
        untrained: whether it can be used without training.
        is_bound: whether it only shows what a form of sparsity allows: it computes dense attention to choose.
        is_timed: whether its time and memory are measured; not if this package computes it by its reference.
    """

    build: Build
    spends: Literal["keys", "tokens", "both", "nothing"]
    ours: bool = False
    untrained: bool = True
    is_bound: bool = False
    is_timed: bool = True

    def budgets(self, keeps: list[float], token_keeps: list[float]) -> list[Budget]:
        """Settings to try; where both are spent, the first with the first, and so on."""
        if self.spends == "keys":
            return [Budget(keep=keep) for keep in keeps]
        if self.spends == "tokens":
            return [Budget(token_keep=keep) for keep in token_keeps]
        if self.spends == "both":
            return [Budget(keep, tokens) for keep, tokens in zip(keeps, token_keeps, strict=True)]
        return [Budget()]


def _lists(drop: Drop | None = None, **options: Any) -> Build:
    """Key lists, by tile, with our summaries and by impact unless the options or a preset say otherwise."""

    def build(model: nn.Module, budget: Budget, geometry: Geometry) -> nn.Module:
        chosen = {"tile": geometry.tile, "summary": geometry.summary, **options}
        if "scorer" not in chosen and "preset" not in chosen:
            chosen["scorer"] = Impact(pool=geometry.pool)
        if drop is not None and budget.token_keep is not None:
            chosen["tokens"] = drop(budget.token_keep, model)
        with about_to_train():
            sparsify(model, keep=1.0 if budget.keep is None else budget.keep, **chosen)
        return model

    return build


def _tokens(drop: Drop) -> Build:
    """Fewer tokens, dense attention among them."""

    def build(model: nn.Module, budget: Budget, geometry: Geometry) -> nn.Module:
        assert budget.token_keep is not None
        with about_to_train():
            sparsify(model, keep=1.0, summary=None, tokens=drop(budget.token_keep, model))
        return model

    return build


def _merges(keep: float, model: nn.Module) -> ToMe:
    """ToMe that ends with as many patches as three stages of dropping would."""
    host = host_of(model)
    return ToMe(r=max(1, round((1 - keep**3) * host.native.patches / len(host.blocks))))


def _build_linformer(model: nn.Module, budget: Budget, geometry: Geometry) -> nn.Module:
    assert budget.keep is not None
    linformer(model, budget.keep)
    return model


_PATTERN: dict[str, Any] = {"summary": None, "profile": "even"}
METHODS: dict[str, Method] = {
    "dense": Method(lambda model, budget, geometry: model, "nothing"),
    "fast": Method(_lists(), "keys", ours=True),
    "fast+evit": Method(_lists(lambda keep, model: EViT(keep=keep)), "both", ours=True),
    "fast+tome": Method(_lists(_merges), "both", ours=True),
    "pooled": Method(_lists(scorer=Pooled()), "keys", ours=True),
    "paper": Method(_lists(preset="paper", tile=1, summary=None), "keys", ours=True, untrained=False),
    "paper+falling+summaries": Method(
        _lists(preset="paper", tile=1, profile="falling"), "keys", ours=True, untrained=False
    ),
    # its authors' code is faster than the reference, by which it runs here
    "released": Method(
        _lists(preset="paper", tile=1, summary=None, scorer=Released()),
        "keys",
        untrained=False,
        is_timed=False,
    ),
    "linformer": Method(_build_linformer, "keys"),
    "window": Method(_lists(scorer=Window(), **_PATTERN), "keys"),
    "strided": Method(_lists(scorer=Strided(), **_PATTERN), "keys"),
    "random": Method(_lists(scorer=Random(), **_PATTERN), "keys"),
    "bigbird": Method(_lists(scorer=BigBird(), **_PATTERN), "keys"),
    "oracle": Method(_lists(scorer=Oracle(), **_PATTERN), "keys", is_bound=True),
    "evit": Method(_tokens(lambda keep, model: EViT(keep=keep)), "tokens"),
    "dynamicvit": Method(_tokens(lambda keep, model: DynamicViT(keep=keep)), "tokens", untrained=False),
    "tome": Method(_tokens(_merges), "tokens"),
}
