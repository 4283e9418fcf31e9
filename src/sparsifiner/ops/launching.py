"""Three ways to run Triton kernels one after another: by C, by Triton's compiled launchers, or ordinarily.

The first two know kernels that were compiled, and addresses; they derive nothing. One call into C runs what
`why_not_by_c` finds no fault with, Triton's launchers all else that was compiled. Ordinary launches are
for the interpreter, and while launch hooks are set.
"""

import ctypes
import functools
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# as in csrc/launch.cpp
INTERFACE = 1
MOST_PARAMETERS = 64
_FILE = "_launch.so"
# Types of a kernel's parameters in its PTX, by those of its signature; pointers come first.
_PTX_TYPES = {"i32": "u32", "u32": "u32", "i64": "u64", "u64": "u64", "fp32": "f32"}
_POINTER = "u64"
# Scratch memory, for launches and for profiles, which kernels of Triton 3.6 to 3.9 take behind the rest.
_HIDDEN = (_POINTER, _POINTER)
_RELAXED = 2


class Address(NamedTuple):
    """Memory of a launch: so many bytes behind the beginning of what is in a slot."""

    slot: int
    offset: int


Argument = Address | int | float | None


@dataclass(frozen=True)
class Launch:
    """One launch, with all that it is told.

    Attributes:
        kernel: in Triton.
        grid: programs along three axes, none of them 0.
        arguments: of the kernel, in its order, all but constants.
        options: its constants, and options of the compiler.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def values(self) -> dict[str, Any]:
        """What each of the kernel's parameters is told, constants among them, in their order."""
        names: list[str] = self.kernel.arg_names
        told = {**self.options, **dict(zip(names, self.arguments, strict=False))}
        return {name: told[name] for name in names if name in told}


class Replay(Protocol):
    """Runs launches that were made ready."""

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Launches all in a stream.

        Args:
            addresses: of what is in each slot.
            stream: as the driver knows it.

        Raises:
            RuntimeError: the driver refused.
        """


def replay_by_c(launches: Sequence[Launch], kernels: Sequence[Any]) -> Replay | str:
    """Launches by one call into C, or why not.

    Args:
        launches: their arguments are those of `Argument`.
        kernels: what Triton compiled for each of them, loaded in the current context.
    """
    library = _library()
    if isinstance(library, str):
        return library
    reasons = (why_not_by_c(kernel, launch) for kernel, launch in zip(kernels, launches, strict=True))
    if reason := next(filter(None, reasons), ""):
        return reason
    context = ctypes.c_void_p()
    if status := library.sparsifiner_current_context(ctypes.byref(context)):
        return _driver_error(library, status)
    table = (_CLaunch * len(launches))()
    # the table holds addresses alone
    held: list[Any] = [*kernels]
    for entry, launch, kernel in zip(table, launches, kernels, strict=True):
        parameters = [
            _CParameter(*_encoded(launch.values()[name], type_))
            for name, type_ in _parameters(kernel).items()
        ]
        parameters += [_CParameter(-1, 0)] * len(_HIDDEN)
        array = (_CParameter * len(parameters))(*parameters)
        held.append(array)
        entry.function, entry.grid[:] = kernel.function, launch.grid
        entry.threads = kernel.metadata.num_warps * kernel.metadata.warp_size
        entry.shared_bytes, entry.parameter_count = kernel.metadata.shared, len(array)
        entry.parameters = array
    return _ReplayByC(library, table, context, held)


class _ReplayByC:
    def __init__(self, library: ctypes.CDLL, table: Any, context: ctypes.c_void_p, held: list[Any]) -> None:
        self._launch, self._library, self._held = library.sparsifiner_launch, library, (table, held)
        self._table, self._count, self._context = ctypes.addressof(table), len(table), context.value

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """See `Replay`."""
        bases = _array_of(len(addresses))(*addresses)
        if status := self._launch(self._table, self._count, self._context, stream, bases):
            raise RuntimeError(f"launches failed: {_driver_error(self._library, status)}")


def replay_by_triton(launches: Sequence[Launch], kernels: Sequence[Any]) -> Replay:
    """Launches by Triton's compiled launchers; see `replay_by_c`.

    `CompiledKernel.run` takes the same arguments in Triton 3.6 to 3.9, whatever the launcher behind it does.
    """
    calls = [
        (kernel.run, launch.grid, kernel.function, kernel.packed_metadata, tuple(launch.values().values()))
        for kernel, launch in zip(kernels, launches, strict=True)
    ]

    def replay(addresses: Sequence[int], stream: int) -> None:
        for run, grid, function, metadata, values in calls:
            told = (addresses[x.slot] + x.offset if type(x) is Address else x for x in values)
            run(*grid, stream, function, metadata, None, None, None, *told)

    return replay


def why_not_by_c(kernel: Any, launch: Launch) -> str:
    """Why C cannot launch a compiled kernel as Triton does, empty if it can.

    It can where the parameters in the kernel's PTX are exactly those that the launch tells it and hidden
    pointers to scratch memory of which it takes none.
    """
    metadata, name = kernel.metadata, kernel.metadata.name
    for special in ("launch_cooperative_grid", "launch_pdl", "tensordesc_meta", "instrumentation_mode"):
        if getattr(metadata, special, None):
            return f"{name} asks for {special}"
    for size in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, size, 1) != 0:
            return f"{name} takes scratch memory"
    if metadata.num_ctas != 1:
        return f"{name} asks for a cluster"
    types = [
        _POINTER if type_[0] == "*" else _PTX_TYPES.get(type_, "") for type_ in _parameters(kernel).values()
    ]
    if "" in types or len(types) + len(_HIDDEN) > MOST_PARAMETERS:
        return f"{name} has parameters of other types, or too many of them"
    found = _ptx_parameters(kernel.asm.get("ptx", ""), name)
    if found != [*types, *_HIDDEN]:
        return f"{name} has other parameters in its PTX than it is told"
    lacking = [name for name in _parameters(kernel) if name not in launch.values()]
    return f"{name} is not told {', '.join(lacking)}" if lacking else ""


def hooked() -> bool:
    """Whether launch hooks are set, which only ordinary launches call."""
    runtime = _runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    try:  # chains of hooks
        return bool(enter.calls or leave.calls)
    except AttributeError:  # a function, or None
        return enter is not None or leave is not None


class RelaxedCapture:
    """Within it a thread may load kernels while a stream of it is captured."""

    def __enter__(self) -> None:
        self._mode = ctypes.c_int32(_RELAXED)
        self._exchange()

    def __exit__(self, *error: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        status = _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))
        if status:
            raise RuntimeError(f"captures: CUDA driver error {status}")


class _CParameter(ctypes.Structure):
    _fields_ = (("slot", ctypes.c_int64), ("value", ctypes.c_int64))


class _CLaunch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("parameter_count", ctypes.c_uint32),
        ("parameters", ctypes.POINTER(_CParameter)),
    )


def _parameters(kernel: Any) -> dict[str, str]:
    """Types of the parameters that a kernel was compiled with, by name; constants are none of them."""
    return {name: type_ for name, type_ in kernel.src.signature.items() if type_ != "constexpr"}


def _ptx_parameters(ptx: str, name: str) -> list[str]:
    """Types of the parameters of a kernel's entry, without those of pointers to where."""
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    return re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", entry[1]) if entry else []


