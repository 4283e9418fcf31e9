"""What a sparse model is asked to do: validated once, never changed."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

from sparsifiner.ops.backend import BACKENDS
from sparsifiner.tokens import TokenMethod, describe_tokens, read_tokens

ScorerName = Literal["lowrank", "impact", "pooled", "oracle", "window", "strided", "random", "bigbird"]
ProfileName = Literal["even", "falling"]


@dataclass(frozen=True)
class SparsifyConfig:
    """How every layer chooses its keys and attends to them; by default as the preset "fast".

    Attributes:
        keep: share of the tokens in each key list, in (0, 1]; one number, or one per layer. A layer
            whose lists and summaries would be no shorter than all keys is dense attention.
        profile: how one number is spread over the layers: "even", or "falling" as the square of the distance
            to the end, at the same mean over all queries: the first layers, whose attention is broad, list up
            to almost three times as many keys, the last ones few.
        tile: side in patches of the square of queries that share one key list; 1 gives every query
            its own, as in the paper.
        summary: side in patches of the windows whose mean key and value are appended as summary
            keys; None for no summaries, as in the paper; "auto" for the largest side that gives at
            least 48 windows, or 2.
        scorer: "lowrank" (learned, the paper's), "impact" (attention of the mean queries of parts of a tile,
            times the distance of a key's value from its window's mean; needs no training), "pooled"
            (tile-mean query · key, cheaper) or, to compare with, "oracle", "window", "strided", "random" or
            "bigbird" (half window, half random).
        pool: side in patches of the squares whose mean queries score for "impact", a divisor of `tile`;
            None for half of it, or for all of an odd one. Lists of fewer keys than a quarter of a tile's
            queries are scored by the whole tile's mean all the same.
        basis: basis size K of the low-rank scorer.
        reduced_dim: head dim of its reduced queries and keys; half the head dim by default.
        coef_topk: coefficients that it keeps per row.
        basis_threshold: basis entries of at most this magnitude count as zero.
        legacy: the low-rank scorer exactly as released: temperature H ** -0.5, basis size N // 6 of
            the native image size, dense products, backend "reference".
        share: consecutive layers that attend by the lists of the first of them: 2 halves scoring and
            selection. Layers that share must have the same `keep`.
        backend: "auto", "reference", "torch", "cpu" (native code, for inference) or, on a GPU, "triton".
        min_tokens: layers that see fewer tokens stay dense.
        seed: seed of the scorers "random" and "bigbird".
        tokens: `EViT(...)`, `DynamicViT(...)` or `ToMe(...)` to drop or merge tokens too; None keeps all.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is impossible or contradicts another.
    """

    keep: float | Sequence[float] = 0.1
    profile: ProfileName = "falling"
    tile: int = 8
    summary: int | Literal["auto"] | None = "auto"
    scorer: ScorerName = "impact"
    pool: int | None = None
    basis: int = 32
    reduced_dim: int | None = None
    coef_topk: int = 8
    basis_threshold: float = 0.02
    legacy: bool = False
    share: int = 1
    backend: str = "auto"
    min_tokens: int = 0
    seed: int = 0
    tokens: TokenMethod | None = None

    def __post_init__(self) -> None:
        """Rejects impossible values by name."""
        listed = self._check_keep()
        self._check_at_least("tile", 1, "tile=1 gives every query its own key list")
        if self.summary is not None and self.summary != "auto":
            self._check_at_least("summary", 1, "use None for no summaries or 'auto'")
        self._check_scorer()
        self._check_at_least("share", 1, "1 gives every layer its own lists")
        self._check_groups(listed)
        self._check_at_least("min_tokens", 0, "0 makes every layer sparse")
        self._check_at_least("seed", 0, "any whole number below 2 ** 32 will do")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2 ** 32, got {self.seed}")
        if self.backend not in {"auto", *BACKENDS}:
            raise ValueError(f"backend={self.backend!r} is unknown; choose 'auto' or one of {BACKENDS}")
        if self.tokens is not None:
            self._check_tokens()
        if self.legacy:
            self._check_legacy()

    def _check_keep(self) -> tuple[float, ...]:
        keeps: list[Any] = list(self.keep) if isinstance(self.keep, Sequence) else [self.keep]
        for keep in keeps:
            if isinstance(keep, bool) or not isinstance(keep, Real):
                raise TypeError(f"keep must be a number in (0, 1] or one per layer, got {self.keep!r}")
            if not 0 < float(keep) <= 1:
                raise ValueError(f"keep must lie in (0, 1], the share of keys that stay; got {keep!r}")
        if not keeps:
            raise ValueError("keep must be a number in (0, 1] or one per layer; got an empty list")
        listed = tuple(float(keep) for keep in keeps)
        object.__setattr__(self, "keep", listed if isinstance(self.keep, Sequence) else listed[0])
        if self.profile not in get_args(ProfileName):
            raise ValueError(f"profile={self.profile!r} is unknown; choose one of {get_args(ProfileName)}")
        return listed

    def _check_scorer(self) -> None:
        if self.scorer not in get_args(ScorerName):
            raise ValueError(f"scorer={self.scorer!r} is unknown; choose one of {get_args(ScorerName)}")
        if self.pool is not None:
            self._check_at_least("pool", 1, "None takes half of the tile's side")
            if self.tile % self.pool:
                raise ValueError(f"pool={self.pool} must divide tile={self.tile}, whose queries it groups")
        self._check_at_least("basis", 1, "the paper uses 32")
        if self.reduced_dim is not None:
            self._check_at_least("reduced_dim", 1, "None takes half the head dim")
        self._check_at_least("coef_topk", 1, "the paper uses 8")
        if self.coef_topk > self.basis:
            raise ValueError(f"coef_topk={self.coef_topk} exceeds basis={self.basis}; lower coef_topk")
        if not (isinstance(self.basis_threshold, int | float) and 0 <= self.basis_threshold < math.inf):
            raise ValueError(f"basis_threshold must be a number of at least 0, got {self.basis_threshold!r}")

    def _check_at_least(self, name: str, least: int, remedy: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number of at least {least}, got {value!r}; {remedy}")
        object.__setattr__(self, name, int(value))
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}; {remedy}")

    def _check_groups(self, keeps: tuple[float, ...]) -> None:
        for layer, keep in enumerate(keeps):
            first = layer - layer % self.share
            if keep != keeps[first]:
                raise ValueError(
                    f"keep={keep} of layer {layer} differs from that of layer {first}, whose lists it takes "
                    f"with share={self.share}; give both the same"
                )

    def _check_legacy(self) -> None:
        required = {"scorer": "lowrank", "tile": 1, "summary": None, "share": 1}
        for name, value in required.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"legacy=True is the released method and needs {name}={value!r}, "
                    f"got {getattr(self, name)!r}; use preset='paper'"
                )
        if self.backend not in {"auto", "reference"}:
            raise ValueError(f"legacy=True runs on backend='reference' only, got {self.backend!r}")

    def _check_tokens(self) -> None:
        if not isinstance(self.tokens, TokenMethod):
            raise TypeError(
                f"tokens must be EViT(...), DynamicViT(...), ToMe(...) or None, got {self.tokens!r}"
            )
        if self.share > 1:
            raise ValueError(
                f"share={self.share}: the lists of one layer do not fit the next where tokens are dropped; "
                "set share=1, or tokens=None"
            )
        if self.legacy:
            raise ValueError("legacy=True is the released method, which takes tokens=None here")

    def keep_of(self, layer: int, depth: int, queries: Sequence[int] | None = None) -> float:
        """Share of keys that layer `layer` of `depth` keeps.

        Args:
            layer: index of the layer.
            depth: number of layers.
            queries: of each layer, where tokens are dropped: `keep` is the mean over all of them.
        """
        if isinstance(self.keep, tuple):
            return float(self.keep[layer])
        assert isinstance(self.keep, float)
        if self.profile == "even":
            return self.keep
        groups = -(-depth // self.share)  # layers that share lists keep the same
        falling = [(1.0 - (each // self.share + 0.5) / groups) ** 2 for each in range(depth)]
        counts = queries or [1] * depth
        total = sum(weight * count for weight, count in zip(falling, counts, strict=True))
        weights = [weight * sum(counts) / total for weight in falling]  # 1 on the average
        # no layer can keep more than everything, so that large shares are spread more evenly
        spread = min(1.0, (1.0 / self.keep - 1.0) / (weights[0] - 1.0)) if groups > 1 else 0.0
        return min(1.0, self.keep * (1.0 + spread * (weights[layer] - 1.0)))


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"scorer": "lowrank", "profile": "even", "tile": 1, "summary": None, "keep": 0.25},
}


def make_config(preset: str = "fast", **options: Any) -> SparsifyConfig:
    """Configuration of a preset with options changed.

    Args:
        preset: "fast" (training-free, made for wall-clock time) or "paper" (the learned method).
        **options: fields of `SparsifyConfig`.

    Raises:
        ValueError: the preset or an option is unknown or impossible.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; choose one of {tuple(PRESETS)}")
    return change_config(SparsifyConfig(**PRESETS[preset]), **options)


def change_config(config: SparsifyConfig, **options: Any) -> SparsifyConfig:
    """The same configuration with some options changed.

    Raises:
        ValueError: an option is unknown or impossible.
    """
    names = [field.name for field in fields(SparsifyConfig)]
    for name in options:
        if name not in names:
            raise ValueError(f"{name!r} is no option of SparsifyConfig; the options are {', '.join(names)}")
    return replace(config, **options)


def config_to_dict(config: SparsifyConfig) -> dict[str, Any]:
    """A configuration as plain values, for files."""
    return {**asdict(config), "tokens": describe_tokens(config.tokens)}


def config_from_dict(values: dict[str, Any]) -> SparsifyConfig:
    """The configuration of which `config_to_dict` made these values; what is missing is the default.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is unknown or impossible.
    """
    return change_config(SparsifyConfig(), **{**values, "tokens": read_tokens(values.get("tokens"))})
