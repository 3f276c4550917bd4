"""SpargeAttention (arXiv:2502.18137): sparse 8-bit attention for models as they are.

The block map is predicted from the means of query and key blocks; the kept blocks are computed
with int8 Q K^T and P V in the format that suits the device. Nothing is trained.

Shapes: B batch, L length, H heads, D head dimension; (B, L, H, D) as everywhere here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from turbodit.attention.head_dim import pad_head_dim
from turbodit.kernels import wide
from turbodit.kernels.block_map import pool, select_cdf, select_topk, self_similarity
from turbodit.kernels.quantized_attention import fastest_pv, quantized_attention


def sparge_attn_topk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ratio: float = 0.5,
    *,
    block_q: int = 128,
    block_k: int = 64,
    pv_threshold: float | None = None,
) -> torch.Tensor:
    """Attention of each query block to its best-scored share of key blocks.

    Args:
        q: (B, Lq, H, D), D at most 128.
        k, v: (B, Lk, H, D).
        ratio: top-k ratio in (0, 1]; at least one block is kept.
        block_q, block_k: rows of a block of queries and of keys.
        pv_threshold: leave out of a row's softmax the blocks whose scores all lie this far under
            the largest one before, and their P V where all rows of a tile do; None: leave out
            nothing. Its cost is about exp(-pv_threshold) of the attention for each such key.

    Returns:
        (B, Lq, H, D), dtype of q.

    Raises:
        ValueError: ratio, shapes, dtypes or blocks that do not fit or that the device cannot do,
            or a gradient is asked for.
    """
    dim = q.shape[-1]
    q, k, v = pad_head_dim(q, k, v)
    indices = select_topk(pool(q, block_q), pool(k, block_k), ratio)
    return _attend(q, k, v, indices, None, block_q, block_k, pv_threshold, dim)


def sparge_attn_cdf(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    threshold: float = 0.98,
    *,
    similarity: float = 0.6,
    block_q: int = 128,
    block_k: int = 64,
    pv_threshold: float | None = None,
) -> torch.Tensor:
    """Attention of each query block to the fewest key blocks that hold a share of its attention.

    A mean says little of a block whose rows differ: key blocks with a self-similarity below
    `similarity` are kept by every query block, and such query blocks keep every key block.

    Args:
        q: (B, Lq, H, D).
        k, v: (B, Lk, H, D).
        threshold: the share to reach, in (0, 1].
        similarity: in [0, 1], mean cosine of a block's rows.
        block_q, block_k, pv_threshold: as `sparge_attn_topk`.

    Returns, raises: as `sparge_attn_topk`.
    """
    dim = q.shape[-1]
    q, k, v = pad_head_dim(q, k, v)
    mean_k = k.mean(dim=1, dtype=wide(k.dtype))
    indices, counts = select_cdf(
        pool(q, block_q),
        pool(k, block_k),
        threshold,
        always=self_similarity(k, block_k, mean_k) < similarity,
        always_queries=self_similarity(q, block_q) < similarity,
        scale=dim**-0.5,
    )
    return _attend(q, k, v, indices, counts, block_q, block_k, pv_threshold, dim)


def sparge(
    model: nn.Module,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    **settings: Any,
) -> None:
    """Make every self attention of a `WanModel` sparse, in place and without training.

    Args:
        ratio: top-k ratio, for `sparge_attn_topk`; or
        threshold: for `sparge_attn_cdf`.
        settings: further arguments of that function.

    Raises:
        ValueError: neither or both of ratio and threshold, a model without self attention of
            ours, or one whose attention has been trained (SLA).
    """
    if ratio is not None and threshold is None:
        attend = partial(sparge_attn_topk, ratio=ratio, **settings)
    elif threshold is not None and ratio is None:
        attend = partial(sparge_attn_cdf, threshold=threshold, **settings)
    else:
        raise ValueError(f"give either a ratio or a threshold, got {ratio} and {threshold}")
    layers = [block.self_attn.attn_op for block in getattr(model, "blocks", ())]
    if not layers:
        raise ValueError(f"expected a WanModel, got {type(model).__name__} without blocks")
    for layer in layers:
        if isinstance(layer.local_attn, nn.Module):
            raise ValueError(
                f"its self attention is {type(layer.local_attn).__name__}, which has parameters "
                "of its own; sparge replaces attention that has none"
            )
    for layer in layers:
        layer.local_attn = attend


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    block_q: int,
    block_k: int,
    pv_threshold: float | None,
    dim: int,
) -> torch.Tensor:
    """Over the kept blocks; `dim` is D before padding."""
    out = quantized_attention(
        q,
        k,
        v,
        indices=indices,
        counts=counts,
        block_q=block_q,
        block_k=block_k,
        scale=dim**-0.5,
        pv=fastest_pv(q.device, block_k),
        pv_threshold=pv_threshold,
    )
    return out[..., :dim]
