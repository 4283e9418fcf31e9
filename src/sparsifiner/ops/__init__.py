"""The two operations that everything is built on, each a folder with its own reference."""

from sparsifiner.ops.select import select_topk
from sparsifiner.ops.sparse_attention import sparse_attention

__all__ = ["select_topk", "sparse_attention"]
