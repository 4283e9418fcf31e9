"""Where tokens lie, and which keys belong to which queries."""

from sparsifiner.geometry.connectivity import Connectivity, ScoredLists
from sparsifiner.geometry.grid import TokenLayout

__all__ = ["Connectivity", "ScoredLists", "TokenLayout"]
