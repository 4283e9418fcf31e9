"""Native attention against the reference, on every instruction set that this machine has."""

import logging

import pytest
import torch
from torch.autograd import forward_ad

import sparsifiner
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import backends, native, sparse_attention
from tests.models import make_images, make_model
from tests.ops.cases import assert_within_budget, largest_terms, layout_of, make_connectivity, make_qkv

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "runs")
INSTRUCTION_SETS = [isa.name.lower() for isa in native.Isa if isa and isa <= native.best_isa()]
SHAPES = [(8, 8), (8, 2), (4, None), (2, 4), (1, None), (1, 4), (14, 3)]


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def _isa(request, monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    yield
    torch.set_num_threads(1)


def check_against_reference(layout, keep, tile, summary, dtype=torch.float32, head_dim=16, heads=2, batch=1):
    size = {"heads": heads, "batch": batch}
    connectivity = make_connectivity(layout, keep, tile, summary, **size)
    inputs = make_qkv(layout, **size, head_dim=head_dim, dtype=dtype)
    actual = sparse_attention(*inputs, connectivity, summary, backend="cpu")
    single = sparse_attention(*inputs, connectivity, summary, backend="reference")
    double = [x.double() for x in inputs]
    exact = sparse_attention(*double, connectivity, summary, backend="reference")
    term = largest_terms(inputs, torch.zeros_like(actual), head_dim**-0.5)[0]
    assert actual.dtype == dtype
    assert_within_budget(actual, single, exact, term)


@pytest.mark.parametrize("patches", [4, 62, 196, 256])
@pytest.mark.parametrize(("tile", "summary"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_fp64_budget(patches, tile, summary, dtype):
    for prefix in (0, 1, 2, 5):
        check_against_reference(layout_of(patches, prefix), 0.1, tile, summary, dtype)


@pytest.mark.parametrize(("tile", "summary"), [(8, 8), (1, None)])
def test_many_patches(tile, summary):
    check_against_reference(layout_of(576, 1), 0.1, tile, summary, head_dim=64)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("tile", [1, 4])
def test_head_dims(head_dim, tile):
    check_against_reference(TokenLayout((5, 7), 1), 0.3, tile, 3, head_dim=head_dim)


@pytest.mark.parametrize("keep", [1e-6, 1.0])
def test_one_key_and_all_keys(keep):
    for prefix, tile in ((0, 4), (1, 4), (1, 1)):
        check_against_reference(TokenLayout((6, 5), prefix), keep, tile, 2)


def test_many_prefix_tokens_and_heads():
    for tile in (1, 2):
        check_against_reference(TokenLayout((4, 4), 70), 0.7, tile, 2, heads=3, batch=2)


def test_more_heads_than_fit_the_caches():
    # 8 MiB of keys and values are worked on at once
    check_against_reference(TokenLayout((24, 24), 1), 0.1, 8, 4, head_dim=128, heads=9, batch=2)


@pytest.mark.parametrize("tile", [1, 4])
def test_threads_change_nothing(tile):
    layout = TokenLayout((9, 7), 1)
    connectivity = make_connectivity(layout, 0.3, tile, 2)
    inputs = make_qkv(layout)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(sparse_attention(*inputs, connectivity, 2, backend="cpu"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_any_strides():
    layout = TokenLayout((5, 7), 1)
    connectivity = make_connectivity(layout, 0.3, 4, 2)
    q, k, v = make_qkv(layout)
    expected = sparse_attention(q, k, v, connectivity, 2, backend="cpu")
    shared = (q.contiguous(), k.mT.contiguous().mT, v.flip(2).flip(2))
    assert torch.equal(sparse_attention(*shared, connectivity, 2, backend="cpu"), expected)


@pytest.mark.parametrize(("tile", "summary"), [(2, None), (2, 2), (1, None), (1, 2)])
def test_empty_lists_and_slots(tile, summary):
    q, k, v = make_qkv(TokenLayout((4, 4), 1))
    indices = torch.tensor([[2, -1], [-1, -1], [0, 3], [1, 4]], dtype=torch.int32)
    lists = indices.repeat(4 // tile**2, 1).expand(1, 2, -1, 2)
    connectivity = Connectivity(lists, (4, 4), tile=tile, prefix=1)
    actual = sparse_attention(q, k, v, connectivity, summary, backend="cpu")
    expected = sparse_attention(q, k, v, connectivity, summary, backend="reference")
    assert (actual - expected).abs().max() < 1e-6


@pytest.mark.parametrize("tile", [1, 2])
def test_empty_batch(tile):
    layout = TokenLayout((4, 4), 1)
    connectivity = make_connectivity(layout, 0.3, tile, 2)
    connectivity = Connectivity(connectivity.indices[:0], (4, 4), tile=tile, prefix=1)
    inputs = [x[:0] for x in make_qkv(layout)]
    assert sparse_attention(*inputs, connectivity, 2, backend="cpu").shape == (0, 2, 17, 16)


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 100.0])
def test_any_scale(tile, scale):
    layout = TokenLayout((9, 7), 1)
    q, k, v = make_qkv(layout)
    connectivity = make_connectivity(layout, 0.2, tile, 4)
    actual = sparse_attention(q, k, v, connectivity, 4, scale, backend="cpu")
    exact = sparse_attention(q.double(), k.double(), v.double(), connectivity, 4, scale, backend="reference")
    assert ((actual - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("tile", [1, 2])
def test_unlisted_keys_are_never_read_and_listed_nan_is_not_lost(tile):
    layout = TokenLayout((4, 4), 0)
    q, k, v = make_qkv(layout)
    lists = torch.tensor([1, 3, 6], dtype=torch.int32).expand(1, 2, layout.squares(tile), 3)
    connectivity = Connectivity(lists, (4, 4), tile)
    unlisted = ~connectivity.to_mask().any(2)
    k[unlisted], v[unlisted] = torch.nan, torch.nan
    assert torch.isfinite(sparse_attention(q, k, v, connectivity, backend="cpu")).all()
    k[0, 0, 3, 0] = torch.nan
    result = sparse_attention(q, k, v, connectivity, backend="cpu")
    expected = sparse_attention(q, k, v, connectivity, backend="torch")
    assert expected.isnan().any()
    assert torch.equal(result.isnan().any(-1), expected.isnan().any(-1))


def test_what_the_kernels_do_not_take_is_named(caplog):
    layout = TokenLayout((4, 4), 0)
    connectivity = make_connectivity(layout, 0.5, 2, None)
    odd = make_qkv(layout, head_dim=20)
    with pytest.raises(ValueError, match="backend='cpu' takes head dims that are multiples of 16, got 20"):
        sparse_attention(*odd, connectivity, backend="cpu")
    with pytest.raises(ValueError, match="backend='cpu' takes fp32 and bf16, got fp64"):
        sparse_attention(*make_qkv(layout, dtype=torch.float64), connectivity, backend="cpu")
    backends._say_choice.cache_clear()
    with caplog.at_level(logging.INFO, "sparsifiner"):
        sparse_attention(*make_qkv(layout, head_dim=36), connectivity)
    assert "uses 'torch' on cpu, since 'cpu' takes head dims that are multiples of 16, got 36" in caplog.text


def test_gradients_take_torch():
    layout = TokenLayout((4, 6), 1)
    connectivity = make_connectivity(layout, 0.3, 2, 2)
    results = []
    for name in ("cpu", "torch"):
        torch.manual_seed(1)
        inputs = [x.detach().requires_grad_() for x in make_qkv(layout)]
        out = sparse_attention(*inputs, connectivity, 2, backend=name)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_forward_mode_gradients_are_not_lost_in_silence():
    layout = TokenLayout((4, 6), 1)
    connectivity = make_connectivity(layout, 0.3, 2, 2)
    q, k, v = make_qkv(layout)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        # as for the torch backend, whose place this is: torch's fused attention has none on a CPU
        with pytest.raises(NotImplementedError, match="forward AD"):
            sparse_attention(dual, k, v, connectivity, 2, backend="cpu")


def test_operator():
    layout = TokenLayout((4, 6), 1)
    inputs = make_qkv(layout)
    indices = make_connectivity(layout, 0.3, 2, 2).indices
    arguments = (*inputs, indices, True, None, (4, 6, 1, 2, 2), 0.25, False, "cpu")
    torch.library.opcheck(torch.ops.sparsifiner.attend.default, arguments)


@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
@pytest.mark.parametrize(
    "options",
    [
        {"tile": 4, "summary": 2},
        {"preset": "paper", "scorer": "strided"},
        {"preset": "paper"},
    ],
)
def test_models_equal_the_reference_compiled_and_exported(options):
    images = make_images(96, batch=2)
    models = {}
    for name in ("cpu", "reference"):
        torch.manual_seed(0)
        model = make_model("deit distilled", img_size=96, depth=2).eval()
        models[name] = sparsifiner.sparsify(model, **{"keep": 0.2, **options}, backend=name)
    torch._dynamo.reset()
    with torch.no_grad():
        logits = models["cpu"](images)
        expected = models["reference"](images)
        # scores that are all but equal rank differently: with the untrained predictor lists differ in places
        tolerance = 1e-2 if options == {"preset": "paper"} else 2e-5
        assert (logits - expected).abs().max() < tolerance * expected.abs().max()
        compiled = torch.compile(models["cpu"], backend="aot_eager", fullgraph=True)
        exported = torch.export.export(models["cpu"], (images,)).module()
        for model in (compiled, exported):
            assert (model(images) - logits).abs().max() < 2e-5 * logits.abs().max()
