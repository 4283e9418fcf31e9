"""Whether an operation on tensors computes now, and nobody else has to see it."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_C = torch._C
_is_tls_included = _C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = _C.DispatchKey.PreDispatch
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether autograd, backward or forward, follows these tensors."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    duals = (forward_ad.unpack_dual(x) for x in tensors)  # type: ignore[no-untyped-call]
    return any(dual.tangent is not None for dual in duals)


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing follows operations on these tensors.

    That is no gradient, compiler, tracer, transform of torch.func, dispatch or function mode, and no subclass
    of Tensor: then an operation may be called without the operator around it, which costs time.
    """
    if torch.compiler.is_compiling() or wants_gradients(*tensors):
        return False
    if _C._len_torch_dispatch_stack() or _C._len_torch_function_stack() or _is_tls_included(_PRE_DISPATCH):
        return False
    if _C._get_tracing_state() is not None or _C._are_functorch_transforms_active():
        return False
    return all(type(x) in _PLAIN for x in tensors)


def can_be_read(x: Tensor) -> bool:
    """Whether entries can be looked at: not while compiling, tracing, transforming or capturing."""
    if torch.compiler.is_compiling() or _C._get_tracing_state() is not None:
        return False
    # whether there is any mode is known sooner than whether one of them traces
    has_mode = _C._len_torch_dispatch_stack() or _is_tls_included(_PRE_DISPATCH)
    if has_mode and get_proxy_mode() is not None:
        return False
    if type(x) is not Tensor or x.is_meta or _C._functorch.is_batchedtensor(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
