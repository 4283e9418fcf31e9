"""Replayed programs: the bits, memory and behaviour of ordinary launches, wherever they are called."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparsifiner
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import launching, program, select_topk, sparse_attention
from sparsifiner.ops.attend_selected import operators as selected
from sparsifiner.ops.backends import HAS_TRITON
from sparsifiner.ops.program import forget_programs
from sparsifiner.ops.select import operators as select
from sparsifiner.ops.sparse_attention import operators as attention
from tests.models import make_images, make_model
from tests.ops.cases import assert_within_budget, largest_terms, make_qkv
from tests.stress import programs as stress
from tests.stress.programs import deterministic, noted_programs, same_bits, shifted, way_of

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton import knobs

pytestmark = pytest.mark.usefixtures("poisoned")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
needs_library = pytest.mark.skipif(isinstance(launching._library(), str), reason=str(launching._library()))
# the interpreter takes a second for what a GPU takes microseconds
GRID, HEAD_DIM, SIDES = ((14, 14), 64, (8, 4, 4)) if GPU else ((3, 4), 16, (2, 1, 2))
PREFIX, SCALE = 1, 0.125
DTYPES = [torch.float32, torch.bfloat16]


class Sample:
    """Inputs of every kind of call, made without a kernel where one kernel does not need another's results.

    Args:
        grid: patches along height and width.
        dtype: of queries, keys and values.
        batch: images.
        heads: of each.
        device: of all.
        change: of how q, k, v and the gradient of the result lie in memory.
    """

    def __init__(self, grid=GRID, dtype=torch.float32, batch=2, heads=2, device=DEVICE, change=lambda x: x):
        self.layout, self.device = TokenLayout(grid, PREFIX), device
        size = {"heads": heads, "head_dim": HEAD_DIM, "batch": batch, "dtype": dtype, "device": device}
        self.inputs = [change(x) for x in make_qkv(self.layout, **size)]
        self.upstream = change(make_qkv(self.layout, **size)[0])
        N, rows = self.layout.tokens, self.layout.squares(SIDES[0])
        self.lists = (N // 4 + PREFIX, PREFIX)  # budget and forced keys
        self.scores = torch.randn(batch, heads, rows, N).to(device)
        self.own = torch.full((rows, 1), -1, dtype=torch.int32, device=device)
        shapes = ((16, HEAD_DIM), (16,), (16, HEAD_DIM), (16,), (N, 16), (16, N))
        self.weights = [torch.randn(shape).to(device, dtype) for shape in shapes]
        self.indices = select_topk(self.scores, self.lists[0], forced=PREFIX, backend="reference")

    @property
    def connectivity(self):
        return Connectivity.over(self.layout, self.indices, SIDES[0], selected=True)

    def attention(self, training):
        """Arguments of `attend`."""
        geometry = self.layout.for_kernels(SIDES[0], SIDES[2])
        return (*self.inputs, self.indices, True, None, geometry, SCALE, training, "triton")

    @cached_property
    def kept(self):
        """What `attend` returned in training."""
        return attention.attend(*self.attention(True))

    @cached_property
    def references(self):
        """Gradients by the reference as it is and in fp64, and their largest addends."""
        inputs = [x.contiguous() for x in (*self.inputs, self.upstream)]
        single, double = (
            stress.reference_gradients(each, self.connectivity, SIDES[2], SCALE)
            for each in (inputs, [x.double() for x in inputs])
        )
        return single, double, largest_terms(inputs[:3], inputs[3], SCALE)[1:]


class Call:
    """One call of an operation; its inputs are made before.

    Args:
        name: one of `CALLS`.
        sample: of its inputs.
    """

    def __init__(self, name, sample):
        self.name, self.sample = name, sample
        self.operator, self.arguments = CALLS[name](sample)

    def __call__(self):
        with deterministic(self.name == IN_ORDER):
            results = self.operator(*self.arguments)
        return [results] if isinstance(results, torch.Tensor) else list(results)

    def check(self, results, expected):
        """That results are the expected ones: to the bit, or within the budget where atomics add them up."""
        if self.name == BY_ATOMICS:
            for quantities in zip(results, *self.sample.references, strict=True):
                assert_within_budget(*quantities)
            return
        for one, other in zip(results, expected, strict=True):
            assert not one.is_floating_point() or one.isfinite().all()
            assert same_bits(one, other)


def backward(sample):
    geometry = sample.layout.for_kernels(SIDES[0], SIDES[2])
    given = (sample.upstream, *sample.inputs, sample.indices, *sample.kept)
    return attention.attend_backward, (*given, geometry, SCALE, True, "triton")


IN_ORDER, BY_ATOMICS = "attend_backward, in order", "attend_backward, by atomics"
CALLS = {
    "select_topk": lambda s: (select.select_topk, (s.scores, *s.lists, s.own, "triton")),
    "select_pooled": lambda s: (
        select.select_pooled,
        (*s.inputs[:2], s.layout.for_kernels(SIDES[0]), *s.lists, "triton"),
    ),
    "select_impact": lambda s: (
        select.select_impact,
        (*s.inputs, s.layout.for_kernels(*SIDES), SCALE, *s.lists, "triton"),
    ),
    "select_lowrank": lambda s: (
        select.select_lowrank,
        (*s.inputs[:2], *s.weights, s.layout.for_kernels(SIDES[0]), 0.2, 4, *s.lists, "triton"),
    ),
    "attend": lambda s: (attention.attend, s.attention(False)),
    "attend, training": lambda s: (attention.attend, s.attention(True)),
    IN_ORDER: backward,
    BY_ATOMICS: backward,
    "attend_pooled": lambda s: (
        selected.attend_pooled,
        (*s.inputs, s.layout.for_kernels(SIDES[0], SIDES[2]), SCALE, *s.lists, "triton"),
    ),
    "attend_impact": lambda s: (
        selected.attend_impact,
        (*s.inputs, s.layout.for_kernels(*SIDES, SIDES[2]), SCALE, *s.lists, "triton"),
    ),
}
EXACT = [name for name in CALLS if name != BY_ATOMICS]
# how q, k, v and the gradient of the result lie in memory
LAYOUTS = {
    "misaligned": lambda x: shifted(x, 1),
    "contiguous": torch.Tensor.contiguous,
    "tokens last": lambda x: x.mT.contiguous().mT,
    "every other channel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.fixture
def made():
    with noted_programs() as programs:
        yield programs


def refused(launches, kernels):
    return "not in this test"


def force(patch, way):
    """Programs that are made from now on are launched in that way."""
    if way != "by C":
        patch.setattr(program, "replay_by_c", refused)
    if way == "ordinarily":
        patch.setattr(program, "replay_by_triton", refused)
    forget_programs()


def ordinary_results(monkeypatch, call):
    with monkeypatch.context() as patch:
        force(patch, "ordinarily")
        results = call()
    forget_programs()
    return results


def fastest_way():
    return "by Triton" if isinstance(launching._library(), str) else "by C"


def ways(made):
    """Of the programs that launch anything."""
    return {way_of(each) for each in made if each._launches}


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("way", ["by C", "by Triton", "ordinarily"])
def test_every_way_gives_the_bits_of_ordinary_launches(way, name, dtype, made, monkeypatch):
    if way == "by C" and isinstance(launching._library(), str):
        pytest.skip(launching._library())
    call = Call(name, Sample(dtype=dtype))
    expected = ordinary_results(monkeypatch, call)
    force(monkeypatch, way)
    made.clear()
    for _ in range(3):  # settled by the first call, used by the others
        call.check(call(), expected)
        assert ways(made) == {way}


@needs_gpu
@needs_library
def test_c_launches_all_kinds(made):
    sample = Sample(dtype=torch.bfloat16)
    for name in CALLS:
        Call(name, sample)()
    assert len(made) > len(CALLS)
    assert ways(made) == {"by C"}


@needs_gpu
@pytest.mark.parametrize("change", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_any_strides_and_alignment(name, change, monkeypatch):
    call = Call(name, Sample(dtype=torch.bfloat16, change=LAYOUTS[change]))
    expected = ordinary_results(monkeypatch, call)
    for _ in range(2):
        call.check(call(), expected)


@pytest.mark.matrix(sample=lambda change: change == "misaligned")
@pytest.mark.parametrize("change", LAYOUTS)
def test_results_do_not_depend_on_strides_and_alignment(change):
    torch.manual_seed(1)
    expected = Call(IN_ORDER, Sample())()
    torch.manual_seed(1)
    call = Call(IN_ORDER, Sample(change=LAYOUTS[change]))
    for _ in range(2):
        for one, other in zip(call(), expected, strict=True):
            torch.testing.assert_close(one, other)


def check_first_call_under_capture(name):
    """A graph of a kind's first call has the bits of a later one, and a call that is not captured settles."""
    call = Call(name, Sample())
    with noted_programs() as made:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        assert ways(made) == {"ordinarily"}
        for each in captured:
            each.zero_()
        graph.replay()
        for _ in range(2):
            call.check(captured, call())
            assert ways(made) == {fastest_way()}
    for each in captured:
        each.zero_()
    graph.replay()
    call.check(captured, call())


