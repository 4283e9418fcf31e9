"""Sparse attention beside its peers: one data set, one teacher, one recipe."""

from sparsifiner.compare.methods import METHODS, Budget, Geometry
from sparsifiner.compare.run import Comparison, compare

__all__ = ["METHODS", "Budget", "Comparison", "Geometry", "compare"]
