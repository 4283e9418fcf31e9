"""Counts the kernels that 30 image sizes of one model ask for: `python -m tests.ops.specialisations`."""

import json
from collections import defaultdict

import torch
import triton

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.attend_selected import triton_backend as attend_selected
from sparsifiner.ops.program import Draft
from sparsifiner.ops.sparse_attention import triton_backend as attention
from sparsifiner.ops.sparse_attention import triton_gradients as gradients
from tests.ops.sm90 import given, projected, specialise

# patches along height and width of images of 256 to 1,440 pixels, squares and others
SIZES = [(side, side) for side in range(16, 90, 4)] + [(side, 2 * side - 3) for side in range(16, 60, 4)]
HEADS, HEAD_DIM, TILE, POOL = 6, 64, 16, 4


def launches(layout):
    """Of a forward pass in inference, and of one with gradients."""
    q, k, v = projected(layout, HEADS, HEAD_DIM, torch.bfloat16, batch=1)
    budget, summary = -(-layout.tokens // 10), layout.auto_summary()
    draft = Draft()
    sizes = (layout.for_kernels(TILE, POOL, summary, summary), 0.125, budget, layout.prefix)
    attend_selected._by_impact.write(draft, q, k, v, sizes=sizes)
    rows, windows = layout.squares(TILE), layout.squares(summary)
    indices = given(1, HEADS, rows, budget, dtype=torch.int32)
    options = {"geometry": layout.for_kernels(TILE, summary), "scale": 0.125, "ascending": True}
    attention.attend.write(draft, q, k, v, indices, None, training=True, **options)
    out = given(1, layout.tokens, HEADS, HEAD_DIM).transpose(1, 2)
    saved = (
        *(out, given(1, HEADS, layout.tokens, dtype=torch.float32)),
        *(given(1, HEADS, rows, windows, dtype=torch.uint8), given(2, 1, HEADS, windows, HEAD_DIM)),
    )
    gradients._gradients.write(draft, out, q, k, v, indices, *saved, **options)
    return draft.launches


def main():
    """Prints the counts."""
    kernels, powers = defaultdict(set), set()
    for grid in SIZES:
        layout = TokenLayout(grid, 1)
        powers.add(triton.next_power_of_2(layout.patches))
        for launch in launches(layout):
            kernels[launch.kernel.__name__].add(specialise(launch)[0])
    counts = {name: len(found) for name, found in kernels.items()}
    print(json.dumps({"sizes": len(SIZES), "powers_of_two": len(powers), "kernels": counts}))


if __name__ == "__main__":
    main()
