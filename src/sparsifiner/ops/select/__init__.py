"""Exact top-k selection of keys with one tie rule everywhere."""

from sparsifiner.ops.select.api import select_topk

__all__ = ["select_topk"]
