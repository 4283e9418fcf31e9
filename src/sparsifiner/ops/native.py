"""The library of native CPU kernels: where it is, why it is missing, and its C interface."""

import ctypes
import enum
import functools
import os
import platform
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# torch comes first: the library then shares the OpenMP threads that torch has loaded
import torch
from torch import Tensor

LIBRARY_VARIABLE = "SPARSIFINER_LIBRARY"
ISA_VARIABLE = "SPARSIFINER_ISA"
# as in csrc/sparsifiner.h
INTERFACE = 2
_FILE = "_native.so"
_REINSTALL = "pip install --force-reinstall --no-deps ."


class Isa(enum.IntEnum):
    """Instruction sets, each including those before it, as in csrc/sparsifiner.h."""

    NONE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3


class Status(enum.IntEnum):
    """`SparsifinerStatus`: how a call ended."""

    DONE = 0
    NO_MEMORY = 1
    UNKNOWN_ISA = 2


class Dtype(enum.IntEnum):
    """Element types of q, k, v and out."""

    FP32 = 0
    BF16 = 1


# Rows are whole vectors of the widest instruction set.
HEAD_DIM_STEP = 16
DTYPES = {torch.float32: Dtype.FP32, torch.bfloat16: Dtype.BF16}


def _fields(*groups: str) -> tuple[tuple[str, type], ...]:
    """Fields of a structure, in order; each group is a type and the names of fields that have it."""
    types = {
        "address": ctypes.c_void_p,
        "float": ctypes.c_float,
        "int32": ctypes.c_int32,
        "int64": ctypes.c_int64,
    }
    fields: list[tuple[str, type]] = []
    for kind, *names in map(str.split, groups):
        fields += [(name, NativeTensor if kind == "tensor" else types[kind]) for name in names]
    return tuple(fields)


class Lists(ctypes.Structure):
    """`SparsifinerLists`: key lists that are to be written."""

    _fields_ = _fields(
        "int64 total rows tokens budget forced own_size",
        "address own indices",
    )


class NativeTensor(ctypes.Structure):
    """`SparsifinerTensor`: [B, H, N, d] and the strides of its first three axes, in elements."""

    _fields_ = _fields(
        "address data",
        "int64 batch head token",
    )


class Predictor(ctypes.Structure):
    """`SparsifinerPredictor`: the low-rank predictor's coefficients, which are to be written."""

    _fields_ = _fields(
        "tensor q k",
        "int32 query_dtype key_dtype",
        "int64 batch heads rows tokens head_dim basis_size reduced_dim",
        "address down query_weight query_bias key_weight key_bias coefficients",
        "float temperature",
    )


class Impact(ctypes.Structure):
    """`SparsifinerImpact`: what impact scores are made of."""

    _fields_ = _fields(
        "tensor q k v",
        "int32 dtype",
        "float scale",
        "int64 batch heads tokens head_dim prefix squares square_size",
        "address square_tokens",
        "int64 members",
        "address tile_squares",
        "int64 windows window_size",
        "address window_tokens",
    )


class Attention(ctypes.Structure):
    """`SparsifinerAttention`: attention over lists and summaries."""

    _fields_ = _fields(
        "tensor q k v out",
        "int32 dtype",
        "float scale",
        "int64 batch heads tokens head_dim prefix tiles tile_size",
        "address tile_tokens",
        "int64 keys",
        "address indices",
        "int64 windows window_size",
        "address window_tokens window_of",
    )


