"""Times one attention operation, part by part, against the fastest dense path of the same run."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from sparsifiner.config import SparsifyConfig
from sparsifiner.device import choose_device
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.measure.candidates import Candidate, time_candidates
from sparsifiner.measure.inputs import projected_inputs
from sparsifiner.measure.parity import Parity, check_operation
from sparsifiner.measure.records import Row, command_of, provenance
from sparsifiner.measure.rivals import (
    BLOCK_SIDES,
    Attention,
    block_lists,
    dense_paths,
    distance_to_dense,
    flex_blocks_attention,
    masked_dense_attention,
    matmul_attention,
    random_blocks,
    why_not_square,
)
from sparsifiner.measure.settings import DTYPES, Precision, check_settings, cpu_threads, one_for_each
from sparsifiner.ops import sparse_attention
from sparsifiner.ops.backends import resolve_backend
from sparsifiner.ops.sparse_attention.api import attend_scored
from sparsifiner.plan import Call, plan
from sparsifiner.scorers import SCORERS, Impact, ListSpec, Place, Scorer

EVERYTHING = "everything"
FORWARD, BACKWARD = "forward", "forward + backward"

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class OpsBenchmark:
    """Which operations to time.

    Attributes:
        grid: sides of the patch grids, one or several: '16 32 64'; N = side² + prefix.
        batch_size: B, one for all grids or one per grid.
        keep: share of keys per list in (0, 1], one for all grids or one per grid.
        heads: H.
        head_dim: d.
        dtype: of q, k and v.
        prefix: number of prefix tokens.
        tile: side in patches of the square of queries that share a key list.
        summary: side in patches of the summary windows, "auto", or "none".
        share: layers that attend by the same lists; "everything" then is the mean over as many layers, one of
            which scores and selects.
        scorer: who chooses the keys, by default that of the preset "fast"; the low-rank one has random
            parameters, spread as trained ones are.
        pool: side in patches of the squares whose mean queries score, of the scorer "impact"; the preset's by
            default.
        backend: of selection and attention.
        backward: time forward and backward together, too.
        device: where to compute, such as "cuda" or "cpu"; "auto" takes a GPU if there is one.
        threads: of the CPU, torch's choice by default.
        runs: rounds that count.
        warmup: rounds before them.
        seed: of inputs and parameters.
    """

    grid: int | list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    batch_size: int | list[int] = 8
    keep: float | list[float] = 0.1
    heads: int = 6
    head_dim: int = 64
    dtype: Precision = "bf16"
    prefix: int = 0
    tile: int = 8
    summary: int | Literal["auto", "none"] | None = 8
    share: int = 1
    scorer: Literal["pooled", "impact", "lowrank"] = "impact"
    pool: int | None = None
    backend: str = "auto"
    backward: bool = False
    device: str = "auto"
    threads: int | None = None
    runs: int = 30
    warmup: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Rejects impossible values by name."""
        check_settings(self, {"grid": 1, "heads": 1, "head_dim": 1, "prefix": 0})
        if self.pool is not None and self.scorer != "impact":
            raise ValueError(f"pool={self.pool} is an option of scorer='impact', not of {self.scorer!r}")
        self.cases()

    def cases(self) -> list["Case"]:
        """One per grid.

        Raises:
            ValueError: lists differ in length, or a value is impossible.
        """
        grids = self.grid if isinstance(self.grid, list) else [self.grid]
        batches = one_for_each("batch_size", self.batch_size, "grid", len(grids))
        keeps = one_for_each("keep", self.keep, "grid", len(grids))
        return [
            Case(TokenLayout((side, side), self.prefix), int(batch), self._config(keep))
            for side, batch, keep in zip(grids, batches, keeps, strict=True)
        ]

    def _config(self, keep: float) -> SparsifyConfig:
        return SparsifyConfig(
            keep=keep,
            profile="even",
            tile=self.tile,
            summary=None if self.summary == "none" else self.summary,
            scorer=Impact(pool=self.pool) if self.scorer == "impact" else SCORERS.read(self.scorer),
            share=self.share,
            backend=self.backend,
        )


@dataclass(frozen=True)
class Case:
    """One operation.

    Attributes:
        layout: where the tokens lie.
        batch: B.
        config: how its lists are chosen.
    """

    layout: TokenLayout
    batch: int
    config: SparsifyConfig

    @property
    def summary(self) -> int | None:
        """Side of the windows."""
        return self.layout.auto_summary() if self.config.summary == "auto" else self.config.summary

    @property
    def windows(self) -> int:
        """Summary keys."""
        return 0 if self.summary is None else self.layout.squares(self.summary)

    def list_spec(self, place: Place) -> ListSpec:
        """The lists wanted.

        Raises:
            ValueError: a layer would be dense attention.
        """
        spec = plan(Call(self.layout), self.config, place)
        if spec is None:
            raise ValueError(
                f"keep={self.config.keep} of {self.layout.tokens} tokens and their summaries are not fewer "
                "than all keys: a layer would be dense attention; lower keep"
            )
        return spec


