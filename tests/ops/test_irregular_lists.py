"""Lists as callers make them: in any order, with gaps, repeated keys, and tokens that are not there."""

import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import sparsifiner
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import native, sparse_attention
from sparsifiner.ops.backends import HAS_TRITON
from tests.models import make_images, make_model
from tests.ops.cases import make_qkv
from tests.stress import ops as fuzz

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = [
    "torch",
    *(["cpu"] if not native.why_not() and not GPU else []),
    *(["triton"] if HAS_TRITON else []),
]
# of a 4x4 grid behind one prefix token; the fourth names two tokens that are not there
IRREGULAR = [[5, 2, 9, -1], [-1, 7, -1, 3], [0, 0, 6, 6], [17, 4, 99, 4], [-7, -1, -1, -1], [1, 16, 1, 1]]


def irregular(tile, **options):
    rows = {1: 16, 2: 4}[tile]
    lists = torch.tensor([IRREGULAR[row % 6] for row in range(2 * rows)], dtype=torch.int32)
    return Connectivity(lists.view(1, 2, rows, 4).to(DEVICE), (4, 4), tile, 1, check=False, **options)


def attend_by_loops(q, k, v, connectivity, summary):
    """The definition, list by list, in plain Python."""
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        for i in range(17):
            y, x = divmod(i - 1, 4)
            row = (y // connectivity.tile) * (4 // connectivity.tile) + x // connectivity.tile
            listed = connectivity.indices[0, head, row].tolist() if i else range(17)
            listed = [j for j in listed if 0 <= j < 17]  # as often as they are named
            keys, values, counts = [k[0, head, j] for j in listed], [v[0, head, j] for j in listed], []
            counts = [1.0] * len(listed)
            for window in range(4) if summary and i else ():
                inside = [
                    1 + 4 * (2 * (window // 2) + a) + 2 * (window % 2) + b for a in (0, 1) for b in (0, 1)
                ]
                lacking = len(set(inside) - set(listed))
                if lacking:
                    keys.append(k[0, head, inside].mean(0))
                    values.append(v[0, head, inside].mean(0))
                    counts.append(lacking)
            if not keys:
                out[0, head, i] = 0
                continue
            weights = (torch.stack(keys) @ q[0, head, i] / 4).exp() * torch.tensor(counts)
            out[0, head, i] = weights / weights.sum() @ torch.stack(values)
    return out


@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("summary", [None, 2])
def test_the_reference_equals_the_definition(tile, summary):
    q, k, v = make_qkv(TokenLayout((4, 4), 1), dtype=torch.float64)
    connectivity = Connectivity(irregular(tile).indices.cpu(), (4, 4), tile, 1, check=False)
    expected = attend_by_loops(q, k, v, connectivity, summary)
    actual = sparse_attention(q, k, v, connectivity, summary, backend="reference")
    assert (actual - expected).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("summary", [None, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_backends_equal_the_reference_forward_and_backward(backend, tile, summary, deterministic):
    inputs = make_qkv(TokenLayout((4, 4), 1), device=DEVICE)
    upstream = torch.randn(inputs[0].shape, device=DEVICE)
    torch.use_deterministic_algorithms(deterministic)
    try:
        results = {}
        for name in (backend, "reference"):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = sparse_attention(*leaves, irregular(tile), summary, backend=name)
            results[name] = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
            with torch.no_grad():  # "cpu" is for inference
                results[name].append(sparse_attention(*inputs, irregular(tile), summary, backend=name))
    finally:
        torch.use_deterministic_algorithms(False)
    for actual, expected in zip(results[backend], results["reference"], strict=True):
        assert (actual - expected).abs().max() < 2e-6


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("tile", [1, 2])
def test_a_repeated_key_is_lacked_once_and_counts_twice(backend, tile):
    q, k, v = make_qkv(TokenLayout((4, 4), 0), device=DEVICE)
    lists = torch.tensor([0, 0, 5], dtype=torch.int32, device=DEVICE).expand(1, 2, 16 // tile**2, 3)
    out = sparse_attention(q, k, v, Connectivity(lists, (4, 4), tile), summary=4, backend=backend)
    keys = torch.cat([k[:, :, [0, 5]], k.mean(2, keepdim=True)], 2)
    values = torch.cat([v[:, :, [0, 5]], v.mean(2, keepdim=True)], 2)
    count = torch.tensor([2.0, 1.0, 14.0], device=DEVICE)
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=count.log()[None])
    assert (out - expected).abs().max() < 2e-6


def check_memory_outside():
    q, k, v = torch.randn(3, 1, 2, 17, 16)
    for entry in (-1, -2, -(2**31), 17, 99, 10**6, 2**31 - 1):
        for tile in (1, 2):
            for listed in ([3, entry, 5], [entry, 3, 5], [3, 5, entry]):
                lists = torch.tensor(listed, dtype=torch.int32).expand(1, 2, 16 // tile**2, 3)
                kept = torch.tensor([3, 5], dtype=torch.int32).expand(1, 2, 16 // tile**2, 2)
                for summary in (None, 2):
                    strange = Connectivity(lists, (4, 4), tile, 1, check=False)
                    actual = sparse_attention(q, k, v, strange, summary)
                    expected = sparse_attention(q, k, v, Connectivity(kept, (4, 4), tile, 1), summary)
                    assert torch.equal(actual, expected), (entry, tile, listed, summary)


def check_changed_since():
    """Lists that were changed after they were checked give numbers, whichever."""
    q, k, v = torch.randn(3, 1, 2, 17, 16)
    for tile, rows in ((1, 16), (2, 4)):
        for backend in BACKENDS:
            lists = torch.arange(3, dtype=torch.int32).repeat(1, 2, rows, 1)
            connectivity = Connectivity(lists, (4, 4), tile, 1)
            assert connectivity.ascends()
            lists.copy_(torch.tensor([-(2**31), 2**31 - 1, 7], dtype=torch.int32))
            for summary in (None, 2):
                assert sparse_attention(q, k, v, connectivity, summary, backend=backend).shape == q.shape


@pytest.mark.skipif(GPU, reason="the kernels of a GPU are compared above")
def test_memory_outside_is_never_read():
    checks = "from tests.ops.test_irregular_lists import check_changed_since, check_memory_outside\n"
    program = f"import torch; {checks}check_memory_outside(); check_changed_since(); print('done')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("entry", [17, 2**31 - 1])
def test_tokens_that_are_not_there_are_named_unless_that_is_switched_off(entry):
    lists = torch.zeros(1, 2, 4, 3, dtype=torch.int32, device=DEVICE)
    Connectivity(lists - 1, (4, 4), 2, 1)
    lists[0, 1, 3, 0] = entry
    message = (
        f"indices name token {entry}, but a 4x4 grid behind 1 prefix tokens has the tokens 0 to 16; give"
    )
    with pytest.raises(ValueError, match=message):
        Connectivity(lists, (4, 4), 2, 1)
    connectivity = Connectivity(lists, (4, 4), 2, 1, check=False)
    assert connectivity.to_mask()[0, 1, 16].tolist() == [True, *[False] * 16]
    assert connectivity.density() == pytest.approx((3 - 1 / 8) / 17)


def test_lists_ascend_or_do_not():
    def ascends(*listed):
        return Connectivity(torch.tensor(listed, dtype=torch.int32).view(1, 1, 1, -1), (2, 2), 2).ascends()

    assert ascends(0, 1, 3, -1, -1)
    assert ascends(-1, -1)
    assert ascends(2)
    for listed in ((0, 0, 1), (1, 0, 2), (-1, 1, 2), (1, -1, 2)):
        assert not ascends(*listed)
    beyond = torch.tensor([0, 4], dtype=torch.int32).view(1, 1, 1, 2)
    assert not Connectivity(beyond, (2, 2), 2, check=False).ascends()


def test_traced_lists_are_those_of_a_caller():
    model = sparsifiner.sparsify(make_model("deit", img_size=96), keep=0.2, tile=2)
    with torch.no_grad(), sparsifiner.trace(model) as traces:
        model(make_images(96))
    for layer in traces.values():
        assert not layer.connectivity.selected
        assert layer.connectivity.ascends()


def attend_to(lists, q, k, v):
    return sparse_attention(q, k, v, Connectivity(lists, (4, 4), 2, 1), 2)


@pytest.mark.parametrize("how", ["compiled", "exported", "traced", "symbolic"])
def test_nothing_is_looked_at_while_tracing(how):
    inputs = tuple(torch.randn(3, 1, 2, 17, 16))
    valid, strange = irregular(2).indices.cpu().clamp(max=16), irregular(2).indices.cpu()
    with torch.no_grad():
        if how == "compiled":
            attend = torch.compile(attend_to, backend="aot_eager", fullgraph=True)
        elif how == "exported":
            module = torch.nn.Module()
            module.forward = attend_to
            attend = torch.export.export(module, (valid, *inputs)).module()
        elif how == "traced":
            attend = torch.jit.trace(attend_to, (valid, *inputs), check_trace=False)
        else:
            attend = make_fx(attend_to)(valid, *inputs)
        expected = sparse_attention(*inputs, Connectivity(strange, (4, 4), 2, 1, check=False), 2)
        assert (attend(strange, *inputs) - expected).abs().max() < 2e-6


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("tile", [1, 2])
def test_nothing_is_looked_at_while_capturing(tile):
    inputs = make_qkv(TokenLayout((4, 4), 1), device="cuda")
    lists, graph = irregular(tile).indices, torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = sparse_attention(*inputs, Connectivity(lists, (4, 4), tile, 1, check=False), 2)
        with torch.cuda.graph(graph):
            out = sparse_attention(*inputs, Connectivity(lists, (4, 4), tile, 1), 2)
        graph.replay()
    assert (out - expected).abs().max() < 2e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_random_calls(seed):
    backends = tuple(name for name in BACKENDS if name != "triton")
    ended = fuzz.run(150, seed, backends, fuzz.SPACES["cuda" if GPU else "cpu"], DEVICE)
    assert sum(ended.values()) == 150
    assert ended["bad entry", "refused"] > 0


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_random_calls_of_triton():
    ended = fuzz.run(12, 0, ("triton",), fuzz.SPACES["interpreter"], DEVICE)
    assert ended["bad entry unchecked", "equal"] + ended["repeated", "equal"] > 0
