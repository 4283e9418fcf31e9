"""What a scorer is: scores for rows of queries, turned into key lists."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsifiner import tuned
from sparsifiner.geometry.connectivity import Connectivity, ScoredLists
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout, Side
from sparsifiner.ops import select_topk
from sparsifiner.ops.backend import resolve_backend
from sparsifiner.ops.precision import without_autocast
from sparsifiner.scorers.options import Place, ScorerOptions

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

    FUSED_OP = ""  # the operator that scores and selects at once, if there is one
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

    def fused_lists(
        self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec, backend: str
    ) -> Connectivity | None:
        """Lists from kernels that keep the scores to themselves; None where scores must be written.

        Args:
            q: [B, H, N, d] unscaled queries, prefix included.
            k: [B, H, N, d] keys.
            v: [B, H, N, d] values.
            spec: the lists wanted.
            backend: "triton" or "cpu".

        Returns:
            Lists as `select_topk` gives.
        """
        return None

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
        """Key lists of one layer; they carry no gradient.

        Args:
            q: [B, H, N, d] unscaled queries, prefix included.
            k: [B, H, N, d] keys.
            v: [B, H, N, d] values.
            spec: the lists wanted.
        """
        B, H = q.shape[:2]
        chunk_elements = tuned.SCORE_CHUNK.get(q.device.type, tuned.SCORE_CHUNK["cuda"])
        # compiled and exported code is for any batch: it must not depend on B how often a loop is run
        images = 1 if torch.compiler.is_compiling() else B
        chunk = max(1, chunk_elements // max(1, images * H * self.elements_per_row(spec)))
        # scores are compared in fp32, so autocast must not round them
        with without_autocast(q.device):
            if self.FUSED_OP and spec.present is None:
                chosen = resolve_backend(spec.backend, self.FUSED_OP, q.device)
                fused = self.fused_lists(q, k, v, spec, chosen) if chosen in {"triton", "cpu"} else None
                if fused is not None:
                    return fused
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
