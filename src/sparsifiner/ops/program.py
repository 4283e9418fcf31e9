"""Programs: the launches of a GPU operation, made once per kind of call and replayed from then on.

An operation is written down once, as a function of buffers:

```python
@operation
def scale_twice(draft, x, *, scale):
    once, twice = draft.empty(*x.shape, dtype=x.dtype), draft.empty(*x.shape, dtype=x.dtype)
    grid = (triton.cdiv(x.elements, 1024),)
    draft.launch(scale_kernel, grid, x, once, x.elements, scale, BLOCK=1024)
    draft.launch(scale_kernel, grid, once, twice, x.elements, scale, BLOCK=1024)
    return (twice,)

(y,) = scale_twice(x, scale=2.0)  # tensors in, tensors out
```

For each kind of call (shapes, strides, dtypes, alignments and devices of its tensors, and its options) it is
called once, with buffers that say whose memory they are and have no address. Buffers that it returns are
outputs, all others workspace, whose bytes serve again once no later launch reads them. One operation may
write another's launches into its own draft: `scale_twice.write(draft, x, scale=2.0)`.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate, compress
from math import prod
from typing import Any

import torch
from torch import Tensor

from sparsifiner.ops.launching import (
    Address,
    Launch,
    RelaxedCapture,
    Replay,
    hooked,
    replay_by_c,
    replay_by_triton,
)

# Programs of one operation that are kept; a stream of other shapes displaces those used longest ago.
KEPT_PROGRAMS = 512
# Bytes to whose multiples a buffer's offset in the workspace is rounded, as the caching allocator does.
_WORKSPACE_ALIGNMENT = 512
# Kernels are compiled for whether an address is a multiple of these bytes.
_POINTER_ALIGNMENT = 16
_CONTIGUOUS = torch.contiguous_format
# Of the largest element, by which results may differ that atomics add up, the second time.
_ATOMICS_TOLERANCE = 0.02


class Memory:
    """Memory that buffers are views of; one is not another, however alike.

    Attributes:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size


@dataclass(frozen=True)
class Buffer:
    """A strided view of memory that kernels read or write, without an address.

    Attributes:
        memory: whose view it is.
        shape: as of a tensor.
        strides: in elements.
        dtype: of its elements.
        offset: its first element in the memory.
    """

    memory: Memory
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.elements * self.dtype.itemsize

    def __getitem__(self, index: int) -> "Buffer":
        """The part at an index of the first axis."""
        offset = self.offset + index * self.strides[0]
        return replace(self, shape=self.shape[1:], strides=self.strides[1:], offset=offset)

    def since(self, start: int, axis: int) -> "Buffer":
        """The part from an index of an axis on."""
        shape = (*self.shape[:axis], self.shape[axis] - start, *self.shape[axis + 1 :])
        return replace(self, shape=shape, offset=self.offset + start * self.strides[axis])

    def transpose(self, first: int, second: int) -> "Buffer":
        """With two axes exchanged."""
        order = list(range(len(self.shape)))
        order[first], order[second] = second, first
        shape, strides = (tuple(sizes[axis] for axis in order) for sizes in (self.shape, self.strides))
        return replace(self, shape=shape, strides=strides)