def benchmark_operations(settings: OpsBenchmark) -> Iterator[list[Row]]:
    """Times selection, attention and both; against dense attention, FlexAttention and a dense mask.

    Before anything of a case is timed its results are compared with the reference. Then all candidates take
    turns on several sets of inputs, q, k and v being strided views of one projection [B, N, 3, H, d].

    Args:
        settings: what to time.

    Yields:
        The rows of each case, one per candidate: "select" (scores and selection), "attend" (on given
        lists, summaries included), "everything" (both), dense paths by name, "flex attention" (random
        blocks of equal density), "masked dense" (the official way), and "blocks of 4x4 keys" and of 8x8:
        attention as "attend", on given lists of whole blocks and as many keys. See `time_candidates` for
        their columns; `relative_l2` is the distance ‖x - dense‖ / ‖dense‖ of the first image's result,
        where keys were chosen for these inputs.

    Raises:
        ParityError: the backend computes something else than the reference.
        ValueError: the device or the backend cannot be used.
    """
    device = choose_device(settings.device)
    resolve_backend(settings.backend, "sparse_attention", device)
    command = command_of("bench ops", settings)
    with cpu_threads(settings.threads):
        for case in tqdm(settings.cases(), desc="grids", disable=None, leave=False):
            torch.compiler.reset()  # compiled code of other sizes would be in the way
            yield _measure(case, settings, device, {**provenance(device), "command": command})


