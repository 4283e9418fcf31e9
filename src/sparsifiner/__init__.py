"""Vision Transformers that attend only to the token pairs that matter for this image."""

__version__ = "0.1.0"

from sparsifiner import models as models
from sparsifiner.config import SparsifyConfig
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.measure.macs import count_macs
from sparsifiner.models.adapter import save_adapter
from sparsifiner.models.loading import load_adapter
from sparsifiner.patch import desparsify, sparsify, why_not
from sparsifiner.tokens import DynamicViT, EViT, ToMe
from sparsifiner.trace import trace

__all__ = [
    "Connectivity",
    "DynamicViT",
    "EViT",
    "SparsifyConfig",
    "ToMe",
    "count_macs",
    "desparsify",
    "load_adapter",
    "save_adapter",
    "sparsify",
    "trace",
    "why_not",
]