class Draft:
    """What an operation writes its buffers and launches to."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.is_exact = True
        self.partly_written: set[Memory] = set()

    def empty(self, *shape: int, dtype: torch.dtype) -> Buffer:
        """New contiguous memory: an output if it is returned, else workspace."""
        strides = tuple(accumulate((1, *shape[:0:-1]), lambda step, length: step * max(1, length)))[::-1]
        return Buffer(Memory(prod(shape) * dtype.itemsize), shape, strides, dtype)

    def launch(self, kernel: Any, grid: Sequence[int], /, *arguments: Any, **options: Any) -> None:
        """Launches a kernel; not at all if its grid is empty.

        Args:
            kernel: in Triton.
            grid: programs along up to three axes.
            *arguments: of the kernel, in its order, all but constants: `Buffer`, numbers or None.
            **options: its constants, and options of the compiler.
        """
        if all(grid):
            x, y, z = (*grid, 1, 1)[:3]
            self.launches.append(Launch(kernel, (x, y, z), arguments, options))

    def adds_in_any_order(self) -> None:
        """Tells that atomics add up results, which may differ from run to run."""
        self.is_exact = False

    def writes_parts_of(self, *buffers: Buffer) -> None:
        """Tells that parts of outputs stay undefined: another launch knows which ones to read."""
        self.partly_written |= {buffer.memory for buffer in buffers}


class Operation:
    """A GPU operation, which makes or finds the program of each call and runs it.

    Args:
        write: writes the launches for inputs, `Buffer` or None, and options, which are hashable, and
            returns the outputs, each the whole of its memory.
    """

    def __init__(self, write: Callable[..., tuple[Buffer, ...]]) -> None:
        self.name = write.__name__
        self.write = write
        self._program = functools.lru_cache(KEPT_PROGRAMS)(self._make)

    def __call__(self, *inputs: Tensor | None, **options: Hashable) -> list[Tensor]:
        """Runs in the current stream of the inputs' device; neither they nor outputs carry gradients.

        Inputs whose rows are not contiguous are copied before.
        """
        kinds = tuple([
            None
            if x is None
            else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % _POINTER_ALIGNMENT)
            for x in inputs
        ])  # fmt: skip
        return self._program(_mark, kinds, tuple(options.items()))(inputs)

    def forget(self) -> None:
        """Drops all programs, as is needed where what they were made of changed besides their key."""
        self._program.cache_clear()

    def kept(self) -> int:
        """Programs that are kept."""
        return self._program.cache_info().currsize

    def _make(
        self, mark: Hashable, kinds: tuple[Any, ...], options: tuple[tuple[str, Hashable], ...]
    ) -> Callable[[Sequence[Tensor | None]], list[Tensor]]:
        if any(kind is not None and kind[1][-1] != 1 for kind in kinds):
            return functools.partial(self._with_copies, dict(options))
        draft = Draft()
        inputs = [None if kind is None else Buffer(Memory(0), *kind[:3]) for kind in kinds]
        outputs = self.write(draft, *inputs, **dict(options))
        return Program(self.name, inputs, outputs, draft)

    def _with_copies(self, options: Mapping[str, Hashable], inputs: Sequence[Tensor | None]) -> list[Tensor]:
        rows = (x if x is None or x.stride(-1) == 1 else x.clone(memory_format=_CONTIGUOUS) for x in inputs)
        return self(*rows, **options)


def operation(write: Callable[..., tuple[Buffer, ...]]) -> Operation:
    """Makes an `Operation` of the function that writes it, and keeps it in mind for `forget_programs`."""
    made = Operation(write)
    _OPERATIONS.append(made)
    return made


_OPERATIONS: list[Operation] = []


_mark: Hashable = None


def mark_programs(mark: Hashable) -> None:
    """Tells programs from now on apart from those of other marks, though their calls are alike.

    For whoever changes what programs are made of besides the call, such as values of `tuned`.
    """
    global _mark  # noqa: PLW0603, one for the process, as those values are
    _mark = mark


def forget_programs() -> None:
    """Drops the programs of all operations; graphs that were captured keep their kernels."""
    for each in _OPERATIONS:
        each.forget()


class Program:
    """The launches of one kind of call. It holds kernels and no tensor, so that threads may share it.

    Args:
        name: of the operation.
        inputs: what the operation got.
        outputs: what it returned.
        draft: what it wrote.
    """

    def __init__(
        self, name: str, inputs: Sequence[Buffer | None], outputs: Sequence[Buffer], draft: Draft
    ) -> None:
        self._made = [(buffer.shape, buffer.strides, buffer.dtype) for buffer in outputs]
        given = [buffer.memory for buffer in (*inputs, *outputs) if buffer is not None]
        places = {memory: Address(slot, 0) for slot, memory in enumerate(given)}
        if len(places) < len(given) or any(each.nbytes != each.memory.size for each in outputs):
            raise ValueError(f"{name}: an output must be the whole of a memory of its own")
        offsets, self._workspace_bytes = _workspace(draft.launches, set(places))
        places |= {memory: Address(len(given), offset) for memory, offset in offsets.items()}
        self._launches = [
            replace(launch, arguments=tuple(_placed(x, places, offsets.keys()) for x in launch.arguments))
            for launch in draft.launches
        ]
        self._is_exact = draft.is_exact
        self._is_whole = [buffer.memory not in draft.partly_written for buffer in outputs]
        self._replay: Replay | None = None
        self._is_settled = False

    def __call__(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """Runs; see `Operation`."""
        tensors = [x for x in inputs if x is not None]
        device = tensors[0].device
        outputs = self._outputs(device)
        tensors += outputs
        if self._workspace_bytes:
            tensors.append(torch.empty(self._workspace_bytes, dtype=torch.uint8, device=device))
        if self._replay is not None and not hooked():
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            self._replay([x.data_ptr() for x in tensors], stream)
        elif self._launches:
            self._run_ordinarily(tensors, outputs, device)
        return outputs

    def _outputs(self, device: torch.device) -> list[Tensor]:
        return [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype in self._made
        ]

    def _run_ordinarily(self, tensors: list[Tensor], outputs: list[Tensor], device: torch.device) -> None:
        """Launches as Triton does, and settles how to launch from now on if that can be found out now."""
        if device.type != "cuda":  # interpreted
            for launch in self._launches:
                _launch(launch, tensors)
            return
        with contextlib.ExitStack() as stack:
            # Triton launches on the current device, which may be another
            stack.enter_context(torch.cuda.device(device))
            capturing = torch.cuda.is_current_stream_capturing()
            if capturing:
                stack.enter_context(RelaxedCapture())
            kernels = [_launch(launch, tensors) for launch in self._launches]
            if not (self._is_settled or capturing or hooked()):
                with contextlib.suppress(torch.OutOfMemoryError):  # the next call may have the room
                    self._settle(kernels, tensors, outputs, device)

    def _settle(
        self, kernels: list[Any], tensors: list[Tensor], outputs: list[Tensor], device: torch.device
    ) -> None:
        """Takes the fastest way whose results are those of ordinary launches."""
        again = self._outputs(device)
        first = len(tensors) - len(outputs) - (self._workspace_bytes > 0)
        addresses = [x.data_ptr() for x in (*tensors[:first], *again, *tensors[first + len(again) :])]
        bare = [
            replace(
                launch, arguments=tuple(x.address if isinstance(x, _Placed) else x for x in launch.arguments)
            )
            for launch in self._launches
        ]
        for make in (replay_by_c, replay_by_triton):
            replay = make(bare, kernels)
            if isinstance(replay, str):
                continue
            replay(addresses, torch._C._cuda_getCurrentRawStream(device.index))
            pairs = compress(zip(outputs, again, strict=True), self._is_whole)
            if all(self._agree(one, other) for one, other in pairs):
                self._replay = replay
                break
        self._is_settled = True

    def _agree(self, one: Tensor, other: Tensor) -> bool:
        if self._is_exact or not one.is_floating_point() or not one.numel():
            bits = _INTEGERS[one.element_size()]
            return torch.equal(one.view(bits), other.view(bits))
        largest = float(one.abs().nan_to_num(nan=0.0, posinf=0.0).amax())
        return torch.allclose(one, other, rtol=0.0, atol=_ATOMICS_TOLERANCE * largest, equal_nan=True)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Placed:
    """A buffer whose memory has a place.

    Attributes:
        buffer: which one.
        place: of its memory.
        in_workspace: whether that is a part of the workspace.
    """

    buffer: Buffer
    place: Address
    in_workspace: bool

    @property
    def address(self) -> Address:
        """Where its first element is."""
        return Address(self.place.slot, self.place.offset + self.buffer.offset * self.buffer.dtype.itemsize)

    def tensor(self, bases: Sequence[Tensor]) -> Tensor:
        """The tensor that it is of those in the slots."""
        buffer, base = self.buffer, bases[self.place.slot].detach()
        if self.in_workspace:
            base = base[self.place.offset : self.place.offset + buffer.memory.size].view(buffer.dtype)
        return base.as_strided(buffer.shape, buffer.strides, base.storage_offset() + buffer.offset)


def _placed(argument: Any, places: Mapping[Memory, Address], workspace: Set[Memory]) -> Any:
    """An argument of a launch; with its place if it is a buffer."""
    if not isinstance(argument, Buffer):
        return argument
    memory = argument.memory
    return _Placed(argument, places[memory], memory in workspace)


def _launch(launch: Launch, bases: Sequence[Tensor]) -> Any:
    """An ordinary launch by Triton; the compiled kernel, None where it is interpreted."""
    arguments = [x.tensor(bases) if isinstance(x, _Placed) else x for x in launch.arguments]
    return launch.kernel[launch.grid](*arguments, **launch.options)


def _workspace(launches: Sequence[Launch], given: Set[Memory]) -> tuple[dict[Memory, int], int]:
    """Offsets of all memory that is not given, and how many bytes hold it.

    Memory is needed from the first launch that names it to the last; what is needed at once does not overlap.
    """
    lives: dict[Memory, tuple[int, int]] = {}
    for index, launch in enumerate(launches):
        for argument in launch.arguments:
            if isinstance(argument, Buffer) and argument.memory not in given:
                first, _ = lives.get(argument.memory, (index, index))
                lives[argument.memory] = first, index
    offsets: dict[Memory, int] = {}
    for memory, (first, last) in lives.items():
        taken = sorted(
            (offset, offset + other.size)
            for other, offset in offsets.items()
            if lives[other][0] <= last and first <= lives[other][1]
        )
        offset = 0
        for start, stop in taken:
            if offset + memory.size <= start:
                break
            offset = max(offset, -(-stop // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT)
        offsets[memory] = offset
    # memory of no bytes has an address all the same
    return offsets, max((max(1, offset + memory.size) for memory, offset in offsets.items()), default=0)
