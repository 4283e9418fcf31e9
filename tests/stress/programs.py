"""Random calls of the GPU operations: what a program replays equals its ordinary launches to the bit.

`python -m tests.stress.programs --calls 1000 --seed 0`. Each call differs from the one before in shape,
strides, alignment, dtype, stream, thread, scale or budget, one of them or more. Gradients that atomics add up
lie within the budget from fp64. With `TRITON_INTERPRET=1` a few calls run without a GPU, all ordinarily.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import torch

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import program, sparse_attention
from sparsifiner.ops.attend_selected.operators import attend_impact, attend_pooled
from sparsifiner.ops.launching import _ReplayByC
from sparsifiner.ops.program import Program
from sparsifiner.ops.select.operators import select_pooled, select_topk
from sparsifiner.ops.sparse_attention.operators import attend, attend_backward
from tests.ops.cases import assert_within_budget, largest_terms

PREFIX = 1
# where calls run: in this thread, or in one of so many others
THREADS = 3
BY_ATOMICS = "gradients by atomics"


@dataclass(frozen=True)
class Call:
    """What one call is told.

    Attributes:
        kind: which operations it makes.
        grid: patches along height and width.
        size: B and H.
        dtype: of queries, keys and values.
        strides: how they lie in memory.
        offset: of their first elements from a multiple of 16 bytes, in elements.
        stream: number of the stream, 0 for the default one.
        thread: number of the thread, 0 for the one that draws the calls.
        scale: factor of the logits.
        keep: share of the keys.
    """

    kind: str
    grid: tuple[int, int]
    size: tuple[int, int]
    dtype: torch.dtype
    strides: str
    offset: int
    stream: int
    thread: int
    scale: float
    keep: float


@dataclass(frozen=True)
class Space:
    """What calls are drawn from.

    Attributes:
        choices: of every field of a call.
        sides: of tiles, of the squares whose mean queries score, and of windows.
        head_dim: of queries, keys and values.
    """

    choices: dict[str, tuple[object, ...]]
    sides: tuple[int, int, int]
    head_dim: int


KINDS = ("attend_impact", "attend_pooled", "select, attend", "gradients in order", BY_ATOMICS)
ALIKE = {
    "kind": KINDS,
    "strides": ("one projection", "contiguous", "tokens last", "expanded"),
    "offset": (0, 1),
    "scale": (0.125, 0.3, 1.0),
    "keep": (0.05, 0.1, 0.3, 1.0),
}
SPACES = {
    "cuda": Space(
        {
            **ALIKE,
            "grid": ((14, 14), (13, 19), (16, 16), (32, 32)),
            "size": ((1, 2), (1, 3), (2, 3), (4, 6)),
            "dtype": (torch.bfloat16, torch.float32),
            "stream": (0, 1, 2),
            "thread": tuple(range(THREADS + 1)),
        },
        (8, 4, 4),
        64,
    ),
    # there are no streams, the interpreter runs in one thread and takes bf16 for integers
    "cpu": Space(
        {
            **ALIKE,
            "grid": ((2, 2), (3, 2)),
            "size": ((1, 1), (1, 2)),
            "dtype": (torch.float16, torch.float32),
            "stream": (0,),
            "thread": (0,),
        },
        (2, 1, 2),
        16,
    ),
}


def first_call(draw: random.Random, space: Space) -> Call:
    """Any call."""
    return Call(**{name: draw.choice(choices) for name, choices in space.choices.items()})


def next_call(draw: random.Random, space: Space, call: Call) -> Call:
    """A call that differs in one field or more."""
    names = [name for name, choices in space.choices.items() if len(choices) > 1]
    changed = draw.sample(names, draw.choice((1, 1, 1, 2, 3)))
    others = {
        name: draw.choice([each for each in space.choices[name] if each != getattr(call, name)])
        for name in changed
    }
    return replace(call, **others)


def shifted(x: torch.Tensor, offset: int) -> torch.Tensor:
    """As x, of the same strides, so many elements behind an aligned address."""
    last = sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.zeros(offset + last + 1, dtype=x.dtype, device=x.device)
    memory.as_strided(x.shape, x.stride(), offset).copy_(x)
    return memory.as_strided(x.shape, x.stride(), offset)


def laid_out(qkv: torch.Tensor, strides: str, offset: int) -> list[torch.Tensor]:
    """Parts of a projection [B, N, parts, H, d], as [B, H, N, d] of such strides and alignment."""
    inputs = list(shifted(qkv, offset).permute(2, 0, 3, 1, 4).unbind(0))
    if strides == "contiguous":
        return [shifted(each.contiguous(), offset) for each in inputs]
    if strides == "tokens last":
        return [shifted(each.mT.contiguous(), offset).mT for each in inputs]
    if strides == "expanded":
        return [each[:, :1].expand(each.shape) for each in inputs]
    return inputs


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """Asks torch for deterministic algorithms, or does not."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def launched_ordinarily() -> object:
    """Within it programs run as if launch hooks were set: ordinarily, and none settles on another way."""
    return mock.patch.object(program, "hooked", return_value=True)