@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_first_call_under_capture(name):
    Call(name, Sample((14, 13)))()  # compiles the kernels
    forget_programs()
    check_first_call_under_capture(name)


@needs_gpu
@needs_library
@pytest.mark.parametrize("name", ["attend_impact", "attend, training", "select_lowrank"])
def test_first_call_under_capture_that_compiles(name, tmp_path):
    code = f"from tests.ops import test_replays; test_replays.check_first_call_under_capture({name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert any(tmp_path.iterdir())


@needs_gpu
@pytest.mark.parametrize("name", ["attend_impact", "attend, training", IN_ORDER])
def test_a_graph_outlives_the_programs(name, made, monkeypatch):
    for each in program._OPERATIONS:
        monkeypatch.setattr(each, "_program", lru_cache(2)(each._make))
    call = Call(name, Sample())
    made.clear()
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    gone = [weakref.ref(each) for each in made]
    made.clear()
    for width in range(4, 10):
        Call(name, Sample((14, width)))()
    made.clear()
    gc.collect()
    assert gone
    assert all(each() is None for each in gone)
    for each in captured:
        each.zero_()
    graph.replay()
    call.check(captured, expected)


def in_a_new_thread(function):
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


@pytest.mark.matrix(sample=lambda settled: settled)
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES if GPU else [torch.float32])
def test_backward_in_a_thread_that_did_nothing_before(dtype, settled):
    sample = Sample(dtype=dtype)
    leaves = [x.detach().requires_grad_() for x in sample.inputs]

    def attended():
        return sparse_attention(*leaves, sample.connectivity, SIDES[2], SCALE, "triton")

    with deterministic():
        expected = torch.autograd.grad(attended(), leaves, sample.upstream)
        if not settled:
            forget_programs()
        out = attended()
        gradients = in_a_new_thread(lambda: torch.autograd.grad(out, leaves, sample.upstream))
        assert all(map(same_bits, gradients, expected))
        other = attended()
        in_a_new_thread(lambda: other.backward(sample.upstream))
        assert all(same_bits(leaf.grad, each) for leaf, each in zip(leaves, expected, strict=True))
    out = attended()
    atomics = in_a_new_thread(lambda: torch.autograd.grad(out, leaves, sample.upstream))
    for quantities in zip(atomics, *sample.references, strict=True):
        assert_within_budget(*quantities)


