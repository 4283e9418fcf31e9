"""Random calls of the public operations: every backend equals the reference, or all raise one clear error.

`python -m tests.stress.ops --calls 10000` checks on the CPU, `make fuzz` does so with the sanitizers' native
kernels; `--device cuda` takes the kernels of a GPU.
"""

import argparse
import random
import sys
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import select_topk, sparse_attention
from tests.ops.cases import assert_within_budget, largest_terms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# how lists are made; a bad entry is one number too large or negative anywhere, as a caller's mistake
KINDS = ("ascending", "shuffled", "repeated", "gaps", "empty", "bad entry", "bad entry unchecked")
STRIDES = ("one projection", "contiguous", "tokens last", "expanded")


@dataclass(frozen=True)
class Space:
    """What random calls are drawn from.

    Attributes:
        sides: of grids, along height and width.
        tiles: sides of tiles, windows of summaries likewise.
        head_dims: of queries, keys and values.
        dtypes: names of `DTYPES`.
        prefixes: numbers of prefix tokens.
        heads: numbers of heads.
        keys: of rows of scores to select from.
        gradients: share of the calls in which gradients are compared too.
    """

    sides: tuple[int, ...]
    tiles: tuple[int, ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    gradients: float
    prefixes: tuple[int, ...] = (0, 1, 1, 2, 5)
    heads: tuple[int, ...] = (1, 2, 3)
    keys: tuple[int, ...] = (1, 2, 17, 63, 64, 65, 150, 300)


SPACES = {
    "cpu": Space(
        tuple(range(1, 13)),
        (1, 1, 2, 3, 4, 5, 8, 13, 16),
        (16, 32, 48, 64, 80, 20),
        ("fp32", "fp32", "bf16", "bf16", "fp16", "fp64"),
        0.2,
    ),
    # the interpreter takes bf16 for integers, and its time grows with every program
    "interpreter": Space((1, 2, 3, 5, 7), (1, 1, 2, 3, 8), (16, 24), ("fp32", "fp16"), 0.3),
    # every other size compiles the kernels anew
    "cuda": Space((13, 32), (1, 4, 8), (64,), ("bf16", "bf16", "fp32"), 0.02, (1, 1, 5), (2, 3), (17, 150)),
}


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of one call of `sparse_attention`.

    Attributes:
        layout: where the tokens lie.
        tile: side of the tiles.
        summary: side of the windows or None.
        size: B, H and d.
        dtype: name of the inputs' dtype.
        strides: how the inputs lie in memory.
        kind: how the lists are made.
        keys: slots of a list.
        scale: factor of the logits or None.
        gradients: whether gradients are compared too.
        seed: of the numbers.
    """

    layout: TokenLayout
    tile: int
    summary: int | None
    size: tuple[int, int, int]
    dtype: str
    strides: str
    kind: str
    keys: int
    scale: float | None
    gradients: bool
    seed: int


def draw_attention(draw: random.Random, space: Space) -> AttentionCall:
    """A random call."""
    layout = TokenLayout((draw.choice(space.sides), draw.choice(space.sides)), draw.choice(space.prefixes))
    kind = draw.choice(KINDS)
    longest = layout.tokens + 3 if kind in {"repeated", "gaps"} else layout.tokens
    return AttentionCall(
        layout=layout,
        tile=draw.choice(space.tiles),
        summary=draw.choice((None, *space.tiles)),
        size=(draw.choice((0, 1, 1, 1, 2)), draw.choice(space.heads), draw.choice(space.head_dims)),
        dtype=draw.choice(space.dtypes),
        strides=draw.choice(STRIDES),
        kind=kind,
        keys=draw.randint(0 if kind in {"gaps", "empty"} else 1, longest),
        scale=draw.choice((None, None, 0.3, -0.7, 0.0)),
        gradients=draw.random() < space.gradients,
        seed=draw.randrange(2**31),
    )


def make_lists(call: AttentionCall, generator: torch.Generator) -> torch.Tensor:
    """int32 [B, H, rows, k]."""
    B, H, _ = call.size
    N, rows = call.layout.tokens, call.layout.squares(call.tile)
    shape = (B, H, rows, call.keys)
    if call.kind == "repeated":
        return torch.randint(0, N, shape, generator=generator).int()
    if call.kind == "gaps":
        return torch.randint(-3, N, shape, generator=generator).int()
    if call.kind == "empty":
        return torch.full(shape, -1, dtype=torch.int32)
    order = torch.rand(B, H, rows, N, generator=generator).argsort(-1)[..., : call.keys].int()
    if call.kind == "shuffled":
        return order
    lists = order.sort(-1).values
    if call.kind.startswith("bad entry") and lists.numel():
        large = (N, N + 1, 10**6, 2**31 - 1)
        entries = large if call.kind == "bad entry" else (*large, -1, -2, -(10**6), -(2**31))
        place = int(torch.randint(lists.numel(), (), generator=generator))
        which = int(torch.randint(len(entries), (), generator=generator))
        lists.view(-1)[place] = entries[which]
    return lists


def make_inputs(call: AttentionCall, generator: torch.Generator, device: str) -> list[torch.Tensor]:
    """q, k and v in the call's dtype and strides."""
    B, H, d = call.size
    N, dtype = call.layout.tokens, DTYPES[call.dtype]
    qkv = torch.randn(B, N, 3, H, d, generator=generator, dtype=torch.float64).to(device, dtype)
    inputs = list(qkv.permute(2, 0, 3, 1, 4).unbind(0))
    if call.strides == "contiguous":
        return [each.contiguous() for each in inputs]
    if call.strides == "tokens last":
        return [each.mT.contiguous().mT for each in inputs]
    if call.strides == "expanded":
        return [each[:, :1].expand(B, H, N, d) for each in inputs]
    return inputs


def run_attention(
    call: AttentionCall,
    inputs: list[torch.Tensor],
    connectivity: Connectivity,
    backend: str,
    upstream: torch.Tensor,
) -> list[torch.Tensor]:
    """Output and, if the call asks for them, gradients."""
    if not call.gradients:
        return [sparse_attention(*inputs, connectivity, call.summary, call.scale, backend)]
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = sparse_attention(*leaves, connectivity, call.summary, call.scale, backend)
    # of no image nothing is used
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype), materialize_grads=True)
    return [out.detach(), *gradients]


