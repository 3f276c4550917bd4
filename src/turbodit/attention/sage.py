"""SageAttention (arXiv:2410.02367, 2411.10958): dense attention in 8 bits, nothing to train."""

from __future__ import annotations

import math

import torch

from turbodit.attention.head_dim import pad_head_dim
from turbodit.kernels.quantized_attention import fastest_pv, quantized_attention


def sage(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """8-bit softmax(q k^T * scale) v with smoothed K; P V in the format that suits the device.

    Args:
        q: (B, Lq, H, D) float16 or bfloat16, on a CPU also float32; D at most 128.
        k, v: (B, Lk, Hkv, D), H a multiple of Hkv.
        causal: query i sees keys up to i.
        scale: 1/sqrt(D) if None.

    Returns:
        (B, Lq, H, D), dtype of q.

    Raises:
        ValueError: other shapes or dtypes, or a gradient is asked for.
    """
    dim = q.shape[-1]
    q, k, v = pad_head_dim(q, k, v)
    out = quantized_attention(
        q,
        k,
        v,
        scale=1 / math.sqrt(dim) if scale is None else scale,
        causal=causal,
        pv=fastest_pv(q.device),
    )
    return out[..., :dim]


def sageattn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`sage` with the call of F.scaled_dot_product_attention, which it can take the place of:

        F.scaled_dot_product_attention = sageattn

    Args:
        query: (B, H, Lq, D) float16 or bfloat16, on a CPU also float32; D at most 128.
        key, value: (B, Hkv, Lk, D); Hkv = H, or with `enable_gqa` a divisor of H.
        attn_mask: must be None.
        dropout_p: must be 0.
        is_causal: query i sees keys up to i.
        scale: 1/sqrt(D) if None.

    Returns:
        (B, H, Lq, D), dtype of query.

    Raises:
        ValueError: a mask, dropout, other shapes or dtypes, or a gradient is asked for.
    """
    if attn_mask is not None:
        raise ValueError("sageattn takes no attn_mask (is_causal it does); use PyTorch's own call")
    if dropout_p:
        raise ValueError(f"sageattn has no dropout, got dropout_p={dropout_p}")
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"sageattn takes (B, H, L, D) tensors, got {shapes}")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"{query.shape[1]} query heads over {key.shape[1]} key heads need enable_gqa=True"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return sage(q, k, v, causal=is_causal, scale=scale).transpose(1, 2)
