"""What a scorer is: scores for rows of queries, turned into key lists."""

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsifiner import tuned
from sparsifiner.eager import wants_gradients
from sparsifiner.geometry.connectivity import Connectivity, ScoredLists
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout, Side
from sparsifiner.hashed import hashed_once
from sparsifiner.ops import select_topk
from sparsifiner.ops.backends import resolve_backend, takes
from sparsifiner.ops.operator import Operator
from sparsifiner.ops.precision import without_autocast
from sparsifiner.scorers.options import Place, ScorerOptions

# kinds of calls that are remembered
_REMEMBERED = 4096

# scores(start, stop) gives the scores of those rows: [B or 1, H, stop - start, N]
RowScores = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Origin:
    """Where tokens come from, if some of the image's are gone.

    Attributes:
        layout: where all tokens of the image lie.
        tokens: int64 [B, N], index of each token among them.
    """

    layout: TokenLayout
    tokens: Tensor


@hashed_once
@dataclass(frozen=True)
class ListSpec:
    """The lists that a layer wants.

    Attributes:
        layout: where the tokens lie.
        tile: side in patches of the tile of queries that share a list.
        budget: keys in each list.
        forced: prefix keys that are in every list.
        scale: factor of the layer's logits.
        backend: backend of the selection.
        summary: side in patches of the windows whose means stand for the keys that a list lacks, or the run
            that one is; None for none.
        origin: where the tokens come from, None if all of the image are there.
        present: bool [B, N], tokens that may be listed; None for all.
    """

    layout: Layout
    tile: int
    budget: int
    forced: int
    scale: float
    backend: str = "auto"
    summary: Side | None = None
    origin: Origin | None = None
    present: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of lists per head."""
        return self.layout.squares(self.tile)

    @property
    def windows(self) -> int:
        """Number of summaries."""
        return 0 if self.summary is None else self.layout.squares(self.summary)

    def connectivity(self, indices: Tensor, window_means: Tensor | None = None) -> Connectivity:
        """Lists as `select_topk` gives, with the window means that were computed beside them, if any."""
        lists = (self.layout, indices, self.tile)
        if window_means is None:
            return Connectivity.over(*lists, check=False, selected=True)
        return ScoredLists.over(*lists, check=False, selected=True, window_means=window_means)


class Scorer(nn.Module):
    """Scores every key for every row and selects each row's list.

    Scores are computed and selected from in chunks of rows, so that no [rows, N] tensor exists
    whole: at tile 1 that would be N x N.

    Args:
        options: those of this scorer.
        place: where it works.
    """

    FUSED: Operator | None = None  # scores and selects at once, if there is one
    ATTENDING: Operator | None = None  # scores, selects and attends at once, likewise
    # whether queries and keys may have more channels, which add to their products what tokens weigh
    TAKES_SIZES = True
    # names of tensors that take over the size of a file's, and of those that a file may lack
    SIZED_BY_FILES: tuple[str, ...] = ()
    LACKED_BY_FILES: tuple[str, ...] = ()

    options: ScorerOptions

    def __init__(self, options: ScorerOptions, place: Place) -> None:
        super().__init__()
        self.options = options
        self.layer = place.index

    @abstractmethod
    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """Prepares what all rows share and returns the function that scores rows.

        Args:
            q: [B, H, N, d] unscaled queries, prefix included.
            k: [B, H, N, d] keys.
            v: [B, H, N, d] values.
            spec: the lists wanted.
        """

    def configure(self, options: ScorerOptions) -> None:
        """Takes over options with which `continued` gave this scorer."""
        self.options = options

    def continued(self, options: ScorerOptions, place: Place) -> "Scorer | None":
        """A scorer of other options that has the weights of this one, which stays as it is until it is used.

        Args:
            options: what it shall be.
            place: where it will work.

        Returns:
            This one, to be configured, where its weights are shaped as the options ask; one of another kind
            that shares them; None where they do not fit.
        """
        if type(self.options) is not type(options):
            return None
        if not options.LEARNS:
            return self
        with torch.device("meta"):
            fresh = options.build(place)
        own, other = ({name: t.shape for name, t in each.state_dict().items()} for each in (self, fresh))
        return self if own == other else None

    def misfits(self, state: Mapping[str, Tensor], prefix: str) -> list[str]:
        """What of the tensors `SIZED_BY_FILES` of a state does not fit together.

        Args:
            state: the state dict.
            prefix: what it puts before the names.
        """
        return []

    def imitate_training(self) -> None:
        """Spreads random weights as training spreads them, to measure with; most scorers have none."""

    def place_at(self, layer: int) -> None:
        """Takes over the index of the layer that it scores for."""
        self.layer = layer

    @abstractmethod
    def macs(self, spec: ListSpec, num_heads: int, head_dim: int) -> int:
        """Multiply-accumulates per image of everything that the scorer multiplies."""

    def factors(self, q: Tensor, k: Tensor, layout: Layout, tile: int) -> tuple[Tensor, Tensor]:
        """Differentiable factors of the scores, `coefficients @ basis.T`, for training.

        Args:
            q: [B, H, N, d] unscaled queries, prefix included.
            k: [B, H, N, d] keys.
            layout: where the tokens lie.
            tile: side of the tile of queries that share a list.

        Returns:
            Coefficients [B, H, rows, K] and basis [N, K]. Which coefficients are kept carries no gradient.

        Raises:
            TypeError: the scorer has nothing to learn.
        """
        raise TypeError(f"{type(self).__name__} has nothing to learn; train a low-rank scorer")

    def can_fuse(self, spec: ListSpec) -> bool:
        """Whether `FUSED` can make such lists; else scores are written."""
        return spec.tile > 1

    def fused_sizes(self, spec: ListSpec, head_dim: int) -> dict[str, int]:
        """Sizes that backends of `FUSED` may limit, see `Backend.limits`."""
        return {}

    def fused_lists(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec, backend: str) -> Connectivity:
        """Lists by `FUSED`, whose kernels keep the scores to themselves.

        Args:
            q: [B, H, N, d] unscaled queries, prefix included.
            k: [B, H, N, d] keys.
            v: [B, H, N, d] values.
            spec: the lists wanted.
            backend: one that it has kernels for.
        """
        raise NotImplementedError(f"{type(self).__name__} names an operator and does not call it")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> Tensor | None:
        """Attention over the lists that the scorer would give, by one operator.

        There is none, and None is returned, where these inputs have no such operator, gradients are wanted,
        or hooks ask for lists.

        Args:
            q: [B, H, N, d] unscaled queries, prefix included.
            k: [B, H, N, d] keys.
            v: [B, H, N, d] values.
            spec: the lists wanted.

        Returns:
            [B, H, N, d].
        """
        if self.ATTENDING is None or spec.present is not None or wants_gradients(q, k, v):
            return None
        if self._forward_hooks or self._forward_pre_hooks:
            return None
        kind = (type(self), self.options, spec, q.dtype, q.device, q.shape[0] * q.shape[1], q.shape[3])
        # compiled code cannot look up what it is made of
        derive: Any = attending_arguments
        derive = derive.__wrapped__ if torch.compiler.is_compiling() else derive
        arguments = derive(*kind)
        if arguments is None:
            return None
        operator, *sizes = arguments
        with without_autocast(q.device):
            out: Tensor = operator(q, k, v, *sizes)
        return out

    @classmethod
    def attending_sizes(cls, options: Any, spec: ListSpec) -> tuple[Any, ...]:
        """What `ATTENDING` takes behind q, k and v, all but the backend."""
        raise NotImplementedError(f"{cls.__name__} names an operator and does not say its sizes")

    def elements_per_row(self, spec: ListSpec) -> int:
        """Size of the largest tensor that one row of one head needs."""
        return spec.layout.tokens

    @torch.no_grad()
    def scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> Tensor:
        """All scores at once, [B or 1, H, rows, N]: for tests and pictures."""
        with without_autocast(q.device):
            return self.row_scores(q, k, v, spec)(0, spec.rows)

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> Connectivity:
        """Key lists of one layer, of what `row_scores` takes; they carry no gradient."""
        B, H = q.shape[:2]
        chunk_elements = tuned.SCORE_CHUNK.get(q.device.type, tuned.SCORE_CHUNK["cuda"])
        # compiled and exported code is for any batch: it must not depend on B how often a loop is run
        images = 1 if torch.compiler.is_compiling() else B
        chunk = max(1, chunk_elements // max(1, images * H * self.elements_per_row(spec)))
        # scores are compared in fp32, so autocast must not round them
        with without_autocast(q.device):
            if self.FUSED is not None and spec.present is None and self.can_fuse(spec):
                sizes = self.fused_sizes(spec, q.shape[-1])
                chosen = resolve_backend(spec.backend, self.FUSED.short_name, q.device, q, sizes)
                if chosen in self.FUSED.backends:
                    return self.fused_lists(q, k, v, spec, chosen)
            own = spec.layout.square_tokens(spec.tile, q.device)
            scores = self.row_scores(q, k, v, spec)
            if spec.present is not None:
                scores = _only(scores, spec.present)
            lists = [
                select_topk(
                    scores(start, min(start + chunk, spec.rows)),
                    spec.budget,
                    forced=spec.forced,
                    own=own[start : start + chunk],
                    backend=spec.backend,
                )
                for start in range(0, spec.rows, chunk)
            ]
        indices = torch.cat(lists, 2).expand(B, H, -1, -1)
        return spec.connectivity(indices)


def _only(scores: RowScores, present: Tensor) -> RowScores:
    """Scores in which keys that are not present [B, N] come last."""
    return lambda start, stop: scores(start, stop).masked_fill(~present[:, None, None], -torch.inf)


@functools.lru_cache(_REMEMBERED)
def attending_arguments(
    scorer: Any,
    options: ScorerOptions,
    spec: ListSpec,
    dtype: torch.dtype,
    device: torch.device,
    pairs: int,
    head_dim: int,
) -> tuple[Any, ...] | None:
    """The operator that attends at once and what it takes behind q, k and v; None if there is none for them.

    Args:
        scorer: its class.
        options: of the scorer.
        spec: the lists wanted.
        dtype: of q, k and v.
        device: where they are.
        pairs: batch elements times heads.
        head_dim: d.
    """
    operator: Operator | None = scorer.ATTENDING
    backend = tuned.FASTER.get(device.type, ("torch",))[0] if spec.backend == "auto" else spec.backend
    if operator is None or backend not in operator.backends or spec.scale <= 0:
        return None
    if not takes(backend, device, dtype, head_dim, {"pairs": pairs, "windows": spec.windows}):
        return None
    resolve_backend(spec.backend, operator.short_name, device)  # says what it is
    return operator, *scorer.attending_sizes(options, spec), backend
