"""Block maps for people: bool maps, and their other form, the block indices of the kernels.

Shapes: B batch, L length, H heads, D head dimension, Mq/Mk blocks of queries/keys, N kept blocks.
"""

from __future__ import annotations

import torch

from turbodit.attention.head_dim import pad_head_dim
from turbodit.kernels.block_map import indices_from_map, map_from_indices, pool, select_topk

__all__ = ["indices_from_map", "map_from_indices", "topk_block_map"]


@torch.no_grad()
def topk_block_map(
    q: torch.Tensor, k: torch.Tensor, ratio: float, *, block_q: int = 128, block_k: int = 64
) -> torch.Tensor:
    """The block map of SLA (arXiv:2509.24006, section 4): for pictures and comparisons.

    Args:
        q: (B, Lq, H, D), D at most 128.
        k: (B, Lk, H, D).
        ratio: top-k ratio in (0, 1]; at least one block is kept.
        block_q, block_k: rows of a block of queries and of keys.

    Returns:
        (B, H, Mq, Mk) bool.

    Raises:
        ValueError: ratio, shapes or blocks that do not fit, or that the device cannot do.
    """
    q, k = pad_head_dim(q, k)
    pooled_k = pool(k, block_k)
    return map_from_indices(select_topk(pool(q, block_q), pooled_k, ratio), None, pooled_k.shape[2])
