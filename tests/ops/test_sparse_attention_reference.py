"""The specification of sparse attention, checked against loops and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Run
from sparsifiner.ops import sparse_attention
from tests.ops.cases import GRIDS, make_connectivity, make_qkv


def attend(q, k, v, connectivity, summary=None, scale=None):
    return sparse_attention(q, k, v, connectivity, summary, scale, backend="reference")


def attend_by_loops(q, k, v, connectivity, summary, scale):
    """The definition query by query in plain Python, for one batch element and head."""
    layout, (_, width) = connectivity.layout, connectivity.grid
    out = torch.empty_like(q)
    for i in range(layout.tokens):
        if i < layout.prefix:
            out[i] = (k @ q[i] * scale).softmax(0) @ v
            continue
        y, x = divmod(i - layout.prefix, width)
        tiles_per_row = math.ceil(width / connectivity.tile)
        row = (y // connectivity.tile) * tiles_per_row + x // connectivity.tile
        listed = [j for j in connectivity.indices[0, 0, row].tolist() if j >= 0]
        logits = [q[i] @ k[j] * scale for j in listed]
        values = [v[j] for j in listed]
        windows = {}
        for j in range(layout.prefix, layout.tokens) if summary else ():
            wy, wx = divmod(j - layout.prefix, width)
            windows.setdefault((wy // summary, wx // summary), []).append(j)
        for tokens in windows.values():
            unselected = len(set(tokens) - set(listed))
            if unselected:
                logits.append(q[i] @ k[tokens].mean(0) * scale + math.log(unselected))
                values.append(v[tokens].mean(0))
        out[i] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("grid", "tile", "summary"),
    [
        ((4, 4), 1, None),
        ((4, 4), 1, 2),
        ((5, 7), 2, 3),
        ((5, 7), 3, 2),
        ((3, 10), 8, 4),
        ((2, 2), 8, 4),
    ],
)
def test_equals_the_definition_by_loops(grid, tile, summary, prefix):
    layout = TokenLayout(grid, prefix)
    q, k, v = make_qkv(layout, heads=1, dtype=torch.float64)
    connectivity = make_connectivity(layout, 0.2, tile, summary, heads=1)
    expected = attend_by_loops(q[0, 0], k[0, 0], v[0, 0], connectivity, summary, 0.3)
    actual = attend(q, k, v, connectivity, summary, 0.3)[0, 0]
    assert (actual - expected).abs().max() < 1e-12


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("tile", [1, 8])
@pytest.mark.parametrize("summary", [None, 2, 4])
def test_all_keys_are_dense_attention(prefix, tile, summary):
    layout = TokenLayout((14, 14), prefix)  # 197 tokens with one prefix token: ragged at tile 8
    q, k, v = make_qkv(layout, dtype=torch.float64)
    connectivity = make_connectivity(layout, 1.0, tile, summary)
    dense = F.scaled_dot_product_attention(q, k, v)
    assert (attend(q, k, v, connectivity, summary) - dense).abs().max() < 1e-12


@pytest.mark.parametrize("patches", GRIDS)
@pytest.mark.parametrize("tile", [1, 4])
def test_windows_of_one_patch_are_dense_attention_at_any_keep(patches, tile):
    layout = TokenLayout(GRIDS[patches], 1)
    q, k, v = make_qkv(layout, dtype=torch.float64)
    connectivity = make_connectivity(layout, 0.05, tile, 1)
    dense = F.scaled_dot_product_attention(q, k, v)
    assert (attend(q, k, v, connectivity, summary=1) - dense).abs().max() < 1e-12


def test_one_key_copies_its_value():
    layout = TokenLayout((3, 3), 0)
    q, k, v = make_qkv(layout)
    indices = torch.arange(8, -1, -1, dtype=torch.int32).view(1, 1, 9, 1).expand(1, 2, 9, 1)
    assert torch.equal(attend(q, k, v, Connectivity(indices, (3, 3))), v.flip(2))


def test_empty_slots_are_ignored_and_an_empty_list_gives_zeros():
    layout = TokenLayout((2, 2), 1)
    q, k, v = make_qkv(layout, heads=1)
    q.requires_grad_()
    indices = torch.tensor([[2, -1], [-1, -1], [0, 3], [1, 4]], dtype=torch.int32).view(1, 1, 4, 2)
    out = attend(q, k, v, Connectivity(indices, (2, 2), prefix=1))
    assert torch.equal(out[0, 0, 1], v[0, 0, 2])
    assert torch.equal(out[0, 0, 2], torch.zeros_like(v[0, 0, 2]))
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


def test_prefix_queries_see_every_key_and_no_summary():
    layout = TokenLayout((4, 4), 2)
    q, k, v = make_qkv(layout)
    connectivity = make_connectivity(layout, 0.1, 2, 2)
    dense = F.scaled_dot_product_attention(q, k, v)
    assert (attend(q, k, v, connectivity, summary=2) - dense)[:, :, :2].abs().max() < 1e-6


def test_huge_logits_stay_finite():
    layout = TokenLayout((4, 4), 1)
    q, k, v = (x * 1e4 for x in make_qkv(layout))
    out = attend(q, k, v, make_connectivity(layout, 0.3, 2, 2), summary=2)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("tile", "summary", "prefix"), [(1, None, 1), (2, 2, 0), (2, 2, 2)])
def test_gradients_match_finite_differences(tile, summary, prefix):
    layout = TokenLayout((3, 3), prefix)
    inputs = [x.clone().requires_grad_() for x in make_qkv(layout, head_dim=3, dtype=torch.float64)]
    connectivity = make_connectivity(layout, 0.4, tile, summary)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, connectivity, summary), inputs)


def test_bad_arguments_are_named():
    layout = TokenLayout((4, 4), 1)
    q, k, v = make_qkv(layout)
    connectivity = make_connectivity(layout, 0.5, 1, None)
    with pytest.raises(TypeError, match="q, k and v must share one floating dtype"):
        sparse_attention(q, k.double(), v, connectivity)
    with pytest.raises(ValueError, match=r"must all be \[B, H, N, d\]"):
        sparse_attention(q, k[..., :4], v, connectivity)
    with pytest.raises(ValueError, match="q has 16 tokens but connectivity describes 17"):
        sparse_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], connectivity)
    with pytest.raises(ValueError, match=r"\[B, H\] = \(1, 2\), q has \(1, 1\)"):
        sparse_attention(q[:, :1], k[:, :1], v[:, :1], connectivity)
    with pytest.raises(ValueError, match="summary must be a window side of at least 1"):
        sparse_attention(q, k, v, connectivity, summary=0)
    with pytest.raises(ValueError, match=r"side of at least 1 patch or None, got Run\(length=2\)"):
        sparse_attention(q, k, v, connectivity, summary=Run(2))  # which a grid does not have
    with pytest.raises(ValueError, match="backend='flash' is not available"):
        sparse_attention(q, k, v, connectivity, backend="flash")
