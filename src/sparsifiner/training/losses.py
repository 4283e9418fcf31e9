"""What training minimises. Sums run over an image, means over the batch: no loss depends on its size."""

import torch.nn.functional as F
from torch import Tensor

from sparsifiner.geometry.grid import TokenLayout


def reconstruction_loss(
    coefficients: Tensor,
    basis: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    layout: TokenLayout,
    tile: int,
    scale: float,
) -> Tensor:
    """Squared error per image between scores Â = C Uᵀ and attention A, up to a constant, in linear memory.

    ```
    Σ (C Uᵀ - A)² = <CᵀC, UᵀU> - 2 <C, A U> + Σ A²      A = softmax(scale · q kᵀ), patch rows
    ```

    `A U` is one attention with U in the place of the values, so no N x N tensor is needed. Σ A² does
    not depend on the scores and is left out: scores of zero give 0, useful ones less. The scores of a
    tile stand for each of its queries.

    Args:
        coefficients: C [B, H, rows, K], differentiable.
        basis: U [N, K], differentiable.
        q: [B, H, N, d] queries of the attention to reconstruct, without gradient; prefix included.
        k: [B, H, N, d] its keys.
        layout: where the tokens lie.
        tile: side of the tile of queries that share a row.
        scale: factor of the logits.

    Returns:
        Sum over heads and entries, mean over images: a scalar.

    Source:
        Wei et al., "Sparsifiner", CVPR 2023, section 3.4; the identity is ours.
    """
    queries_per_row = layout.square_sizes(tile, q.device).to(coefficients.dtype).unsqueeze(1)
    weighted = coefficients * queries_per_row
    energy = (weighted.mT @ coefficients * (basis.mT @ basis)).sum()
    attended = _attend_to_basis(q[:, :, layout.prefix :], k, basis, scale).to(coefficients.dtype)
    overlap = (weighted * layout.square_means(attended, tile)).sum()
    return (energy - 2 * overlap) / q.shape[0]


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with soft targets [B, classes], mean over the batch."""
    return F.cross_entropy(logits, targets)


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the class probabilities in nats, mean over the batch."""
    return F.kl_div(
        logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def token_loss(tokens: Tensor, teacher_tokens: Tensor, policy: Tensor | None = None) -> Tensor:
    """Mean squared error of patch tokens [B, patches, C] behind the final norm.

    Args:
        tokens: of the student.
        teacher_tokens: of the teacher, of the same patches.
        policy: [B, patches] of 0 and 1, tokens that count; None for all.
    """
    if policy is None:
        return F.mse_loss(tokens, teacher_tokens)
    error = (tokens - teacher_tokens).square().mean(-1)
    weight = policy.detach().to(error.dtype)
    return (error * weight).sum() / weight.sum().clamp(min=1.0)


def _attend_to_basis(q: Tensor, k: Tensor, basis: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) U, [B, H, queries, K]; fused kernels want one width for q, k and values."""
    size = basis.shape[1]
    width = max(q.shape[-1], size)
    q, k, value = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, basis.to(q.dtype)))
    return F.scaled_dot_product_attention(q, k, value.expand(*k.shape[:2], -1, -1), scale=scale)[..., :size]
