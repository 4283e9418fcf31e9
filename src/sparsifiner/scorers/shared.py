"""Lists that several layers share: one layer scores, those behind it attend by the same lists."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.scorers.base import ListSpec, RowScores, Scorer


class SharedLists:
    """Key lists on their way from the layer that scores to those that share them, per thread."""

    def __init__(self) -> None:
        self._call = threading.local()

    def put(self, connectivity: Connectivity | None) -> None:
        """Holds lists for the layers behind, which have other keys and values; None lets them go."""
        self._call.connectivity = None if connectivity is None else connectivity.alone()
        self._call.taken = 0

    def take(self, place: int) -> Connectivity:
        """The lists of this thread's call.

        Args:
            place: of the layer that takes them in its group; 1 comes right behind the one that scores.

        Raises:
            RuntimeError: the layers of the group in front have not been called before this one.
        """
        connectivity = getattr(self._call, "connectivity", None)
        if connectivity is None or self._call.taken != place - 1:
            raise RuntimeError(
                "the layer that scores for this one has not been called before it, or one between them; call "
                "the whole model, sparsifiner.sparsify(model) again once layers were removed or changed "
                "places, and torch.utils.checkpoint with all layers that share lists at once"
            )
        self._call.taken = place
        assert isinstance(connectivity, Connectivity)
        return connectivity

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a thread-local note neither copies nor pickles."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores it with no lists noted."""
        self._call = threading.local()


class BorrowingScorer(Scorer):
    """Takes the lists of an earlier layer and has no parameters.

    Args:
        lists: where they are.
        place: of the layer in its group, from 1.
        is_last: whether no layer behind wants them.
    """

    def __init__(self, lists: SharedLists, place: int, is_last: bool) -> None:
        nn.Module.__init__(self)  # there are neither options nor weights
        self.borrow(lists, place, is_last)

    def borrow(self, lists: SharedLists, place: int, is_last: bool) -> None:
        """Changes where the lists come from."""
        self.lists = lists
        self.place = place
        self.is_last = is_last

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`.

        Raises:
            TypeError: there are no scores here.
        """
        raise TypeError("this layer shares the lists of an earlier one and has no scores of its own")

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> Connectivity:
        """See `Scorer.forward`: the lists that are there."""
        connectivity = self.lists.take(self.place)
        if self.is_last:
            self.lists.put(None)
        return connectivity

    def macs(self, spec: ListSpec, num_heads: int, head_dim: int) -> int:
        """See `Scorer.macs`."""
        return 0

    def extra_repr(self) -> str:
        """Place in the group."""
        return f"place={self.place}, is_last={self.is_last}"
