"""The DiT's glue and its tangent in plain PyTorch: what the kernels compute. d is the derivative
along given tangents; weight, bias and angles have none. r = 1 / sqrt(mean(c^2) + eps).

    y = x + gate u          dy = dx + dgate u + gate du     rounded to x's dtype
    c = y - mean(y)         dc = dy - mean(dy)
    n = r c                 dn = r (dc - n mean(n dc))      LayerNorm, arXiv:1607.06450
    h = n weight + bias     dh = dn weight                  where there are any
    h = h (1 + scale) + shift,  dh = dh (1 + scale) + h dscale + dshift     likewise

RMSNorm (arXiv:1910.07467) is the same with c = x and without a bias; the rotation (RoPE,
arXiv:2104.09864) is linear, and turns value and tangent alike.

Shapes: x, update (B, L, D); gate, shift, scale (B, n, D), each for L/n tokens; tangents like what
they belong to. Everything is computed in float32, or in float64 if x is.
"""

from __future__ import annotations

import torch

from turbodit.kernels import wide


def add_norm(
    x: torch.Tensor,
    x_tangent: torch.Tensor,
    update: torch.Tensor | None,
    update_tangent: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_tangent: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    shift_tangent: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_tangent: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    """y and dy in x's dtype, if there is an update, then h and dh in `dtype`, if that is not None;
    h is of x where there is no update."""
    length, precise = x.shape[1], wide(x.dtype)
    y, dy, results = x, x_tangent, []
    if update is not None and update_tangent is not None:
        u, du = update.to(precise), update_tangent.to(precise)
        if gate is not None and gate_tangent is not None:
            of_token, its_tangent = _by_token(gate, length), _by_token(gate_tangent, length)
            u, du = u * of_token, u * its_tangent + du * of_token
        y, dy = (x + u).to(x.dtype), (x_tangent + du).to(x.dtype)
        results += [y, dy]
    if dtype is None:
        return results
    y, dy = y.to(precise), dy.to(precise)
    h, dh = _normalise(y - _mean(y), dy - _mean(dy), eps)
    if weight is not None and bias is not None:
        h, dh = h * weight + bias, dh * weight
    if shift is not None and scale is not None:
        assert shift_tangent is not None and scale_tangent is not None
        factor = 1 + _by_token(scale, length)
        dh = dh * factor + h * _by_token(scale_tangent, length) + _by_token(shift_tangent, length)
        h = h * factor + _by_token(shift, length)
    return [*results, h.to(dtype), dh.to(dtype)]


def rms_norm(
    x: torch.Tensor,
    x_tangent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h and dh (B, L, D) in x's dtype; cos and sin (L, head_dim/2)."""
    precise = wide(x.dtype)
    h, dh = (n * weight for n in _normalise(x.to(precise), x_tangent.to(precise), eps))
    if cos is not None and sin is not None:
        h, dh = _rotate(h, cos, sin), _rotate(dh, cos, sin)
    return h.to(x.dtype), dh.to(x.dtype)


def _normalise(c: torch.Tensor, dc: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    r = (_mean(c.square()) + eps).rsqrt()
    n = r * c
    return n, r * (dc - n * _mean(n * dc))


def _rotate(h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair (2i, 2i+1) of a head by the angle of its token."""
    even, odd = h.unflatten(-1, (-1, cos.shape[-1], 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-3)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(-1, keepdim=True)


def _by_token(table: torch.Tensor, length: int) -> torch.Tensor:
    """(B, n, D) -> (B, L, D)"""
    return table.repeat_interleave(length // table.shape[1], dim=1)
