"""Attention and its tangent in plain PyTorch: what the kernel computes, and how a CPU does it.

    S = c Q K^T        dS = c (dQ K^T + Q dK^T)
    P = softmax(S)     dP = P∘(dS - rowsum(P∘dS))
    O = P V            dO = dP V + P dV

d is the derivative along given tangents dQ, dK, dV (sCM, arXiv:2410.11081; rCM,
arXiv:2510.08431). Some rows of queries at a time, so that memory does not grow with Lq Lk.

Shapes: B batch, Lq/Lk query/key length, H heads, D head dimension. Everything is computed in
float32, or in float64 if that is what comes in.
"""

from __future__ import annotations

import torch

from turbodit.kernels import wide

_SCORES = 2**26  # at a time: 256 MiB in float32


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
    parts = []
    for some, some_tangent in zip(q_.split(together, 2), dq.split(together, 2), strict=True):
        weights = (scale * some @ k_.mT).softmax(dim=-1)
        slope = scale * (some_tangent @ k_.mT + some @ dk.mT)
        slope = weights * (slope - (weights * slope).sum(dim=-1, keepdim=True))
        parts.append((weights @ v_, slope @ v_ + weights @ dv))
    out, out_tangent = (
        torch.cat(rows, dim=2).transpose(1, 2).to(q.dtype).contiguous()
        for rows in zip(*parts, strict=True)
    )
    return out, out_tangent


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(B, L, H, D) -> (B, H, L, D), at least float32."""
    return x.to(wide(x.dtype)).transpose(1, 2)
