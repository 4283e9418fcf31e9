"""Which backends there are, and the one rule by which "auto" chooses."""

import functools
import logging

import torch

BACKENDS = ("reference", "torch")

_logger = logging.getLogger(__name__)


def resolve_backend(backend: str) -> str:
    """Turns "auto" into a backend and checks an explicit one, which is never replaced.

    Raises:
        ValueError: `backend` is unknown.
    """
    if backend == "auto":
        if not torch.compiler.is_compiling():  # compiled code cannot log
            _say_choice("torch")
        return "torch"
    if backend not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend={backend!r} is not available; choose one of {names}")
    return backend


@functools.cache
def _say_choice(backend: str) -> None:
    _logger.info("sparsifiner: backend 'auto' uses '%s'", backend)
