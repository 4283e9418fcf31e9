"""What torch knows of an operation: one schema, whichever backend computes it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsifiner.eager import is_plain
from sparsifiner.lazy import resolve

_NAMESPACE = "sparsifiner"
_library: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


class Operator:
    """An operation with kernels by backend, as an operator of torch and as a plain call.

    Compilers, exporters, autograd and counters see the operator. Where none of them is there to see it, the
    backend is called without it.

    Args:
        schema: its name and arguments, of which the last is `str backend`.
        kernels: by backend "package.module:function", imported when first called, which takes the arguments
            before the last. Each may be called for tensors of any device: Triton's interpreter computes on
            the CPU.
        fake: the results' shapes, from all arguments.
        flops: floating-point operations, from all arguments with shapes in place of tensors; None for none.
        gradient: the backward and what saves for it, as `torch.library.register_autograd` takes them; where
            there is none whoever asks for one is told so.

    Attributes:
        short_name: without its namespace.
        name: with it.
        backends: those that have a kernel.
    """

    def __init__(
        self,
        schema: str,
        kernels: Mapping[str, str],
        fake: Callable[..., Any],
        flops: Callable[..., int] | None = None,
        gradient: tuple[Callable[..., Any], Callable[..., None]] | None = None,
    ) -> None:
        self.short_name = schema.partition("(")[0]
        self.name = f"{_NAMESPACE}::{self.short_name}"
        self.backends = frozenset(kernels)
        self._homes = kernels
        self._kernels: dict[str, Callable[..., Any]] = {}
        _library.define(schema)
        for device in ("CPU", "CUDA"):
            _library.impl(self.short_name, self._compute, device)
        torch.library.register_fake(self.name, fake, lib=_library)
        packet = getattr(torch.ops.sparsifiner, self.short_name)
        self._operator = packet.default
        backward, setup_context = gradient or (self._refuse, None)
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_library)
        if flops is not None:
            register_flop_formula(packet)(lambda *shapes, **unused: flops(*shapes))

    def __call__(self, *arguments: Any) -> Any:
        """Computes, as the last argument says which backend does."""
        if is_plain(*[x for x in arguments if isinstance(x, Tensor)]):
            return self._compute(*arguments)
        return self._operator(*arguments)

    def kernel(self, backend: str) -> Callable[..., Any]:
        """What a backend computes it by, for tensors that are plain."""
        kernel = self._kernels.get(backend)
        if kernel is None:
            kernel = self._kernels[backend] = resolve(self._homes[backend])
        return kernel

    def _refuse(self, *unused: Any) -> None:
        raise RuntimeError(f"{self.name} has no gradient; take backend='torch'")

    def _compute(self, *arguments: Any) -> Any:
        return self.kernel(arguments[-1])(*arguments[:-1])
