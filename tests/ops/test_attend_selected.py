"""Selection and attention as one program: to the bit what the two operations give one after the other."""

import pytest
import torch

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.backends import HAS_TRITON
from tests.ops.cases import layout_of, make_qkv

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from sparsifiner.ops.attend_selected import operators
from sparsifiner.ops.select import triton_backend, triton_tiles
from sparsifiner.ops.select.operators import select_impact, select_pooled
from sparsifiner.ops.sparse_attention.operators import attend

pytestmark = pytest.mark.usefixtures("poisoned")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
PATCHES = [16, 62, 576, 1024, 4096] if GPU else [16, 62]


def two_operations(q, k, v, layout, sides, scale, budget):
    """The same by a selection and an attention: pooled where there is no pool."""
    tile, pool, summary = sides
    if pool is None:
        means = None
        lists = layout.for_kernels(tile)
        indices = select_pooled(q, k, lists, budget, layout.prefix, "triton")
    else:
        lists = layout.for_kernels(tile, pool, summary or layout.whole())
        indices, means = select_impact(q, k, v, lists, scale, budget, layout.prefix, "triton")
    geometry = layout.for_kernels(tile, summary)
    return attend(q, k, v, indices, True, means if summary else None, geometry, scale, False, "triton")[0]


def one_operation(q, k, v, layout, sides, scale, budget):
    tile, pool, summary = sides
    if pool is None:
        geometry = layout.for_kernels(tile, summary)
        return operators.attend_pooled(q, k, v, geometry, scale, budget, layout.prefix, "triton")
    geometry = layout.for_kernels(tile, pool, summary or layout.whole(), summary)
    return operators.attend_impact(q, k, v, geometry, scale, budget, layout.prefix, "triton")


def check(layout, sides, budget, dtype=torch.float32, head_dim=16):
    q, k, v = make_qkv(layout, head_dim=head_dim, batch=2, dtype=dtype, device=DEVICE)
    call = (layout, sides, head_dim**-0.5, min(budget, layout.tokens))
    one, two = one_operation(q, k, v, *call), two_operations(q, k, v, *call)
    assert one.isfinite().all()
    assert torch.equal(one, two)


@pytest.mark.parametrize("sides", [(8, 4, 8), (8, 8, 2), (4, None, 2), (4, 2, None), (16, None, None)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.matrix(sample=lambda prefix, dtype: prefix == (5 if dtype == torch.float32 else 0))
def test_as_the_two_operations(patches, prefix, sides, dtype):
    check(layout_of(patches, prefix), sides, max(prefix + 1, patches // 8), dtype)


def test_one_key_and_all_keys():
    for budget in (2, 63):
        check(layout_of(62, 1), (4, 2, 3), budget)


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_in_chunks_of_rows(rows_at_once, monkeypatch):
    monkeypatch.setattr(triton_tiles, "scratch_rows", lambda *sizes: rows_at_once)
    check(layout_of(62, 2), (2, 1, 3), 9)


def test_rows_longer_than_a_block_are_counted_by_a_launch_of_their_own(monkeypatch):
    monkeypatch.setattr(triton_backend, "LARGEST_BLOCK", 16)
    check(layout_of(62, 2), (4, 2, 3), 9)


def test_more_prefix_tokens_than_queries_in_a_program():
    check(TokenLayout((4, 4), 70), (2, 1, 2), 80)


def test_gradients_are_refused():
    layout = layout_of(16, 1)
    q, k, v = (x.requires_grad_() for x in make_qkv(layout, device=DEVICE))
    out = operators.attend_pooled(q, k, v, layout.for_kernels(2, 2), 0.25, 5, 1, "triton")
    with pytest.raises(RuntimeError, match="attend_pooled has no gradient"):
        out.sum().backward()


def test_operators():
    q, k, v = make_qkv(layout_of(16, 1), device=DEVICE)
    ops = torch.ops.sparsifiner
    torch.library.opcheck(ops.attend_pooled.default, (q, k, v, (4, 4, 1, 2, 2), 0.25, 5, 1, "triton"))
    torch.library.opcheck(ops.attend_impact.default, (q, k, v, (4, 4, 1, 2, 1, 2, 2), 0.25, 5, 1, "triton"))
