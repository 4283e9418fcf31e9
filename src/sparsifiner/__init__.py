"""Vision Transformers that attend only to the token pairs that matter for this image.

Names are loaded when they are first used, so that `import sparsifiner` costs no torch; timm then knows our
models too, as it does after `import sparsifiner.models`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sparsifiner.lazy import loader
from sparsifiner.version import __version__ as __version__

if TYPE_CHECKING:
    from sparsifiner.calibration.budgets import calibrate
    from sparsifiner.config import SparsifyConfig
    from sparsifiner.geometry.connectivity import Connectivity
    from sparsifiner.macs import count_macs
    from sparsifiner.models.adapter import save_adapter
    from sparsifiner.models.loading import load_adapter
    from sparsifiner.patch import desparsify, sparsify, why_not
    from sparsifiner.tokens import DynamicViT, EViT, ToMe
    from sparsifiner.tracing import trace

__all__ = [
    "Connectivity",
    "DynamicViT",
    "EViT",
    "SparsifyConfig",
    "ToMe",
    "calibrate",
    "count_macs",
    "desparsify",
    "load_adapter",
    "save_adapter",
    "sparsify",
    "trace",
    "why_not",
]

_HOMES = {
    "Connectivity": "sparsifiner.geometry.connectivity",
    "DynamicViT": "sparsifiner.tokens",
    "EViT": "sparsifiner.tokens",
    "SparsifyConfig": "sparsifiner.config",
    "ToMe": "sparsifiner.tokens",
    "calibrate": "sparsifiner.calibration.budgets",
    "count_macs": "sparsifiner.macs",
    "desparsify": "sparsifiner.patch",
    "load_adapter": "sparsifiner.models.loading",
    "save_adapter": "sparsifiner.models.adapter",
    "sparsify": "sparsifiner.patch",
    "trace": "sparsifiner.tracing",
    "why_not": "sparsifiner.patch",
}

__getattr__ = loader(__name__, _HOMES, before=lambda: import_module("sparsifiner.models"))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
