"""The DiT's small parts: norms, modulation, time embedding, patches.

Shapes: B batch, L tokens, D width, n runs of tokens that share one diffusion time.
Norms and modulation compute in float32, as in Wan.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv:1910.07467); any dtype in, same out."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in, and returns, float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x * (1 + scale) + shift; x (B, L, D), shift and scale (B, n, D), n dividing L."""
    runs = x.unflatten(1, (shift.shape[1], -1))
    return (runs * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x * gate in float32; x (B, L, D), gate (B, n, D), n dividing L."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)


def timestep_embedding(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoids of `timestep` (any shape, 0..1000) -> (..., dim) float32, cosines first.

    Angles are float64: a bf16 or even float32 product would blur neighbouring timesteps.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[..., None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def patchify(x: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """(B, C, T, H, W) -> (B, L, C*kt*kh*kw): tokens in t,h,w order, channels outermost."""
    b, c, t, h, w = x.shape
    kt, kh, kw = patch
    x = x.reshape(b, c, t // kt, kt, h // kh, kh, w // kw, kw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * kt * kh * kw)


def unpatchify(
    x: torch.Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> torch.Tensor:
    """(B, L, kt*kh*kw*C) -> (B, C, T, H, W): the head's order, channels innermost."""
    t, h, w = grid
    kt, kh, kw = patch
    x = x.reshape(x.shape[0], t, h, w, kt, kh, kw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(x.shape[0], -1, t * kt, h * kh, w * kw)


class ImageEmbedding(nn.Module):
    """CLIP features (B, n, image_dim) -> context tokens (B, n, dim) (Wan's `img_emb`)."""

    def __init__(self, image_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            LayerNorm(dim),
        )
        self.emb_pos = (
            None if positions is None else nn.Parameter(torch.zeros(1, positions, image_dim))
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.emb_pos is not None:
            if features.shape[1] != self.emb_pos.shape[1]:
                raise ValueError(
                    f"got {features.shape[1]} image features, this model expects "
                    f"{self.emb_pos.shape[1]} (those of the first and of the last frame)"
                )
            features = features + self.emb_pos
        norm_in, up, gelu, down, norm_out = self.proj
        dtype = up.weight.dtype
        return norm_out(down(gelu(up(norm_in(features).to(dtype))))).to(dtype)
