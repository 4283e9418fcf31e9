"""No tensor of the sparse path grows with N * N."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsifiner.geometry.connectivity import forced_prefix, key_budget
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import sparse_attention
from sparsifiner.ratios import exact_ratio
from sparsifiner.scorers import SCORERS, ListSpec
from tests.ops.cases import build_scorer, make_qkv


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage that any operation returns, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, size)
        return out


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("scorer", "tile", "summary"),
    [
        ("impact", 8, 8),
        ("pooled", 8, 8),
        ("pooled", 1, None),
        ("lowrank", 1, None),
        ("oracle", 8, 8),
        ("random", 1, None),
    ],
)
def test_forward_and_backward_allocate_nothing_of_n_by_n(scorer, tile, summary, backend):
    layout = TokenLayout((48, 48), 1)
    N = layout.tokens
    inputs = [x.clone().requires_grad_() for x in make_qkv(layout, heads=1, head_dim=8)]
    q, k, v = inputs
    forced = forced_prefix(layout.prefix, tile, summary)
    spec = ListSpec(layout, tile, key_budget(exact_ratio(0.1), N, forced), forced, scale=8**-0.5)
    module = build_scorer(SCORERS.read(scorer), layout, num_heads=1, head_dim=8)
    with LargestTensor() as largest:
        connectivity = module(q, k, v, spec)
        out = sparse_attention(q, k, v, connectivity, summary, backend=backend)
        out.sum().backward()
    if backend == "reference":  # shows that the measurement sees such tensors
        assert largest.elements >= N * N
    else:
        assert largest.elements < N * N / 4