def _encoded(value: Argument, type_: str) -> tuple[int, int]:
    """Slot, -1 for none, and the 8 bytes of a parameter."""
    if isinstance(value, Address):
        return value.slot, value.offset
    if value is None:  # a pointer to nothing
        return -1, 0
    if type_ == "fp32":
        return -1, int.from_bytes(struct.pack("<f", value), "little")
    return -1, int(value)


@functools.cache
def _array_of(length: int) -> Any:
    return ctypes.c_int64 * length


def _driver_error(library: ctypes.CDLL, status: int) -> str:
    text: bytes = library.sparsifiner_driver_error(status)
    return f"{text.decode()} (CUDA driver error {status})"


@functools.cache
def _runtime() -> Any:
    """Triton's settings, where hooks are."""
    from triton import knobs  # noqa: PLC0415, Triton is there where there are launches

    return knobs.runtime


@functools.cache
def _driver() -> ctypes.CDLL:
    """The driver, which torch has loaded where there is a GPU."""
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library that launches, or why there is none."""
    package = find_spec("sparsifiner")
    folders = package.submodule_search_locations if package else None
    files = [file for folder in folders or () if (file := Path(folder) / _FILE).is_file()]
    if not files:
        return "the library that launches was not built when sparsifiner was installed"
    try:
        library = ctypes.CDLL(str(files[0]))
        if library.sparsifiner_launch_interface() != INTERFACE:
            return f"{files[0].name} is of another version than sparsifiner"
        pointer, status = ctypes.c_void_p, ctypes.c_int32
        library.sparsifiner_launch.argtypes = (pointer, ctypes.c_int32, pointer, pointer, pointer)
        library.sparsifiner_launch.restype = status
        library.sparsifiner_driver_error.argtypes = (status,)
        library.sparsifiner_driver_error.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"{files[0].name} cannot be loaded: {error}"
    return library
