"""The block map in plain PyTorch: what the kernels compute, and how a CPU does it.

Shapes: B batch, L length, H heads, D head dimension, M blocks (Mq of queries, Mk of keys),
N kept blocks. Statistics are float32, or float64 if that is what comes in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbodit.kernels import wide


def pool(x: torch.Tensor, block: int) -> torch.Tensor:
    """Mean of each block's rows: (B,L,H,D) -> (B,H,M,D)."""
    return _sum_of_blocks(_wide(x), block) / _rows_of_blocks(x, block)[:, None]


def self_similarity(x: torch.Tensor, block: int, mean: torch.Tensor | None) -> torch.Tensor:
    """Mean cosine of all pairs of rows in a block: (B,L,H,D), mean (B,H,D) -> (B,H,M).

    The mean of <x_i, x_j> over all i, j is the squared length of the mean of x, so no pair
    is ever formed.
    """
    x = _wide(x) if mean is None else _wide(x) - mean[:, None]
    direction = _sum_of_blocks(F.normalize(x, dim=-1), block) / _rows_of_blocks(x, block)[:, None]
    return direction.square().sum(dim=-1)


def select_topk(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The `kept` largest of each row, ascending; (B,H,Mq,Mk) -> (B,H,Mq,kept) int32.

    Of equal scores the first one goes first.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :kept].sort(dim=-1).values.int()


def select_cdf(
    weights: torch.Tensor,
    threshold: float,
    always: torch.Tensor | None,
    always_queries: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest largest weights of each row whose sum reaches `threshold`, and equals of the last.

    weights (B,H,Mq,Mk), always (B,H,Mk), always_queries (B,H,Mq) -> as `indices_from_map`.
    """
    ordered = weights.sort(dim=-1, descending=True).values
    reached = ordered.cumsum(dim=-1) >= threshold
    # Rounding, or a row without weight, can keep the sum below: then all blocks are kept.
    last = torch.where(reached.any(-1), reached.int().argmax(-1), weights.shape[-1] - 1)
    kept = weights >= ordered.gather(-1, last[..., None])
    if always is not None:
        kept |= always[:, :, None]
    if always_queries is not None:
        kept |= always_queries[..., None]
    return indices_from_map(kept)


def indices_from_map(block_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool (B,H,Mq,Mk) -> indices (B,H,Mq,Mk) int32, ascending, then zeros; counts (B,H,Mq)."""
    counts = block_map.sum(dim=-1, dtype=torch.int32)
    indices = (~block_map).int().argsort(dim=-1, stable=True).int()
    padding = torch.arange(block_map.shape[-1], device=block_map.device) >= counts[..., None]
    return indices.masked_fill(padding, 0), counts


def map_from_indices(
    indices: torch.Tensor, counts: torch.Tensor | None, key_blocks: int
) -> torch.Tensor:
    """The inverse: indices (B,H,Mq,N), counts (B,H,Mq) -> bool (B,H,Mq,key_blocks)."""
    # Padding goes to a column of its own, past the end.
    columns = indices.long()
    if counts is not None:
        padding = torch.arange(indices.shape[-1], device=indices.device) >= counts[..., None]
        columns = columns.masked_fill(padding, key_blocks)
    block_map = indices.new_zeros(*indices.shape[:3], key_blocks + 1, dtype=torch.bool)
    return block_map.scatter_(-1, columns, True)[..., :key_blocks].contiguous()


def _sum_of_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """(B,L,H,D) -> (B,H,M,D); a ragged last block has fewer rows to add."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block))
    return padded.unflatten(1, (-1, block)).sum(dim=2).transpose(1, 2).contiguous()


def _rows_of_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """(M,): how many rows each block has."""
    starts = torch.arange(0, x.shape[1], block, device=x.device)
    return (x.shape[1] - starts).clamp(max=block)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(wide(x.dtype))
