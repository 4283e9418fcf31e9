"""Programs: what they are made of, what tells them apart, and the memory that they work in."""

import threading
from itertools import combinations
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsifiner.ops import program
from sparsifiner.ops.backends import HAS_TRITON
from sparsifiner.ops.program import Buffer, Draft, Memory, Operation

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton.language as tl

from sparsifiner.ops.triton_kernel import fill, kernel, quotient

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@kernel
def scale_kernel(x, y, elements, factor, size: tl.constexpr):
    at = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(y + at, tl.load(x + at, mask=at < elements) * factor, mask=at < elements)


@kernel
def quotient_kernel(x, y, divisor, size: tl.constexpr):
    at = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(y + at, quotient(tl.load(x + at), divisor))


def scale(draft, x, *, factors):
    """x times all factors, each in memory of its own."""
    for factor in factors:
        y = draft.empty(*x.shape, dtype=x.dtype)
        draft.launch(scale_kernel, (-(-x.elements // 16),), x, y, x.elements, factor, size=16)
        x = y
    return (x,)


def test_what_an_operation_writes_is_what_runs():
    operation = Operation(scale)
    x = torch.randn(3, 7, device=DEVICE)
    for _ in range(3):
        (y,) = operation(x, factors=(2.0, 3.0, 0.5))
        assert torch.equal(y, x * 2 * 3 * 0.5)
    assert operation.kept() == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.view(3, 5),
        lambda x: x.T.contiguous().T,
        lambda x: x.half(),
        lambda x: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(5, 3),
    ],
    ids=["shape", "strides", "dtype", "alignment"],
)
def test_other_kinds_of_tensors_have_programs_of_their_own(change):
    operation = Operation(scale)
    one = torch.randn(5, 3, device=DEVICE)
    other = change(one)
    assert torch.equal(operation(one, factors=(2.0,))[0], one * 2)
    before = operation.kept()
    (result,) = operation(other, factors=(2.0,))
    assert torch.equal(result, other * 2)
    assert operation.kept() > before


def test_other_options_and_marks_have_programs_of_their_own():
    operation = Operation(scale)
    x = torch.ones(4, device=DEVICE)
    assert operation(x, factors=(2.0,))[0].sum() == 8
    assert operation(x, factors=(2.0, 2.0))[0].sum() == 16
    program.mark_programs("another")
    try:
        operation(x, factors=(2.0,))
    finally:
        program.mark_programs(None)
    assert operation.kept() == 3
    operation.forget()
    assert operation.kept() == 0
    assert operation(x, factors=(2.0,))[0].sum() == 8


def test_the_number_of_programs_is_bounded_for_any_stream_of_shapes():
    operation = Operation(lambda draft, x: (draft.empty(*x.shape, dtype=x.dtype),))
    for size in range(program.KEPT_PROGRAMS + 50):
        operation(torch.empty(size, 1, device=DEVICE))
    assert operation.kept() == program.KEPT_PROGRAMS


def test_rows_that_are_not_contiguous_are_copied():
    operation = Operation(scale)
    x = torch.randn(4, 6, device=DEVICE).T
    assert torch.equal(operation(x, factors=(2.0,))[0], x * 2)


def test_an_output_must_be_the_whole_of_a_memory_of_its_own():
    def twice(draft, x):
        y = draft.empty(2, *x.shape, dtype=x.dtype)
        fill(draft, y, 0)
        return y, y

    def part(draft, x):
        return (draft.empty(2, *x.shape, dtype=x.dtype)[1],)

    for write in (twice, part, lambda draft, x: (x,)):
        with pytest.raises(ValueError, match="an output must be the whole of a memory of its own"):
            Operation(write)(torch.ones(3, device=DEVICE))


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 9), st.integers(0, 9)), max_size=12),
)
def test_memory_that_is_needed_at_once_does_not_overlap(lives):
    draft, buffers = Draft(), []
    for size, one, other in lives:
        buffers.append((Buffer(Memory(size), (size,), (1,), torch.uint8), min(one, other), max(one, other)))
    for index in range(10):
        used = [buffer for buffer, first, last in buffers if index in {first, last}]
        draft.launch(scale_kernel, (1,), *used)
    offsets, total = program._workspace(draft.launches, set())
    assert len(offsets) == len(buffers)
    for (a, *life), (b, *other) in combinations(buffers, 2):
        if life[0] <= other[1] and other[0] <= life[1]:
            first, second = sorted([(offsets[a.memory], a.nbytes), (offsets[b.memory], b.nbytes)])
            assert first[0] + first[1] <= second[0] or not min(first[1], second[1])
    assert all(offsets[buffer.memory] + buffer.nbytes <= total for buffer, *_ in buffers)


def test_workspace_serves_again():
    draft = Draft()
    x = Buffer(Memory(0), (1024,), (1,), torch.float32)
    scale(draft, x, factors=(1.0,) * 8)
    _, total = program._workspace(draft.launches, {x.memory})
    assert total == 2 * 4096


def test_views_of_buffers_are_those_of_tensors():
    x = torch.arange(2 * 3 * 5).view(2, 3, 5)
    buffer = Draft().empty(2, 3, 5, dtype=x.dtype)
    for view, tensor in (
        (buffer[1], x[1]),
        (buffer.since(2, 1), x[:, 2:]),
        (buffer.transpose(0, 2), x.transpose(0, 2)),
        (buffer[1].since(1, 0).transpose(0, 1), x[1][1:].T),
    ):
        assert view.shape == tuple(tensor.shape)
        assert view.strides == tensor.stride()
        assert view.offset == tensor.storage_offset()
        assert view.elements == prod(tensor.shape)


@pytest.mark.skipif(not GPU, reason="Triton's interpreter runs in one thread")
def test_threads_share_programs():
    operation, results = Operation(scale), {}

    def work(number):
        x = torch.full((40,), float(number), device=DEVICE)
        results[number] = all(
            bool((operation(x[: 8 * size], factors=(2.0,))[0] == 2 * number).all()) for size in range(1, 6)
        )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert results == dict.fromkeys(range(6), True)
    assert operation.kept() == 5


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 9, 13, 41, 64, 97, 333, 1023])
def test_quotients_are_those_of_integers(divisor):
    largest = 2**21
    near = torch.arange(0, largest, divisor)[-2000:]
    x = torch.cat([torch.arange(4096), near - 1, near, near + 1]).clamp(0, largest - 1).int()
    x = torch.nn.functional.pad(x, (0, -len(x) % 1024)).to(DEVICE)
    y = torch.empty_like(x)
    quotient_kernel[(len(x) // 1024,)](x, y, divisor, size=1024)
    assert torch.equal(y, x // divisor)
