"""What sparse attention has to beat: dense attention by every path there is, and other ways to be sparse."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Layout

# q, k and v [B, H, N, d] to the result [B, H, N, d]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

DENSE = "dense: "
FLEX_BLOCK = 128
# Sides in patches of the blocks of keys that other methods list.
BLOCK_SIDES = (4, 8)
# Elements of a whole [B, H, N, N]: of the mask bytes, of its logits several times as many.
LARGEST_SQUARE = {"cpu": 2**28, "cuda": 2**31}

_FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def dense_paths(device: torch.device) -> dict[str, Attention]:
    """The dense paths of a device by name; one that does not run for an input raises when it is called."""
    if device.type == "cuda":
        return {f"{DENSE}{name}": _fused_by(backend) for name, backend in _FUSED.items()}
    return {f"{DENSE}sdpa": F.scaled_dot_product_attention, f"{DENSE}matmul": matmul_attention}


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ · scale) v by three operations."""
    out: Tensor = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return out


def masked_dense_attention(excluded: Tensor) -> Attention:
    """The official way to be sparse: all logits, those of other pairs replaced by -inf.

    Args:
        excluded: bool [B, H, N, N], true for the pairs that do not count.

    Source:
        the paper's released code.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q * q.shape[-1] ** -0.5 @ k.mT
        out: Tensor = logits.masked_fill(excluded, -torch.inf).softmax(-1) @ v
        return out

    return attend


@torch.no_grad()
def distance_to_dense(result: Tensor, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """‖x - dense‖ / ‖dense‖ of the first image of a result [B, H, N, d], dense attention being in fp32.

    Args:
        result: of attention, in any way.
        inputs: its q, k and v, each [B, H, N, d].
    """
    q, k, v = (each[:1].float() for each in inputs)
    dense = F.scaled_dot_product_attention(q, k, v)
    return float((result[:1].float() - dense).norm() / dense.norm())


def flex_blocks_attention(blocks: BlockMask) -> Attention:
    """Compiled FlexAttention over whole blocks of keys."""
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=blocks)
        return out

    return attend


def random_blocks(tokens: int, density: float, generator: torch.Generator) -> tuple[BlockMask, float]:
    """A mask of random blocks of 128 x 128 pairs, every row of blocks with equally many.

    Whole blocks without a mask inside are FlexAttention's best case.

    Args:
        tokens: N.
        density: share of the keys of each query, rounded to whole blocks.
        generator: source of chance; its device is that of the mask.

    Returns:
        The mask and its share of the keys.
    """
    side = -(-tokens // FLEX_BLOCK)
    kept = max(1, round(density * side))
    chance = torch.rand(1, 1, side, side, generator=generator, device=generator.device)
    order = chance.argsort(-1).int()
    order[..., :kept] = order[..., :kept].sort(-1).values
    count = torch.full((1, 1, side), kept, dtype=torch.int32, device=generator.device)
    listed = torch.zeros(side, side, dtype=torch.bool, device=generator.device)
    listed.scatter_(1, order[0, 0, :, :kept].long(), True)

    # kernels ask it in no block, since all are whole; without kernels it is the mask
    def is_listed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return listed[query // FLEX_BLOCK, key // FLEX_BLOCK]

    blocks = BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        order,
        full_kv_num_blocks=count,
        full_kv_indices=order.clone(),  # compiled code takes one tensor under one name only
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=is_listed,
        seq_lengths=(tokens, tokens),
    )
    return blocks, kept / side


def block_lists(q: Tensor, k: Tensor, layout: Layout, tile: int, side: int, budget: int) -> Connectivity:
    """Lists of whole blocks of keys, as other methods choose them: by the means of their keys.

    A tile lists the blocks whose mean key has the largest product with its mean query, and the prefix.

    Args:
        q: [B, H, N, d] queries.
        k: [B, H, N, d] keys.
        layout: where the tokens lie.
        tile: side in patches of the square of queries that share a list.
        side: of a block in patches.
        budget: keys of a list, rounded to whole blocks.

    Raises:
        ValueError: a list has fewer keys than half of a block.
    """
    blocks = min(layout.squares(side), round((budget - layout.prefix) / layout.square_patches(side)))
    if blocks < 1:
        raise ValueError(f"a list of {budget} keys has no room for a block of {side}x{side}")
    B, H, _, _ = q.shape
    means = [layout.square_means(x[:, :, layout.prefix :].float(), cut) for x, cut in ((q, tile), (k, side))]
    chosen = (means[0] @ means[1].mT).topk(blocks).indices
    tokens = layout.square_tokens(side, q.device)[chosen].flatten(-2)
    prefix = torch.arange(layout.prefix, device=q.device).expand(B, H, tokens.shape[2], -1)
    # ascending, empty slots last
    tokens = torch.cat([prefix, tokens], -1)
    tokens = torch.where(tokens < 0, layout.tokens, tokens).sort(-1).values
    tokens = torch.where(tokens < layout.tokens, tokens, -1).int()
    return Connectivity.over(layout, tokens, tile, check=False, selected=True)


def why_not_square(batch: int, heads: int, tokens: int, device: torch.device) -> str | None:
    """Why no tensor [B, H, N, N] is made, None if it fits."""
    elements = batch * heads * tokens**2
    largest = LARGEST_SQUARE.get(device.type, LARGEST_SQUARE["cpu"])
    if elements <= largest:
        return None
    return (
        f"[B, H, N, N] = [{batch}, {heads}, {tokens}, {tokens}] has {elements / 2**30:.1f} Gi elements, "
        f"more than {largest / 2**30:g} Gi"
    )


def _fused_by(backend: SDPBackend) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend
