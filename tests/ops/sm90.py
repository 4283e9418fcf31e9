"""Compiles the kernels of programs for a GPU that need not be there: `python -m tests.ops.sm90 [--sample]`.

Prints one line per kernel and set of options: what keeps C from launching it, or nothing.
"""

import inspect
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.attend_selected import triton_backend as attend_selected
from sparsifiner.ops.launching import Address, why_not_by_c
from sparsifiner.ops.program import Buffer, Draft, Memory
from sparsifiner.ops.select import triton_backend, triton_lowrank, triton_tiles
from sparsifiner.ops.sparse_attention import triton_backend as attention
from sparsifiner.ops.sparse_attention import triton_gradients as gradients

TARGET = GPUTarget("cuda", 90, 32)


class Pointer(MockTensor):
    """An address of memory of a dtype, a multiple of 16."""

    @staticmethod
    def data_ptr():
        return 0


def given(*shape, dtype=torch.bfloat16):
    """An input of an operation."""
    draft = Draft()
    return Buffer(Memory(0), shape, draft.empty(*shape, dtype=dtype).strides, dtype)


def projected(layout, heads, head_dim, dtype, batch=2):
    """q, k and v as views of one projection."""
    whole = given(batch, layout.tokens, 3, heads, head_dim, dtype=dtype).strides
    strides = (whole[0], whole[3], whole[1], 1)
    shape = (batch, heads, layout.tokens, head_dim)
    return [Buffer(Memory(0), shape, strides, dtype) for _ in range(3)]


def specialise(launch):
    """What a launch's kernel is compiled for, as a word, and what its compiler is given."""
    kernel, backend = launch.kernel, make_backend(TARGET)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = [Pointer(x.dtype) if isinstance(x, Buffer) else x for x in launch.arguments]
    options = {"debug": False, **launch.options}
    for name in ("instrumentation_mode", "fpsan_homomorphic_casts"):
        if name in inspect.getsource(type(kernel).run):
            options[name] = "" if name == "instrumentation_mode" else False
    bound, specialization, parsed = binder(*arguments, **options)
    told = kernel._pack_args(backend, options, bound, specialization, parsed)
    return f"{specialization} {parsed}", told


def compile_launch(launch):
    """The kernel of a launch, compiled for `TARGET`."""
    _, (parsed, signature, constants, attributes) = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options=parsed.__dict__)


def drafts(layout, *, heads=6, head_dim=64, dtype=torch.bfloat16, sample=False):
    """What every operation writes for calls of models, at one layout; each kernel once or more."""
    q, k, v = projected(layout, heads, head_dim, dtype)
    out = given(2, layout.tokens, heads, head_dim, dtype=dtype).transpose(1, 2)
    budget = -(-layout.tokens // 10)
    designs = ((16, 4, layout.auto_summary()), (1, 1, 0), (8, 4, layout.auto_summary()))
    for tile, pool, summary in designs[:2] if sample else designs:
        rows, windows = layout.squares(tile), layout.squares(summary) if summary else 0
        indices = given(2, heads, rows, budget, dtype=torch.int32)
        means = given(2, 2, heads, windows, head_dim, dtype=dtype)
        lists = {"budget": budget, "forced": layout.prefix}
        if summary:
            geometry = layout.for_kernels(tile, pool, summary)
            yield triton_tiles.select_impact, (q, k, v), {"geometry": geometry, "scale": 0.125, **lists}
            yield triton_tiles.select_pooled, (q, k), {"geometry": layout.for_kernels(tile), **lists}
            both = (layout.for_kernels(tile, pool, summary, summary), 0.125, *lists.values())
            yield attend_selected._by_impact, (q, k, v), {"sizes": both}
            both = (layout.for_kernels(tile, summary), 0.125, *lists.values())
            yield attend_selected._by_pooled, (q, k, v), {"sizes": both}
        sizes = {"geometry": layout.for_kernels(tile, summary or None), "scale": 0.125}
        counts = given(2, heads, rows, windows, dtype=torch.uint8)
        weight = given(2, heads, layout.tokens, dtype=torch.float32)
        for ascending in (True,) if sample else (True, False):
            forward = {**sizes, "ascending": ascending, "training": True}
            for known in (means, None):
                yield attention.attend, (q, k, v, indices, known), forward
            inputs = (out, q, k, v, indices, out, weight, counts, means)
            for operation in (gradients._gradients, gradients._entries):
                yield operation, inputs, {**sizes, "ascending": ascending}
    c, basis = 32, 32
    weights = [given(*shape, dtype=dtype) for shape in ((c, head_dim), (c,), (c, head_dim), (c,))]
    weights += [given(layout.tokens, basis, dtype=dtype), given(layout.tokens, basis, dtype=dtype)]
    sizes = {"temperature": 0.2, "coef_topk": 8, **lists}
    yield triton_lowrank.select_lowrank, (q, k, *weights), {"geometry": layout.for_kernels(1), **sizes}
    scores, own = given(2, heads, 64, layout.tokens, dtype=torch.float32), given(64, 1, dtype=torch.int32)
    yield triton_backend._select_topk, (scores, own), lists


def main():
    """Compiles all and prints what was found."""
    seen = set()
    sample = "--sample" in sys.argv
    for dtype in (torch.bfloat16,) if sample else (torch.bfloat16, torch.float32):
        for operation, inputs, options in drafts(TokenLayout((32, 32), 1), dtype=dtype, sample=sample):
            draft = Draft()
            operation.write(draft, *inputs, **options)
            for launch in draft.launches:
                kernel = compile_launch(launch)
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                bare = type(launch)(
                    launch.kernel,
                    launch.grid,
                    tuple(Address(0, 0) if isinstance(x, Buffer) else x for x in launch.arguments),
                    launch.options,
                )
                found = {"kernel": kernel.name, "reason": why_not_by_c(kernel, bare)}
                print(json.dumps(found), flush=True)
    print(json.dumps({"triton": triton.__version__, "kernels": len(seen)}), file=sys.stderr)


if __name__ == "__main__":
    main()
