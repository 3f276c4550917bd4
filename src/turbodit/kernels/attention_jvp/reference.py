"""Attention and its tangent in plain PyTorch: what the kernel computes, and how a CPU does it.

    S = c Q K^T        dS = c (dQ K^T + Q dK^T)
    P = softmax(S)     dP = P∘(dS - rowsum(P∘dS))
    O = P V            dO = dP V + P dV

d is the derivative along given tangents dQ, dK, dV (sCM, arXiv:2410.11081; rCM,
arXiv:2510.08431). Some rows of queries at a time, so that memory does not grow with Lq Lk.

Shapes: B batch, Lq/Lk query/key length, H heads, D head dimension, Mq/Mk blocks of queries/keys,
N kept blocks. Everything is computed in float32, or in float64 if that is what comes in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbodit.kernels import wide

_SCORES = 2**26  # at a time: 256 MiB in float32
_GATHERED = 2**20  # elements of k at a time: with all else few enough for a CPU's cache


def attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor | None,
    k_tangent: torch.Tensor | None,
    v_tangent: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B,Lq,H,D), k and v (B,Lk,H,D), tangents like them or None: zeros -> O and dO
    (B,Lq,H,D) in q's dtype."""
    (q_, dq), (k_, dk), (v_, dv) = (
        (_heads_first(x), _heads_first(torch.zeros_like(x) if tangent is None else tangent))
        for x, tangent in ((q, q_tangent), (k, k_tangent), (v, v_tangent))
    )
    together = max(1, _SCORES // k_[..., 0].numel())
    pairs = zip(q_.split(together, 2), dq.split(together, 2), strict=True)
    parts = [_attend(scale, None, *pair, k_, dk, v_, dv) for pair in pairs]
    out, out_tangent = (
        torch.cat(rows, dim=2).transpose(1, 2).to(q.dtype).contiguous()
        for rows in zip(*parts, strict=True)
    )
    return out, out_tangent


def sparse_attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor | None,
    k_tangent: torch.Tensor | None,
    v_tangent: torch.Tensor | None,
    indices: torch.Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention_jvp`; a block of queries sees the N key blocks of its row of indices
    (B,H,Mq,N). Some blocks at a time, each with a copy of the keys and values that it sees."""
    (q_, dq), (k_, dk), (v_, dv) = (
        (_blocks(x, block), _blocks(torch.zeros_like(x) if tangent is None else tangent, block))
        for x, tangent, block in (
            (q, q_tangent, block_q), (k, k_tangent, block_k), (v, v_tangent, block_k)
        )
    )  # fmt: skip
    key_rows = torch.arange(-(-k.shape[1] // block_k) * block_k, device=k.device)
    past_end = (key_rows >= k.shape[1]).unflatten(0, (-1, block_k))
    kept = indices.long().flatten(0, 2)
    # Where each block of queries finds its head's first key block.
    first = torch.arange(len(q_), device=q.device) // indices.shape[2] * len(past_end)
    together = max(1, _GATHERED // (kept.shape[1] * block_k * q.shape[3]))
    parts = []
    for some, tangent, blocks, start in zip(
        *(x.split(together) for x in (q_, dq, kept, first)), strict=True
    ):
        places = blocks + start[:, None]
        seen = (x[places].flatten(1, 2) for x in (k_, dk, v_, dv))
        hidden = past_end[blocks].flatten(1)[:, None]
        parts.append(_attend(scale, hidden, some, tangent, *seen))
    out, out_tangent = (_rows(torch.cat(blocks), q) for blocks in zip(*parts, strict=True))
    return out, out_tangent


def _attend(
    scale: float,
    hidden: torch.Tensor | None,
    q: torch.Tensor,
    dq: torch.Tensor,
    k: torch.Tensor,
    dk: torch.Tensor,
    v: torch.Tensor,
    dv: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and dO of queries (..., L, D) that see all keys but hidden ones, True in (..., 1, Lk)."""
    scores = scale * q @ k.mT
    weights = (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(-1)
    slope = scale * (dq @ k.mT + q @ dk.mT)
    slope = weights * (slope - (weights * slope).sum(dim=-1, keepdim=True))
    return weights @ v, slope @ v + weights @ dv


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(B, L, H, D) -> (B, H, L, D), at least float32."""
    return x.to(wide(x.dtype)).transpose(1, 2)


def _blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """(B, L, H, D) -> (B * H * M, block, D), at least float32; zeros past the end."""
    padded = F.pad(_heads_first(x), (0, 0, 0, -x.shape[1] % block))
    return padded.unflatten(2, (-1, block)).flatten(0, 2)


def _rows(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse: (B * H * M, block, D) -> shape and dtype of `like` (B, L, H, D)."""
    batch, length, heads, _ = like.shape
    rows = blocks.unflatten(0, (batch, heads, -1)).flatten(2, 3)[:, :, :length]
    return rows.transpose(1, 2).to(like.dtype).contiguous()
