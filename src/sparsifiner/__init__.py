"""Vision Transformers that attend only to the token pairs that matter for this image.

Names are loaded when they are first used, so that neither `import sparsifiner` nor options cost torch. When
anything else is used, or an option once timm is there, timm comes to know our models too, as it does after
`import sparsifiner.models`.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from sparsifiner.lazy import loader
from sparsifiner.version import __version__ as __version__

if TYPE_CHECKING:
    from sparsifiner.calibration.budgets import calibrate
    from sparsifiner.config import SparsifyConfig
    from sparsifiner.convert import desparsify, sparsify, why_not
    from sparsifiner.geometry.connectivity import Connectivity
    from sparsifiner.macs import count_macs
    from sparsifiner.models.adapter import save_adapter
    from sparsifiner.models.loading import load_adapter
    from sparsifiner.scorers import (
        BigBird,
        Impact,
        LowRank,
        Oracle,
        Pooled,
        Random,
        Released,
        Strided,
        Window,
    )
    from sparsifiner.tokens import DynamicViT, EViT, ToMe
    from sparsifiner.tracing import trace

__all__ = [
    "BigBird",
    "Connectivity",
    "DynamicViT",
    "EViT",
    "Impact",
    "LowRank",
    "Oracle",
    "Pooled",
    "Random",
    "Released",
    "SparsifyConfig",
    "Strided",
    "ToMe",
    "Window",
    "calibrate",
    "count_macs",
    "desparsify",
    "load_adapter",
    "save_adapter",
    "sparsify",
    "trace",
    "why_not",
]

# options, which cost no torch
_OPTIONS = {
    "BigBird": "sparsifiner.scorers",
    "DynamicViT": "sparsifiner.tokens",
    "EViT": "sparsifiner.tokens",
    "Impact": "sparsifiner.scorers",
    "LowRank": "sparsifiner.scorers",
    "Oracle": "sparsifiner.scorers",
    "Pooled": "sparsifiner.scorers",
    "Random": "sparsifiner.scorers",
    "Released": "sparsifiner.scorers",
    "SparsifyConfig": "sparsifiner.config",
    "Strided": "sparsifiner.scorers",
    "ToMe": "sparsifiner.tokens",
    "Window": "sparsifiner.scorers",
}
_HOMES = {
    "Connectivity": "sparsifiner.geometry.connectivity",
    "calibrate": "sparsifiner.calibration.budgets",
    "count_macs": "sparsifiner.macs",
    "desparsify": "sparsifiner.convert",
    "load_adapter": "sparsifiner.models.loading",
    "save_adapter": "sparsifiner.models.adapter",
    "sparsify": "sparsifiner.convert",
    "trace": "sparsifiner.tracing",
    "why_not": "sparsifiner.convert",
}


def _register_models() -> None:
    import_module("sparsifiner.models")


def _register_models_with_timm() -> None:
    if "timm" in sys.modules:  # else nobody can ask it for a model yet, and options shall cost no torch
        _register_models()


_load_options = loader(__name__, _OPTIONS, before=_register_models_with_timm)
_load = loader(__name__, _HOMES, before=_register_models)


def __getattr__(name: str) -> object:
    return _load_options(name) if name in _OPTIONS else _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
