"""What a sparse model is asked to do: validated once, never changed."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, get_args

from sparsifiner.backend_names import BACKENDS
from sparsifiner.checks import whole_number
from sparsifiner.hashed import hashed_once
from sparsifiner.old_spellings import OLD_OPTIONS, modern_config, takes_old_spellings
from sparsifiner.scorers import SCORERS, Impact, LowRank, ScorerOptions
from sparsifiner.tokens import TOKENS, TokenMethod

_USUAL_SCORER = Impact()

ProfileName = Literal["even", "falling"]


@takes_old_spellings
@hashed_once
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
        scorer: `Impact(...)` (attention of the mean queries of parts of a tile, times the distance of a key's
            value from its window's mean; needs no training), `LowRank(...)` (learned, the paper's),
            `Released(...)` (the paper's as released, to the bit), `Pooled()` (tile-mean query · key, cheaper)
            or, to compare with, `Oracle()`, `Window()`, `Strided()`, `Random(...)` or `BigBird(...)`; or one
            that `SCORERS` knows, by its plain name.
        share: consecutive layers that attend by the lists of the first of them: 2 halves scoring and
            selection. Layers that share must have the same `keep`.
        backend: "auto", "reference", "torch", "cpu" (native code, for inference) or, on a GPU, "triton".
        min_tokens: layers that see fewer tokens stay dense.
        tokens: `EViT(...)`, `DynamicViT(...)` or `ToMe(...)` to drop or merge tokens too; None keeps all.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is impossible or contradicts another.
    """

    keep: float | Sequence[float] = 0.1
    profile: ProfileName = "falling"
    tile: int = 8
    summary: int | Literal["auto"] | None = "auto"
    scorer: ScorerOptions = _USUAL_SCORER
    _: KW_ONLY
    share: int = 1
    backend: str = "auto"
    min_tokens: int = 0
    tokens: TokenMethod | None = None

    def __post_init__(self) -> None:
        """Rejects impossible values by name."""
        listed = self._check_keep()
        self._check_at_least("tile", 1, "tile=1 gives every query its own key list")
        if self.summary is not None and self.summary != "auto":
            self._check_at_least("summary", 1, "use None for no summaries or 'auto'")
        # a plain name is a scorer with its default options
        object.__setattr__(self, "scorer", SCORERS.read(self.scorer))
        self._check_at_least("share", 1, "1 gives every layer its own lists")
        self._check_groups(listed)
        self._check_at_least("min_tokens", 0, "0 makes every layer sparse")
        if self.backend not in {"auto", *BACKENDS}:
            raise ValueError(f"backend={self.backend!r} is unknown; choose 'auto' or one of {BACKENDS}")
        if self.tokens is not None:
            self._check_tokens()
        self.scorer.check(self)

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

    def _check_at_least(self, name: str, least: int, remedy: str) -> None:
        object.__setattr__(self, name, whole_number(name, getattr(self, name), least, remedy))

    def _check_groups(self, keeps: tuple[float, ...]) -> None:
        for layer, keep in enumerate(keeps):
            first = layer - layer % self.share
            if keep != keeps[first]:
                raise ValueError(
                    f"keep={keep} of layer {layer} differs from that of layer {first}, whose lists it takes "
                    f"with share={self.share}; give both the same"
                )

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
    "paper": {"scorer": LowRank(), "profile": "even", "tile": 1, "summary": None, "keep": 0.25},
}


def scorer_of(preset: str) -> ScorerOptions:
    """The scorer of a preset; of what is none, that of "fast"."""
    scorer: ScorerOptions = PRESETS.get(preset, {}).get("scorer", _USUAL_SCORER)
    return scorer


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
        if name not in {*names, *OLD_OPTIONS}:
            raise ValueError(f"{name!r} is no option of SparsifyConfig; the options are {', '.join(names)}")
    if isinstance(options.get("scorer"), str) and type(config.scorer) is SCORERS[options["scorer"]]:
        del options["scorer"]  # the name of the scorer that is there already
    return replace(config, **options)


def config_to_dict(config: SparsifyConfig) -> dict[str, Any]:
    """A configuration as plain values, for files."""
    return {
        **{field.name: getattr(config, field.name) for field in fields(config)},
        "scorer": SCORERS.describe(config.scorer),
        "tokens": None if config.tokens is None else TOKENS.describe(config.tokens),
    }


def config_from_dict(values: dict[str, Any]) -> SparsifyConfig:
    """The configuration of which `config_to_dict` made these values; what is missing is the default.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is unknown or impossible.
    """
    options = modern_config(values)
    for name, choices in {"scorer": SCORERS, "tokens": TOKENS}.items():
        if options.get(name) is not None:
            options[name] = choices.read(options[name])  # type: ignore[attr-defined]
    return change_config(SparsifyConfig(), **options)
