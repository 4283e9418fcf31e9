"""Registers the paper's models with timm.

After `import sparsifiner`: `timm.create_model("sparsifiner_deit_small_patch16_224", keep=.25)`.
"""

from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from sparsifiner.config import SparsifyConfig
from sparsifiner.convert import sparsify

# the models of the paper, as timm knows them; ours carry the prefix `sparsifiner_`
_DENSE_NAMES = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "lvvit_s",
    "lvvit_m",
)


def _register(dense_name: str) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        keep: float | list[float] | None = None,
        sparsify_config: SparsifyConfig | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        if keep is not None and sparsify_config is not None:
            raise ValueError(f"keep={keep!r} contradicts sparsify_config, which has its own; leave one out")
        dense: nn.Module = timm.create_model(dense_name, pretrained=pretrained, **kwargs)
        if sparsify_config is not None:
            return sparsify(dense, sparsify_config)
        return sparsify(dense, preset="paper", keep=0.25 if keep is None else keep)

    create.__name__ = create.__qualname__ = f"sparsifiner_{dense_name}"
    create.__doc__ = f"""{dense_name} with the paper's sparse attention.

    Args:
        pretrained: load timm's weights of the dense model.
        keep: share of keys that every query attends to, or one per layer; .25 by default.
        sparsify_config: the whole configuration instead of the preset "paper".
        **kwargs: arguments of the dense model.
    """
    create.__module__ = __name__
    globals()[create.__name__] = create  # timm looks entry points up in their module
    registered: Callable[..., nn.Module] = register_model(create)
    return registered


for _name in _DENSE_NAMES:
    _register(_name)
