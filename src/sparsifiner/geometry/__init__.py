"""Where tokens lie, and which keys belong to which queries."""

from sparsifiner.geometry.connectivity import Connectivity, ScoredLists
from sparsifiner.geometry.curve import CurveLayout
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout, Run, Side

__all__ = ["Connectivity", "CurveLayout", "Layout", "Run", "ScoredLists", "Side", "TokenLayout"]