def way_of(made: Program) -> str:
    """How a program is launched."""
    if made._replay is None:
        return "ordinarily"
    return "by C" if isinstance(made._replay, _ReplayByC) else "by Triton"


@contextmanager
def noted_programs() -> Iterator[list[Program]]:
    """Programs that are made within it."""
    made: list[Program] = []

    class Noted(Program):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            made.append(self)

    with mock.patch.object(program, "Program", Noted):
        yield made


@contextmanager
def counted_ways() -> Iterator[Counter[str]]:
    """How programs that settle within it are launched from then on; it keeps none of them."""
    ways: Counter[str] = Counter()
    settle = Program._settle

    def counted(made: Program, *arguments: object) -> None:
        settle(made, *arguments)
        ways[way_of(made)] += 1

    with mock.patch.object(Program, "_settle", counted):
        yield ways


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are alike to the bit, zeros' signs and NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = (x.contiguous().flatten().view(torch.uint8) for x in (one, other))
    return torch.equal(one, other)


class Prepared:
    """A call with its inputs.

    Args:
        call: what it is told.
        space: that it is drawn from.
        seed: of the numbers.
        device: "cuda" or "cpu".
    """

    def __init__(self, call: Call, space: Space, seed: int, device: str) -> None:
        self.call, self.sides = call, space.sides
        self.layout = TokenLayout(call.grid, PREFIX)
        (B, H), N = call.size, self.layout.tokens
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(B, N, 4, H, space.head_dim, generator=generator, dtype=torch.float64)
        *self.inputs, self.upstream = laid_out(numbers.to(device, call.dtype), call.strides, call.offset)
        self.budget = min(N, max(PREFIX + 1, int(call.keep * N)))
        scores = torch.randn(B, H, self.layout.squares(space.sides[0]), N, generator=generator)
        self.scores = shifted(scores.to(device, call.dtype), call.offset)
        # rows without any score, of which there are none, select nothing
        self.own = torch.full((scores.shape[2], 1), -1, dtype=torch.int32, device=device)

    def __call__(self) -> list[torch.Tensor]:
        """Results of the kernels."""
        with deterministic(self.call.kind == "gradients in order"):
            return self._run()

    def _run(self) -> list[torch.Tensor]:
        (tile, pool, summary), scale = self.sides, self.call.scale
        lists = (self.budget, PREFIX)
        if self.call.kind == "attend_impact":
            geometry = self.layout.for_kernels(tile, pool, summary, summary)
            return [attend_impact(*self.inputs, geometry, scale, *lists, "triton")]
        geometry = self.layout.for_kernels(tile, summary)
        if self.call.kind == "attend_pooled":
            return [attend_pooled(*self.inputs, geometry, scale, *lists, "triton")]
        if self.call.kind == "select, attend":
            indices = select_topk(self.scores, *lists, self.own, "triton")
            attended = attend(*self.inputs, indices, True, None, geometry, scale, False, "triton")
            return [indices, attended[0]]
        indices = select_pooled(*self.inputs[:2], self.layout.for_kernels(tile), *lists, "triton")
        out, *saved = attend(*self.inputs, indices, True, None, geometry, scale, True, "triton")
        gradients = attend_backward(
            self.upstream, *self.inputs, indices, out, *saved, geometry, scale, True, "triton"
        )
        return [indices, out, *saved, *gradients]

    def why_wrong(self, results: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
        """What differs from ordinary launches, empty if nothing does that must not."""
        exact = len(expected) - (3 if self.call.kind == BY_ATOMICS else 0)
        for place, (one, other) in enumerate(zip(results, expected, strict=True)):
            if place < exact and not same_bits(one, other):
                return f"result {place} of {len(expected)} differs from that of ordinary launches"
        if exact == len(expected):
            return ""
        try:
            self._check_gradients(results[0], results[exact:])
        except AssertionError as error:
            return f"gradients by atomics: {error}"
        return ""

    def _check_gradients(self, indices: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        """As the fp64 budget says; an exponential takes over the error of a logit, as in `rounded_terms`."""
        connectivity = Connectivity.over(self.layout, indices, self.sides[0], selected=True)
        inputs = [x.contiguous() for x in (*self.inputs, self.upstream)]
        single, double = (
            reference_gradients(each, connectivity, self.sides[2], self.call.scale)
            for each in (inputs, [x.double() for x in inputs])
        )
        logit = (inputs[0].double() @ inputs[1].double().mT).abs().max() * self.call.scale
        terms = largest_terms(inputs[:3], inputs[3], self.call.scale)[1:]
        for actual, one, other, term in zip(gradients, single, double, terms, strict=True):
            assert_within_budget(actual, one, other, (10 + logit) * term)


def reference_gradients(
    inputs: list[torch.Tensor], connectivity: Connectivity, summary: int | None, scale: float
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v, from them and the gradient of the result."""
    *leaves, upstream = (x.detach().requires_grad_() for x in inputs)
    out = sparse_attention(*leaves, connectivity, summary, scale, "reference")
    return torch.autograd.grad(out, leaves, upstream.detach())


class Places:
    """Streams and threads that calls run in.

    Args:
        device: "cuda" or "cpu".
        streams: how many, with the default one.
    """

    def __init__(self, device: str, streams: int) -> None:
        self._streams = [torch.cuda.Stream() for _ in range(streams - 1)] if device == "cuda" else []
        # one thread each, which begins with its first call
        self._threads = [ThreadPoolExecutor(1) for _ in range(THREADS)]

    def run(self, call: Call, prepared: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Results, complete, of a call in its stream and thread."""

        def work() -> list[torch.Tensor]:
            stream = torch.cuda.stream(self._streams[call.stream - 1]) if call.stream else nullcontext()
            with stream:
                return prepared()

        self._wait()
        results = self._threads[call.thread - 1].submit(work).result() if call.thread else work()
        self._wait()
        return results

    def close(self) -> None:
        """Ends the threads."""
        for each in self._threads:
            each.shutdown()

    def _wait(self) -> None:
        if self._streams:
            torch.cuda.synchronize()


def run(calls: int, seed: int, device: str) -> tuple[int, Counter[str]]:
    """Makes so many calls; returns how many differed, and how many programs settled on which way."""
    draw, space, differences = random.Random(seed), SPACES[device], 0
    places = Places(device, len(space.choices["stream"]))
    call = first_call(draw, space)
    with counted_ways() as ways:
        for done in range(1, calls + 1):
            prepared = Prepared(call, space, draw.randrange(2**31), device)
            with launched_ordinarily():
                expected = places.run(call, prepared)
            # the first call of a program settles how to launch it, the second one is launched so
            results = (places.run(call, prepared) for _ in range(2))
            wrong = next(filter(None, (prepared.why_wrong(each, expected) for each in results)), "")
            if wrong:
                differences += 1
                print(f"call {done}, {call}: {wrong}", flush=True)
            if done % 100 == 0:
                print(f"{done} of {calls} calls, {differences} differ", flush=True)
            call = next_call(draw, space, call)
    places.close()
    return differences, ways


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    differences, ways = run(options.calls, options.seed, device)
    settled = ", ".join(f"{count} {way}" for way, count in sorted(ways.items())) or "none"
    name = torch.cuda.get_device_name() if device == "cuda" else "the interpreter"
    print(f"{options.calls} calls on {name}, seed {options.seed}: {differences} differ")
    print(f"programs that settled, by how they are launched: {settled}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
