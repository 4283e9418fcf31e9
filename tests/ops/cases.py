"""Random inputs, grids and the fp64 error budget that the op tests share."""

import torch

from sparsifiner.geometry.connectivity import Connectivity, forced_prefix, key_budget
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import select_topk
from sparsifiner.ratios import exact_ratio
from sparsifiner.scorers import Place

# patches -> grid; 62 is prime times two, so every tile and window is ragged
GRIDS = {4: (2, 2), 16: (4, 4), 62: (2, 31), 196: (14, 14), 256: (16, 16), 576: (24, 24)}
# the reference takes seconds for each on a CPU
LARGE_GRIDS = {1024: (32, 32), 4096: (64, 64)}


def build_scorer(options, layout, layer=0, num_heads=2, head_dim=16):
    """The scorer of one layer."""
    return options.build(Place(layer, 1, layout, num_heads, head_dim, head_dim**-0.5))


def make_qkv(layout, heads=2, head_dim=16, batch=1, dtype=torch.float32, device="cpu"):
    """q, k, v as strided views of one projection, the way attention layers make them."""
    qkv = torch.randn(batch, layout.tokens, 3, heads, head_dim, dtype=torch.float64).to(device, dtype)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def make_connectivity(layout, keep, tile, summary, heads=2, batch=1, device="cpu"):
    """Lists selected from random scores by the reference."""
    forced = forced_prefix(layout.prefix, tile, summary)
    scores = torch.randn(batch, heads, layout.squares(tile), layout.tokens, device=device)
    indices = select_topk(
        scores, key_budget(exact_ratio(keep), layout.tokens, forced), forced=forced, backend="reference"
    )
    return Connectivity.over(layout, indices, tile, selected=True)


def largest_terms(inputs, upstream, scale):
    """Largest addend of out, dq, dk and dv: where addends cancel, rounding is of their size.

    dq_i = scale · Σ_j p_ij (dP_ij - Σ_l p_il dP_il) k_j with dP = upstream vᵀ is 0 for one key.
    """
    q, k, v = (x.double() for x in inputs)
    d_probability = (upstream.double() @ v.mT).abs().max() * scale
    return [v.abs().max(), d_probability * k.abs().max(), d_probability * q.abs().max(), upstream.abs().max()]


def assert_within_budget(actual, single, double, largest_term):
    """`actual` may err from fp64 twice as much as the fp32 reference does, plus two ulps of a term.

    The first three are the same quantity: of the backend, of the reference in the backend's dtype
    and of the reference in fp64.
    """
    assert torch.isfinite(actual).all()
    error = (actual.double() - double).abs().max()
    ulp = torch.finfo(actual.dtype).eps * largest_term
    budget = 2 * (single.double() - double).abs().max() + 2 * ulp
    assert error <= budget, f"error {error:.3e} exceeds the budget {budget:.3e}"


def layout_of(patches, prefix):
    return TokenLayout((GRIDS | LARGE_GRIDS)[patches], prefix)
