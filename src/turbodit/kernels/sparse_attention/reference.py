"""Block-sparse attention in plain PyTorch: what the kernels compute, and how a CPU does it.

    s = scale q k^T over the keys of the kept blocks only
    out = softmax(s) v,  lse = log sum exp s

Each block of queries gathers its kept key blocks, so that the work is that of the kept blocks:
some blocks of queries of one head at a time, few enough to stay in a CPU's cache.

Shapes: B batch, Lq/Lk query/key length, H heads, D head dimension, Mq/Mk blocks of queries/keys
of block_q/block_k rows, N kept blocks. Everything is computed in float32, or in float64 if that
is what comes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from turbodit.kernels import wide
from turbodit.kernels.linear_attention.reference import linear_branch

_GATHERED_ELEMENTS = 2**19  # of k at a time: 2 MiB in float32


@dataclass(frozen=True)
class _Gathered:
    """Some blocks of queries of one head with the keys that they see.

    Attributes:
        head: which of the B * H heads.
        blocks: which blocks of queries, n of them.
        key_blocks: (n, N) indices of their kept key blocks.
        hidden: (n, 1, N * block_k) bool, True where there is no key; None if they all exist.
    """

    head: int
    blocks: slice
    key_blocks: torch.Tensor
    hidden: torch.Tensor | None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    means: torch.Tensor | None = None,
    k_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    feature_map: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B,Lq,H,D), k and v (B,Lk,H,D) -> out (B,Lq,H,D) in q's dtype, lse (B,H,Lq).

    indices (B,H,Mq,N) and counts (B,H,Mq) or None; a block of queries without any key block gets
    zeros and -inf. With means (B,H,D,D), k_sum (B,H,D) and bias (D,) `linear_branch` is added.
    """
    q_blocks, k_blocks, v_blocks = _blocks(q, block_q), _blocks(k, block_k), _blocks(v, block_k)
    out_blocks, lse_blocks = torch.empty_like(q_blocks), torch.empty_like(q_blocks[..., 0])
    for part in _parts(indices, counts, k.shape[1], block_k, k.shape[3]):
        keys, values = (_gather(x[part.head], part.key_blocks) for x in (k_blocks, v_blocks))
        scores = _scores(q_blocks[part.head, part.blocks], keys, scale, part.hidden)
        # The largest weight of a row is one, or zero where there is no key at all.
        highest = scores.amax(dim=-1)
        weights = _weights(scores, highest)
        total = weights.sum(dim=-1)
        lse_blocks[part.head, part.blocks] = total.log() + highest
        out_blocks[part.head, part.blocks] = weights @ values / total.clamp(min=1)[..., None]
    out = _rows(out_blocks, q)
    if means is not None and k_sum is not None and bias is not None:
        out += linear_branch(q, means, k_sum, bias, feature_map)
    lse = lse_blocks.flatten(1)[:, : q.shape[1]].unflatten(0, (q.shape[0], q.shape[2]))
    return out.to(q.dtype), lse.contiguous()


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to q, k, v from that to out, in their dtypes (arXiv:2205.14135, appendix B.4)."""
    q_blocks, k_blocks, v_blocks = _blocks(q, block_q), _blocks(k, block_k), _blocks(v, block_k)
    grad_blocks, out_blocks = _blocks(grad, block_q), _blocks(out, block_q)
    lse_blocks = F.pad(lse, (0, -lse.shape[-1] % block_q)).flatten(0, 1).unflatten(1, (-1, block_q))
    grad_q, grad_k, grad_v = map(torch.zeros_like, (q_blocks, k_blocks, v_blocks))
    for part in _parts(indices, counts, k.shape[1], block_k, k.shape[3]):
        head, blocks = part.head, part.blocks
        keys, values = (_gather(x[head], part.key_blocks) for x in (k_blocks, v_blocks))
        queries, slope = q_blocks[head, blocks], grad_blocks[head, blocks]
        weights = _weights(_scores(queries, keys, scale, part.hidden), lse_blocks[head, blocks])
        along_out = (slope * out_blocks[head, blocks]).sum(-1, keepdim=True)
        grad_scores = weights * (slope @ values.mT - along_out) * scale
        grad_q[head, blocks] = grad_scores @ keys
        _add_to_blocks(grad_k[head], part.key_blocks, grad_scores.mT @ queries)
        _add_to_blocks(grad_v[head], part.key_blocks, weights.mT @ slope)
    pairs = ((grad_q, q), (grad_k, k), (grad_v, v))
    dq, dk, dv = (_rows(blocks, like).to(like.dtype) for blocks, like in pairs)
    return dq, dk, dv


def _parts(
    indices: torch.Tensor, counts: torch.Tensor | None, key_length: int, block_k: int, dim: int
) -> Iterator[_Gathered]:
    """All blocks of queries of all heads, a few at a time."""
    indices = indices.long()
    together = max(1, _GATHERED_ELEMENTS // (indices.shape[-1] * block_k * dim))
    for head in range(indices.shape[0] * indices.shape[1]):
        for start in range(0, indices.shape[2], together):
            blocks = slice(start, start + together)
            key_blocks = indices.flatten(0, 1)[head, blocks]
            hidden = None
            if counts is not None:
                kept = counts.flatten(0, 1)[head, blocks]
                key_blocks = key_blocks[:, : max(1, int(kept.max()))]
                padding = torch.arange(key_blocks.shape[1]) >= kept[:, None]
                key_blocks = key_blocks.masked_fill(padding, 0)
                hidden = padding.repeat_interleave(block_k, dim=1)[:, None]
            if key_length % block_k:
                rows = key_blocks[..., None] * block_k + torch.arange(block_k)
                past_end = rows.flatten(1)[:, None] >= key_length
                hidden = past_end if hidden is None else hidden | past_end
            yield _Gathered(head, blocks, key_blocks, hidden)


def _gather(blocks: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Blocks (M, block, D) at `which` (n, N) -> (n, N * block, D), copied whole."""
    return blocks.index_select(0, which.flatten()).view(len(which), -1, blocks.shape[-1])


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> torch.Tensor:
    """(n, block_q, D), (n, N * block_k, D) -> (n, block_q, N * block_k)"""
    scores = (queries * scale) @ keys.mT
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _weights(scores: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """exp(scores - level), in place of the scores; zeros where there is no key at all."""
    return scores.sub_(level.masked_fill(level == -torch.inf, 0)[..., None]).exp_()


def _add_to_blocks(blocks: torch.Tensor, which: torch.Tensor, values: torch.Tensor) -> None:
    """Adds values (n, N * block, D) to blocks (M, block, D) at `which` (n, N)."""
    blocks.index_add_(0, which.flatten(), values.view(-1, *blocks.shape[1:]))


def _blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """(B,L,H,D) -> (B * H, M, block, D), at least float32; zeros past the end."""
    heads = x.to(wide(x.dtype)).transpose(1, 2).flatten(0, 1)
    return F.pad(heads, (0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block)).contiguous()


def _rows(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse: (B * H, M, block, D) -> (B, L, H, D), the shape of `like`."""
    batch, length, heads, _ = like.shape
    rows = blocks.flatten(1, 2)[:, :length].unflatten(0, (batch, heads))
    return rows.transpose(1, 2).contiguous()