def rounded_terms(
    call: AttentionCall, inputs: list[torch.Tensor], upstream: torch.Tensor
) -> list[torch.Tensor]:
    """The largest addends, times half of the ulps that a probability may be off.

    An exponential takes over the absolute error of a logit, twice where the logarithm of a row's sum is one
    too; that of torch's fused kernels on a CPU is good to 20 ulps.
    """
    scale = call.size[-1] ** -0.5 if call.scale is None else abs(call.scale)
    logit = (inputs[0].double() @ inputs[1].double().mT).abs().max() * scale
    return [(10 + logit) * term for term in largest_terms(inputs, upstream, scale)]


def check_attention(call: AttentionCall, backends: tuple[str, ...], device: str) -> str:
    """Compares every backend with the reference; returns how the call ended."""
    generator = torch.Generator().manual_seed(call.seed)
    lists = make_lists(call, generator).to(device)
    geometry = (lists, call.layout.grid, call.tile, call.layout.prefix)
    if call.kind == "bad entry" and lists.numel():
        with pytest.raises(ValueError, match=f"indices name token {int(lists.max())}, but"):
            Connectivity(*geometry)
        return "refused"
    connectivity = Connectivity(*geometry, check=call.kind != "bad entry unchecked")
    if call.kind == "ascending" and call.seed % 2:  # as lists of this package come
        connectivity = replace(connectivity, check=False, selected=True)
    inputs = make_inputs(call, generator, device)
    upstream = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64).to(device)
    upstream = upstream.to(inputs[0].dtype)
    double = run_attention(
        call, [each.double() for each in inputs], connectivity, "reference", upstream.double()
    )
    if call.dtype == "fp64":  # nothing is more exact: its errors are those of fp32, in proportion
        rounded = run_attention(
            call, [each.float() for each in inputs], connectivity, "reference", upstream.float()
        )
        less = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        single = [exact + less * (each - exact) for each, exact in zip(rounded, double, strict=True)]
    else:
        single = run_attention(call, inputs, connectivity, "reference", upstream)
    terms = rounded_terms(call, inputs, upstream) if inputs[0].numel() else [torch.zeros(())] * 4
    ended = "equal"
    for backend in backends:
        try:
            actual = run_attention(call, inputs, connectivity, backend, upstream)
        except ValueError as error:
            if f"backend={backend!r} takes" not in str(error):
                raise
            ended = "not taken by a backend"
            continue
        for quantities in zip(actual, single, double, terms, strict=False):
            if quantities[0].numel():
                assert_within_budget(*quantities)
    return ended