def address_of(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Where a contiguous tensor begins.

    Args:
        name: what an error calls it.
        x: the tensor.
        dtype: that C takes it for.
        *shape: that C takes it for.

    Raises:
        ValueError: it is another tensor than C would take it for.
    """
    _check(name, x, dtype, shape)
    if not x.is_contiguous():
        raise ValueError(f"native kernels: {name} must be contiguous, got strides {x.stride()}")
    return x.data_ptr()


def tensor_of(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> NativeTensor:
    """[B, H, N, d] of any strides with contiguous rows, as C knows it; see `address_of`."""
    _check(name, x, dtype, shape)
    if dtype not in DTYPES or shape[-1] % HEAD_DIM_STEP or x.stride(-1) != 1:
        raise ValueError(
            f"native kernels: {name} must be fp32 or bf16 with contiguous rows of a multiple of "
            f"{HEAD_DIM_STEP} numbers, got {dtype} {list(shape)} with strides {x.stride()}"
        )
    return NativeTensor(x.data_ptr(), *x.stride()[:3])


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.device.type != "cpu" or x.layout != torch.strided or x.dtype != dtype or x.shape != shape:
        raise ValueError(
            f"native kernels: {name} must be {dtype} {list(shape)} on the CPU, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )


def call(function: str, *arguments: Any) -> None:
    """Calls a function of the library with the best instruction set and as many threads as torch has.

    Args:
        function: its name without "sparsifiner_".
        *arguments: behind these two; structures are passed by reference.

    Raises:
        MemoryError: the kernel did not get the memory that it works in; what it writes is undefined.
        RuntimeError: native kernels do not run here; exported programs may be asked to all the same.
    """
    native = library()
    if native is None or why_not():
        raise RuntimeError(why_not())
    by_reference = (ctypes.byref(each) if isinstance(each, ctypes.Structure) else each for each in arguments)
    status = getattr(native, f"sparsifiner_{function}")(best_isa(), torch.get_num_threads(), *by_reference)
    if status == Status.NO_MEMORY:
        raise MemoryError(
            f"native kernels: {function} found no memory to work in; take fewer images at a time, or "
            "backend='torch'"
        )
    if status != Status.DONE:
        raise RuntimeError(f"native kernels: {function} ended with {Status(status).name}; {_REINSTALL}")


def library() -> ctypes.CDLL | None:
    """The library, None where it is missing; `why_missing` says why. It is looked for once."""
    return _load()[0]


def why_missing() -> str:
    """Why there is no library and what to do about it, "" where there is one."""
    return _load()[1]


def why_not() -> str:
    """Why native kernels do not run here and what to do about it, "" where they do.

    Raises:
        ValueError: SPARSIFINER_ISA asks for what this machine does not have.
    """
    if library() is None:
        return why_missing()
    if _machine_isa() == Isa.NONE:
        return "native CPU kernels need a processor with AVX2 and FMA"
    if best_isa() == Isa.NONE:
        return f"native CPU kernels are switched off by {ISA_VARIABLE}=none; unset it"
    return ""


def best_isa() -> Isa:
    """The instruction set that kernels use: the machine's best, or a lower one that SPARSIFINER_ISA names.

    `Isa.NONE` where there is no library.

    Raises:
        ValueError: SPARSIFINER_ISA is unknown or asks for more than there is.
    """
    best = _machine_isa()
    asked = os.environ.get(ISA_VARIABLE)
    if not asked:
        return best
    choices = [isa.name.lower() for isa in Isa]
    if asked not in choices:
        raise ValueError(f"{ISA_VARIABLE}={asked!r} is unknown; choose one of {', '.join(choices)}")
    isa = Isa[asked.upper()]
    if isa > best:
        reason = f" ({why_missing()})" if why_missing() else ""
        possible = ", ".join(choices[: best + 1])
        raise ValueError(f"{ISA_VARIABLE}={asked!r} cannot be used here{reason}; choose one of {possible}")
    return isa


@functools.cache
def _machine_isa() -> Isa:
    native = library()
    return Isa.NONE if native is None else Isa(native.sparsifiner_best_isa())


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why."""
    file = _find()
    if file is None:
        return None, _why_not_installed()
    try:
        native = ctypes.CDLL(str(file))
        _declare(native)
    except (OSError, AttributeError) as error:  # AttributeError: a function is not in the library
        return None, f"native CPU kernels cannot be loaded from {file}: {error}; reinstall with {_REINSTALL}"
    if native.sparsifiner_interface() != INTERFACE:
        return None, (
            f"native CPU kernels in {file} are of another version (interface "
            f"{native.sparsifiner_interface()}, needed is {INTERFACE}); reinstall with {_REINSTALL}"
        )
    return native, ""


def _find() -> Path | None:
    chosen = os.environ.get(LIBRARY_VARIABLE)
    if chosen:
        return Path(chosen)
    # an editable install has two folders, one for the sources and one for what was built
    package = find_spec("sparsifiner")
    folders = package.submodule_search_locations if package else None
    files = (Path(folder) / _FILE for folder in folders or ())
    return next((file for file in files if file.is_file()), None)


def _why_not_installed() -> str:
    machine, system = platform.machine(), sys.platform
    if machine.lower() not in {"x86_64", "amd64"} or system not in {"linux", "darwin"}:
        return f"native CPU kernels are for x86-64 on Linux, this is {machine} on {system}"
    return (
        "native CPU kernels are missing: they could not be built when this was installed, which needs g++ 12 "
        f"or newer with OpenMP; install it and run {_REINSTALL} in the source folder"
    )


def _declare(native: ctypes.CDLL) -> None:
    """Types of the functions of csrc/sparsifiner.h."""
    call = (ctypes.c_int32, ctypes.c_int32)  # isa, threads

    def declare(function: Callable[..., object], result: type | None, *arguments: type) -> None:
        function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]

    lists, pointer, size = ctypes.POINTER(Lists), ctypes.c_void_p, ctypes.c_int64
    declare(native.sparsifiner_interface, ctypes.c_int32)
    declare(native.sparsifiner_best_isa, ctypes.c_int32)
    status = ctypes.c_int32
    declare(native.sparsifiner_coefficients, status, *call, ctypes.POINTER(Predictor))
    declare(native.sparsifiner_select_topk, status, *call, lists, pointer)
    declare(native.sparsifiner_select_lowrank, status, *call, lists, pointer, pointer, size, size)
    declare(native.sparsifiner_select_impact, status, *call, lists, ctypes.POINTER(Impact))
    declare(native.sparsifiner_attend, status, *call, ctypes.POINTER(Attention))
