"""Attention over key lists and summary keys."""

from sparsifiner.ops.sparse_attention.api import sparse_attention

__all__ = ["sparse_attention"]
