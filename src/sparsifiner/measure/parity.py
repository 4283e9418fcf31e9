"""Whether a backend computes what the reference does: nothing is timed before it does."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsifiner.convert import sparse_layers
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Side
from sparsifiner.ops.sparse_attention.api import attend_scored
from sparsifiner.scorers import BorrowingScorer, ListSpec, Scorer

# Up to here the reference computes in fp64; beyond it only where fp32 itself is judged.
_DOUBLE_TOKENS = 4096
# Rounded scores swap keys around the threshold, a wrong selection swaps most.
_LEAST_AGREEMENT = 0.9


class ParityError(RuntimeError):
    """A backend computes something else than the reference."""


@dataclass(frozen=True)
class Parity:
    """How far a backend is from the reference.

    Attributes:
        error: the largest relative error (Frobenius norm) of the output and, if asked for, of the gradients.
        budget: what was allowed for that quantity.
        agreement: share of the keys that the reference lists which the backend lists too.
    """

    error: float
    budget: float
    agreement: float


def check_operation(
    scorer: Scorer,
    inputs: tuple[Tensor, Tensor, Tensor],
    spec: ListSpec,
    summary: Side | None,
    upstream: Tensor | None = None,
) -> Parity:
    """Compares selection and attention with the reference, on the last head of the last batch element.

    The backend computes all heads and batch elements, as it does when it is timed. The reference computes
    in fp64, or in fp32 for 16-bit inputs of more than 4,096 tokens. The relative error ‖x - r‖ / ‖r‖ in the
    Frobenius norm may be max(2 · error of the reference in the dtype of the inputs, 2 · eps of that dtype).
    That of the output may also be 2 · eps of fp32 · ‖Σ p |v|‖ / ‖Σ p v‖: sums whose terms cancel lose digits
    in any order.

    Args:
        scorer: chooses the keys.
        inputs: q, k and v, each [B, H, N, d].
        spec: the lists wanted; its backend is checked.
        summary: side of the summary windows, or the run that one is; None for no summaries.
        upstream: gradient of the output [B, H, N, d] with which to check those of q, k and v, or None.

    Raises:
        ParityError: the backend is further off than that.
    """
    q, k, v = inputs
    connectivity = scorer(q, k, v, spec)
    last = spec.connectivity(connectivity.indices[-1:, -1:])
    # of all heads, since patterns differ from head to head
    expected = scorer(q[-1:], k[-1:], v[-1:], replace(spec, backend="reference")).indices[:, -1:]
    where = f"N={spec.layout.tokens}, {str(q.dtype).removeprefix('torch.')}; nothing was timed"
    agreement = _agreement(last.indices, expected, spec.layout.tokens)
    if not agreement >= _LEAST_AGREEMENT:
        raise ParityError(
            f"backend={spec.backend!r} lists {100 * agreement:.1f} % of the keys that the reference lists, "
            f"at least {100 * _LEAST_AGREEMENT:.0f} % are needed ({where})"
        )
    computed = _results(inputs, connectivity, summary, spec.backend, upstream)
    actual = [each[-1:, -1:] for each in computed]
    sliced = [each[-1:, -1:] for each in inputs]
    gradient = None if upstream is None else upstream[-1:, -1:]
    rounded = _results(sliced, last, summary, "reference", gradient)
    accurate = torch.float64
    if spec.layout.tokens > _DOUBLE_TOKENS and q.dtype != torch.float32:
        accurate = torch.float32
    widened = [each.to(accurate) for each in sliced]
    exact = _results(widened, last, summary, "reference", None if gradient is None else gradient.to(accurate))
    (terms,) = _results([*widened[:2], widened[2].abs()], last, summary, "reference", None)
    cancelled = torch.finfo(torch.float32).eps * float(terms.norm() / exact[0].norm())
    worst = Parity(0.0, math.inf, agreement)
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, value, single, double in zip(names, actual, rounded, exact, strict=False):
        error = _relative_error(value, double)
        eps = torch.finfo(inputs[0].dtype).eps
        budget = 2 * max(_relative_error(single, double), eps, cancelled if name == "output" else 0.0)
        if not error <= budget:
            raise ParityError(
                f"backend={spec.backend!r}: the {name} differs from the reference by {error:.2e} (relative, "
                f"Frobenius norm), allowed are {budget:.2e} ({where})"
            )
        if error / budget >= worst.error / worst.budget:
            worst = Parity(error, budget, agreement)
    return worst


@torch.no_grad()
def check_model(model: nn.Module, image: Tensor) -> Parity | None:
    """Compares lists and attention of every layer with the reference, on what it gets in a forward pass.

    Logits would tell little: with random weights attention is all but uniform, and any keys give the same.

    Args:
        model: a sparse model in evaluation mode.
        image: [1, 3, H, W] in the model's dtype.

    Returns:
        The layer that comes nearest to what is allowed, and the lowest agreement; None if no layer is sparse.

    Raises:
        ParityError: a layer is further off than `check_operation` allows.
    """
    calls: list[tuple[int, Scorer, tuple[Tensor, Tensor, Tensor, ListSpec]]] = []
    hooks = [
        layer.scorer.register_forward_pre_hook(
            lambda scorer, args, layer=layer: calls.append((layer.place.index, scorer, args))
        )
        for layer in sparse_layers(model)
        if not isinstance(layer.scorer, BorrowingScorer)  # whose lists are checked where they are made
    ]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    checked = []
    for layer, scorer, (q, k, v, spec) in calls:
        try:
            checked.append(check_operation(scorer, (q, k, v), spec, spec.summary))
        except ParityError as error:
            raise ParityError(f"layer {layer}: {error}") from None
    if not checked:
        return None
    worst = max(checked, key=lambda parity: parity.error / parity.budget)
    return replace(worst, agreement=min(parity.agreement for parity in checked))


def _results(
    inputs: tuple[Tensor, Tensor, Tensor] | list[Tensor],
    connectivity: Connectivity,
    summary: Side | None,
    backend: str,
    upstream: Tensor | None,
) -> list[Tensor]:
    """The output and, with `upstream`, the gradients of q, k and v."""
    q, k, v = (each.detach().requires_grad_(upstream is not None) for each in inputs)
    out = attend_scored(q, k, v, connectivity, summary=summary, backend=backend)
    if upstream is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def _agreement(actual: Tensor, expected: Tensor, tokens: int) -> float:
    """Share of the keys in `expected` [1, 1, rows, k] that `actual` holds, row by row."""
    masks = []
    for indices in (actual, expected):
        mask = torch.zeros(indices.shape[2], tokens + 1, dtype=torch.bool, device=indices.device)
        slots = torch.where(indices >= 0, indices, tokens)[0, 0].long()
        masks.append(mask.scatter_(1, slots, True)[:, :tokens])
    return float((masks[0] & masks[1]).sum() / masks[1].sum())
