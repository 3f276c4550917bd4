"""Norms and what surrounds them in plain PyTorch: the specification, the path of gradients and of
CPUs. Everything is computed in float32 (in float64 for float64 inputs).

    y = x + gate * update                         rounded to x's dtype, which goes on with it
    h = (y - mean(y)) / sqrt(var(y) + eps)        arXiv:1607.06450
    h = h * weight + bias                         where there are any
    h = h * (1 + scale) + shift                   where there are any (adaLN, arXiv:2212.09748)

    RMSNorm: x / sqrt(mean(x^2) + eps) * weight   arXiv:1910.07467
    RoPE: each pair (2i, 2i+1) of a head rotated by the angle of its token, arXiv:2104.09864
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbodit.kernels import wide
from turbodit.kernels.quantized_linear.reference import quantize


def add(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """x + gate * update in x's dtype; gate (B, n, D) holds for L/n tokens each."""
    if gate is not None:
        update = (update.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)
    return (x + update).to(x.dtype)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """LayerNorm over D and modulation of x (B, L, D), in at least float32."""
    dtype = wide(x.dtype)
    h = F.layer_norm(x.to(dtype), x.shape[-1:], _to(weight, dtype), _to(bias, dtype), eps)
    if shift is None or scale is None:
        return h
    runs = h.unflatten(1, (shift.shape[1], -1))
    return (runs * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    format: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h in `dtype` and an empty tensor, or h quantised by row: values and scales."""
    h = layer_norm(x, weight, bias, shift, scale, eps)
    if format is not None:
        return quantize(h, format)
    return h.to(dtype), h.new_empty(0, dtype=torch.float32)


def add_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    format: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and of y what `norm` gives."""
    y = add(x, update, gate)
    return (y, *norm(y, weight, bias, shift, scale, eps, dtype, format))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over D of x (B, L, D), then RoPE where there are angles, in x's dtype; copied into
    `out` (which may be x) where that is given."""
    dtype = wide(x.dtype)
    h = F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
    if cos is not None and sin is not None:
        even, odd = h.unflatten(-1, (-1, cos.shape[-1], 2)).unbind(-1)
        cos, sin = cos[:, None], sin[:, None]
        h = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-3)
    return h.to(x.dtype) if out is None else out.copy_(h)


def _to(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if x is None else x.to(dtype)