def _measure(case: Case, settings: OpsBenchmark, device: torch.device, source: Row) -> list[Row]:
    generator = torch.Generator(device).manual_seed(settings.seed)
    shape = (case.batch, case.layout.tokens, 3, settings.heads, settings.head_dim)
    sets = projected_inputs(shape, DTYPES[settings.dtype], generator)
    layers = -(-len(sets) // settings.share) * settings.share  # as many as whole groups have
    sets = list(itertools.islice(itertools.cycle(sets), layers))
    sizes = (settings.heads, settings.head_dim, settings.head_dim**-0.5)
    place = Place(0, 1, case.layout, *sizes)
    scorer = _make_scorer(case, settings, place, device)
    spec = case.list_spec(place)
    upstream = torch.randn(sets[0][0].shape, generator=generator, device=device).to(sets[0][0].dtype)
    parity = check_operation(scorer, sets[0], spec, case.summary, upstream if settings.backward else None)

    held: list[Connectivity] = []  # the lists of the last layer that scored

    def share_lists(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, held[0], summary=case.summary, backend=spec.backend)

    def score_and_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held[:] = [scorer(q, k, v, spec)]
        return attend_scored(q, k, v, held[0], summary=case.summary, backend=spec.backend)

    everything = [share_lists if layer % settings.share else score_and_attend for layer in range(len(sets))]

    @torch.no_grad()
    def result_and_lists() -> tuple[Tensor, Connectivity]:
        q, k, v = sets[0]
        connectivity = scorer(q, k, v, spec)
        return attend_scored(q, k, v, connectivity, summary=case.summary, backend=spec.backend), connectivity

    visits = (spec.budget + case.windows) / case.layout.tokens
    lists = [scorer(q, k, v, spec) for q, k, v in sets]
    result, _ = result_and_lists()
    details = {"key_visits": visits, "relative_l2": distance_to_dense(result, sets[0])}
    shared: dict[str, Any] = {"whole": False, "required": True, "details": details}
    select = [functools.partial(scorer, q, k, v, spec) for q, k, v in sets]
    attend = [
        functools.partial(sparse_attention, *inputs, each, summary=case.summary, backend=spec.backend)
        for inputs, each in zip(sets, lists, strict=True)
    ]
    gradient = upstream if settings.backward else None
    candidates = [
        Candidate("select", FORWARD, select, **shared | {"details": {"key_visits": visits}}),
        Candidate("attend", FORWARD, attend, **shared),
        *_passes(
            EVERYTHING, everything, sets, gradient, required=True, needs=result_and_lists, details=details
        ),
        *_rivals(case, settings, sets, gradient, lists[0], generator),
        *_block_rivals(case, sets, gradient, spec),
    ]
    rows = time_candidates(
        candidates,
        runs=settings.runs,
        warmup=settings.warmup,
        device=device,
        label=f"N = {case.layout.tokens}",
    )
    input_bytes = sum(each.nbytes for each in sets[0])
    for row in rows:
        scratch = row["memory_bytes"]
        row["memory_share"] = None if scratch is None else scratch / input_bytes
    return [_describe(case, settings, spec, len(sets), parity) | row | source for row in rows]


def _rivals(
    case: Case,
    settings: OpsBenchmark,
    sets: list[Inputs],
    upstream: Tensor | None,
    connectivity: Connectivity,
    generator: torch.Generator,
) -> list[Candidate]:
    device, N = generator.device, case.layout.tokens
    no_square = why_not_square(case.batch, settings.heads, N, device)
    budget = connectivity.indices.shape[-1]
    density = (budget + case.windows) / N
    rivals = []
    for name, path in dense_paths(device).items():
        why_not = no_square if path is matmul_attention else None
        details = {"key_visits": 1.0}
        rivals += _passes(name, [path], sets, upstream, dense=True, why_not=why_not, details=details)
    flex: list[Attention] = []
    no_flex: str | None = "compiled kernels need a GPU"
    if device.type == "cuda":
        blocks, density = random_blocks(N, density, generator)
        flex, no_flex = [flex_blocks_attention(blocks)], None
    details = {"key_visits": density}
    rivals += _passes("flex attention", flex, sets, upstream, why_not=no_flex, details=details)
    masked = [] if no_square else [masked_dense_attention(~connectivity.to_mask())]
    details = {"key_visits": budget / N}
    rivals += _passes("masked dense", masked, sets, upstream, why_not=no_square, details=details)
    return rivals


def _block_rivals(case: Case, sets: list[Inputs], upstream: Tensor | None, spec: ListSpec) -> list[Candidate]:
    """Our attention on lists of whole blocks, at as many visits as whole blocks allow."""
    rivals = []
    for side in BLOCK_SIDES:
        attentions: list[Attention] = []
        details, why_not = {}, None
        try:
            lists = [block_lists(q, k, case.layout, spec.tile, side, spec.budget) for q, k, _ in sets]
        except ValueError as error:
            why_not = str(error)
        else:
            attentions = [
                functools.partial(
                    sparse_attention, connectivity=each, summary=case.summary, backend=spec.backend
                )
                for each in lists
            ]
            result = _forward(attentions[0], sets[0])
            details = {
                "key_visits": lists[0].density() + case.windows / case.layout.tokens,
                "relative_l2": distance_to_dense(result, sets[0]),
            }
        name = f"blocks of {side}x{side} keys"
        rivals += _passes(name, attentions, sets, upstream, why_not=why_not, details=details)
    return rivals


def _passes(
    part: str, attentions: Sequence[Attention], sets: list[Inputs], upstream: Tensor | None, **options: Any
) -> list[Candidate]:
    """Attention as a candidate for the forward pass and, with `upstream`, for both passes.

    `attentions` are one for each set of inputs, or one for all, or none where it cannot run.
    """
    of_sets = list(zip([*attentions] * (len(sets) // max(1, len(attentions))), sets, strict=False))
    forward = [functools.partial(_forward, each, inputs) for each, inputs in of_sets]
    candidates = [Candidate(part, FORWARD, forward, **options)]
    if upstream is not None:
        both = [functools.partial(_gradients, each, inputs, upstream) for each, inputs in of_sets]
        candidates.append(Candidate(part, BACKWARD, both, **{**options, "needs": None}))
    return candidates


@torch.no_grad()
def _forward(attention: Attention, inputs: Inputs) -> Tensor:
    return attention(*inputs)


def _gradients(attention: Attention, inputs: Inputs, upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    return torch.autograd.grad(attention(*leaves), leaves, upstream)


def _make_scorer(case: Case, settings: OpsBenchmark, place: Place, device: torch.device) -> Scorer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        scorer = case.config.scorer.build(place)
        scorer.imitate_training()
    return scorer.to(device, DTYPES[settings.dtype]).requires_grad_(False)


def _describe(case: Case, settings: OpsBenchmark, spec: ListSpec, sets: int, parity: Parity) -> Row:
    """Columns that all candidates of a case share."""
    return {
        "benchmark": "ops",
        "tokens": case.layout.tokens,
        "grid": case.layout.grid[0],
        "prefix": case.layout.prefix,
        "batch": case.batch,
        "heads": settings.heads,
        "head_dim": settings.head_dim,
        "dtype": settings.dtype,
        "keep": case.config.keep,
        "budget": spec.budget,
        "windows": case.windows,
        "tile": case.config.tile,
        "share": case.config.share,
        "summary": case.summary,
        "scorer": SCORERS.name_of(case.config.scorer),
        "pool": settings.pool,
        "backend": case.config.backend,
        "parity_error": parity.error,
        "parity_budget": parity.budget,
        "parity_agreement": parity.agreement,
        "input_sets": sets,
        "runs": settings.runs,
    }