def check_selection(seed: int, space: Space, backends: tuple[str, ...], device: str) -> str:
    """Compares the lists of every backend with those of the reference, exactly."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    N = draw.choice(space.keys)
    shape = (draw.choice((0, 1, 2)), draw.choice((1, 2)), draw.randint(0, min(N, 40)), N)
    scores = torch.randn(shape, generator=generator)
    if draw.random() < 0.5:  # many are equal
        scores = (scores * draw.choice((1, 4))).round()
    for special in (torch.nan, torch.inf, -torch.inf):
        if draw.random() < 0.3:
            scores[torch.rand(shape, generator=generator) < draw.choice((0.1, 0.9))] = special
    scores = scores.to(device, DTYPES[draw.choice(("fp32", "bf16", "fp16", "fp64"))])
    if draw.random() < 0.3:
        scores = scores.mT.contiguous().mT
    budget = draw.choice((0, 1, 2, N // 8, N // 2, N - 1, N, N + 1))
    forced = draw.choice((0, 0, 1, 2))
    results = []
    for backend in ("reference", *backends):
        try:
            results.append(select_topk(scores, budget, forced=forced, backend=backend))
        except ValueError as error:
            results.append(str(error))
    expected = results[0]
    for actual in results[1:]:
        if isinstance(expected, str):
            assert actual == expected
        else:
            assert torch.equal(actual, expected)
    return "refused" if isinstance(expected, str) else "equal"


def run(calls: int, seed: int, backends: tuple[str, ...], space: Space, device: str) -> Counter[str]:
    """Makes so many calls; returns how many ended how, by kind.

    Raises:
        AssertionError: backends differ; the call is in its text.
    """
    draw, ended = random.Random(seed), Counter()
    for done in range(calls):
        if done and done % max(1, calls // 20) == 0:
            print(f"{done} of {calls} calls", file=sys.stderr, flush=True)
        call = draw.randrange(2**31) if draw.random() < 0.2 else draw_attention(draw, space)
        try:
            if isinstance(call, int):
                ended["selection", check_selection(call, space, backends, device)] += 1
            else:
                ended[call.kind, check_attention(call, backends, device)] += 1
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise AssertionError(f"{call}: {error}") from error
    return ended


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", default=["torch", "cpu"])
    parser.add_argument("--space", choices=SPACES, default="cpu")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    ended = run(options.calls, options.seed, tuple(options.backends), SPACES[options.space], options.device)
    for (kind, how), count in sorted(ended.items()):
        print(f"{count:6} {kind}: {how}")
    bad = sum(count for (kind, _), count in ended.items() if kind.startswith("bad entry"))
    backends = ", ".join(options.backends)
    print(f"{sum(ended.values()):6} calls on {backends}, {bad} with a bad entry: no difference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
