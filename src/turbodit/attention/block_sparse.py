"""Attention under any block map."""

from __future__ import annotations

import torch

from turbodit.attention.head_dim import pad_head_dim
from turbodit.kernels.block_map import indices_from_map
from turbodit.kernels.sparse_attention import sparse_attention


def block_sparse_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v over the blocks that a map keeps; differentiable.

    Shapes: B batch, Lq/Lk query/key length, H heads, D head dimension, Mq = ceil(Lq / block_q),
    Mk = ceil(Lk / block_k).

    Args:
        q: (B, Lq, H, D), D at most 128, with a contiguous last dimension; on a GPU float16 or
            bfloat16.
        k, v: (B, Lk, H, D).
        block_map: (B, H, Mq, Mk) bool, or a shape that broadcasts to it: which key blocks each
            block of queries sees. One that sees none gets zeros.
        block_q: rows of a block of queries: 16, 32, 64 or 128.
        block_k: rows of a block of keys: 16, 32 or 64.
        scale: of the scores, positive; 1/sqrt(D) if not given.

    Returns:
        (B, Lq, H, D) in q's dtype.

    Raises:
        ValueError: shapes, dtypes, block sizes or scale that do not fit.
    """
    batch, _, heads, dim = q.shape
    expected = (batch, heads, -(-q.shape[1] // block_q), -(-k.shape[1] // block_k))
    # From the last dimension on: a map may have fewer.
    if block_map.ndim > 4 or any(
        size not in (1, whole)
        for size, whole in zip(block_map.shape[::-1], expected[::-1], strict=False)
    ):
        raise ValueError(
            f"the block map has shape {tuple(block_map.shape)}, expected one that broadcasts to "
            f"{expected}, for blocks of {block_q} queries and {block_k} keys"
        )
    indices, counts = indices_from_map(block_map.expand(expected))
    scale = dim**-0.5 if scale is None else scale
    q, k, v = pad_head_dim(q, k, v)
    out = sparse_attention(q, k, v, indices, counts, block_q=block_q, block_k=block_k, scale=scale)
    return out[..., :dim]