@needs_gpu
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_streams_at_once(name, settled):
    calls = [Call(name, Sample()) for _ in range(4)]
    expected = [call() for call in calls]
    if not settled:
        forget_programs()
    streams, rounds = [torch.cuda.Stream() for _ in calls], []
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(call())
        rounds.append(results)
    torch.cuda.synchronize()
    for results in rounds:
        for call, one, other in zip(calls, results, expected, strict=True):
            call.check(one, other)


@needs_gpu
@pytest.mark.parametrize("own_streams", [False, True])
def test_threads_that_call_different_kinds_at_once(own_streams):
    names = ["attend_impact", "attend, training", "attend_pooled"]
    calls = [Call(name, Sample()) for name in names * 2]  # two threads call the same program
    expected = [call() for call in calls]
    forget_programs()
    torch.cuda.synchronize()

    def work(call):
        stream = torch.cuda.Stream() if own_streams else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            results = [call() for _ in range(20)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(calls)) as threads:
        everything = list(threads.map(work, calls))
    for call, every, other in zip(calls, everything, expected, strict=True):
        for results in every:
            call.check(results, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", EXACT)
def test_two_gpus_in_turns_and_another_than_the_current_one(name, made):
    calls = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(1)
        calls.append(Call(name, Sample(device=device)))
    for _ in range(3):
        one, other = ([each.cpu() for each in call()] for call in calls)
        calls[0].check(other, one)
    assert torch.cuda.current_device() == 0
    assert ways(made) == {fastest_way()}
    with torch.cuda.device(1):
        calls[0].check([each.cpu() for each in calls[0]()], one)


@needs_gpu
@pytest.mark.parametrize("name", ["attend_impact", "attend, training", IN_ORDER])
def test_calls_without_memory_fail_clearly_and_later_ones_are_right(name, made):
    call = Call(name, Sample((32, 32), batch=8, heads=6))
    expected = [each.cpu() for each in call()]
    _, total = torch.cuda.mem_get_info()
    failed, spare, succeeded = 0, 0, False
    try:
        # with a little more room each time, so that every allocation of the first call is the one that fails
        while not succeeded:
            forget_programs()
            made.clear()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
            try:
                call()
                succeeded = True
            except torch.OutOfMemoryError:
                failed += 1
            spare += 8 * 2**20
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed
    for _ in range(2):  # the room that comparing ways takes may have been lacking until now
        call.check([each.cpu() for each in call()], expected)
    assert ways(made) == {fastest_way()}


@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_hooks_are_called_for_every_launch(name, made):
    call = Call(name, Sample())
    made.clear()
    expected, entered, left = call(), [], []
    assert ways(made) == {fastest_way()}
    chains = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    hooks = (entered.append, left.append)
    for chain, hook in zip(chains, hooks, strict=True):
        chain.add(hook)
    try:
        call.check(call(), expected)
    finally:
        for chain, hook in zip(chains, hooks, strict=True):
            chain.remove(hook)
    assert len(entered) == len(left) == sum(len(each._launches) for each in made)
    call.check(call(), expected)
    assert len(entered) == len(left) == sum(len(each._launches) for each in made)


@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_memory_is_that_of_ordinary_launches(name, monkeypatch):
    check_peaks(Call(name, Sample((32, 32), torch.bfloat16, batch=8, heads=6)), monkeypatch)


@needs_gpu
@pytest.mark.parametrize("in_order", [False, True])
def test_memory_of_a_training_step_is_that_of_ordinary_launches(in_order, monkeypatch):
    sample = Sample((32, 32), torch.bfloat16, batch=8, heads=6)
    leaves = [x.detach().requires_grad_() for x in sample.inputs]

    def step():
        with deterministic(in_order):
            out = sparse_attention(*leaves, sample.connectivity, SIDES[2], SCALE, "triton")
            torch.autograd.grad(out, leaves, sample.upstream)

    check_peaks(step, monkeypatch)


def check_peaks(step, monkeypatch):
    """A replayed call takes at most 1.02 times what ordinary launches take, inputs left out."""
    peaks = []
    for way in ("ordinarily", "by C"):
        with monkeypatch.context() as patch:
            force(patch, way)
            step()  # settles, with more memory
            gc.collect()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks.append(torch.cuda.max_memory_allocated() - before)
    ordinary, replayed = peaks
    assert 0 < replayed <= 1.02 * ordinary


@pytest.mark.parametrize("name", CALLS)
def test_operations_are_counted_as_those_of_torch(name):
    call = Call(name, Sample(batch=1))
    call()
    counts = []
    for operator in (call.operator, getattr(torch.ops.sparsifiner, call.operator.short_name)):
        with deterministic(name == IN_ORDER), FlopCounterMode(display=False) as counter:
            operator(*call.arguments)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert (counts[0] > 0) == (name != "select_topk")


@pytest.fixture
def model_and_images():
    model = make_model("deit", img_size=96, depth=1)
    model = sparsifiner.sparsify(model, keep=0.2, tile=4, summary=2, backend="triton").to(DEVICE)
    return model, make_images(96, batch=1).to(DEVICE)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_of_models_that_were_called(copied, model_and_images):
    model, images = model_and_images
    with torch.no_grad():
        expected = model(images)
        assert same_bits(copied(model)(images), expected)
        assert same_bits(model(images), expected)


@needs_gpu  # what traces is compiled in tests/test_triton_models.py without one
@pytest.mark.parametrize("train", [False, True])
def test_models_that_were_called_compile_in_one_graph(train, model_and_images, made):
    model, images = model_and_images
    with torch.set_grad_enabled(train):
        expected = model(images)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):
            logits = compiled(images)
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
        if train:
            logits.square().sum().backward()
            assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()
    assert ways(made) == {fastest_way()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    sample = Sample()
    leaves = [x.detach().requires_grad_() for x in sample.inputs]

    def attended(*inputs):
        return sparse_attention(*inputs, sample.connectivity, SIDES[2], SCALE, "triton")

    with deterministic():
        expected = torch.autograd.grad(attended(*leaves), leaves, sample.upstream)
        for _ in range(2):
            out = checkpoint(attended, *leaves, use_reentrant=use_reentrant)
            out.backward(sample.upstream)  # reentrant checkpoints take no autograd.grad
            assert all(same_bits(leaf.grad, each) for leaf, each in zip(leaves, expected, strict=True))
            for leaf in leaves:
                leaf.grad = None


def test_random_calls(capsys):
    calls = 20 if GPU else 2
    assert stress.main(["--calls", str(calls), "--seed", "0"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{calls} calls on ")
    assert "seed 0: 0 differ" in out


def test_random_calls_that_differ_are_named(capsys, monkeypatch):
    monkeypatch.setattr(stress, "same_bits", lambda one, other: False)
    assert stress.main(["--calls", "1", "--seed", "0"]) == 1
    assert "result 0 of" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["bits", "shape", "dtype"])
def test_differences_are_seen(wrong):
    one = torch.zeros(4)
    other = {"bits": -one, "shape": one[:3], "dtype": one.int()}[wrong]
    assert same_bits(one, one.clone())
    assert not same_bits(one, other)
