"""The DiT's small parts: norms, feed-forward, time embedding, patches.

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from turbodit.kernels import wide
from turbodit.kernels.forward_ad import has_tangent, linear
from turbodit.kernels.norm import Angles, rms_norm
from turbodit.kernels.quantized_linear import Quantized, quantize_activation
from turbodit.quantization import QuantizedLinear


class RMSNorm(nn.Module):
    """`kernels.norm.rms_norm` with a weight: over all heads at once, then RoPE where asked for."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor, angles: Angles | None = None) -> torch.Tensor:
        """x (B, L, D), which nobody else needs: it is overwritten where no gradient is wanted."""
        return rms_norm(x, self.weight, self.eps, angles, in_place=True)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in, and returns, float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Linear(nn.Linear):
    """A linear layer whose tangent is one product (`kernels.forward_ad.linear`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class FeedForward(nn.Sequential):
    """Linear, GELU (tanh), linear; the GELU at the end of the first product, or within a pass over
    its output that is made anyway."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(Linear(dim, hidden), nn.GELU(approximate="tanh"), Linear(hidden, dim))

    def forward(self, x: torch.Tensor | Quantized) -> torch.Tensor:
        up, gelu, down = self
        if isinstance(down, QuantizedLinear):
            if (
                isinstance(x, Quantized)
                and isinstance(up, QuantizedLinear)
                and up.format == down.format == "fp8-channel"
            ):
                return down(up.gelu(x))
            return down(quantize_activation(up(x), down.format, "gelu"))
        if isinstance(up, nn.Linear) and isinstance(x, torch.Tensor) and _fuses_gelu(up, x):
            hidden = torch._addmm_activation(
                up.bias, x.flatten(0, -2), up.weight.t(), use_gelu=True
            )
            return down(hidden.unflatten(0, x.shape[:-1]))
        return down(gelu(up(x)))


def _fuses_gelu(linear: nn.Linear, x: torch.Tensor) -> bool:
    """Whether cuBLASLt can end the product with GELU (tanh): half precision, no derivative."""
    return (
        x.is_cuda
        and x.dtype == linear.weight.dtype
        and x.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_autocast_enabled("cuda")
        and not torch.is_grad_enabled()
        and not has_tangent(x)
    )


def timestep_embedding(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoids of `timestep` (any shape, 0..1000) -> (..., dim), cosines first.

    Returns float32, or float64 if that comes in. Angles are always float64: a bf16 or even
    float32 product would blur neighbouring timesteps.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[..., None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(wide(timestep.dtype))


def patchify(x: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """(B, C, T, H, W) -> (B, L, C*kt*kh*kw): tokens in t,h,w order, channels outermost."""
    b, c, t, h, w = x.shape
    kt, kh, kw = patch
    x = x.reshape(b, c, t // kt, kt, h // kh, kh, w // kw, kw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * kt * kh * kw)


def unpatchify(
    x: torch.Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> torch.Tensor:
    """(B, L, kt*kh*kw*C) -> (B, C, T, H, W): the head's order, channels innermost.

    Args:
        grid: tokens along time, height and width.
    """
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
