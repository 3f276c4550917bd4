"""Full attention by libraries: every query sees every key.

Shapes: q (B,Lq,H,D), k and v (B,Lk,H,D) -> (B,Lq,H,D), scaled by 1/sqrt(D). Every function
raises ValueError for a dtype that its library does not take, before the library is called.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = (torch.float16, torch.bfloat16)
SDPA_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v by the kernel that PyTorch chooses."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def sdpa_by(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`sdpa` by one of `SDPA_KERNELS` and no other."""
    if q.is_cuda and kernel in ("cudnn", "flash"):
        _need_half(f"sdpa-{kernel}", q)
    with sdpa_kernel(SDPA_KERNELS[kernel]):
        return sdpa(q, k, v)


def flash2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention-2 (arXiv:2307.08691), package `flash_attn`."""
    _need_half("flash2", q)
    return _library("flash_attn").flash_attn_func(q, k, v)


def flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention-3 (arXiv:2407.08608), package `flash_attn_interface`."""
    _need_half("flash3", q)
    return _without_lse(_library("flash_attn_interface").flash_attn_func(q, k, v))


def flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention-4 (arXiv:2603.05451), package `flash_attn.cute`."""
    _need_half("flash4", q)
    return _without_lse(_library("flash_attn.cute").flash_attn_func(q, k, v))


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`memory_efficient_attention` of xFormers."""
    return _library("xformers.ops").memory_efficient_attention(q, k, v)


def _library(name: str) -> Any:
    return importlib.import_module(name)


def _without_lse(result: Any) -> torch.Tensor:
    """The output alone: some releases return the log-sum-exp with it."""
    return result[0] if isinstance(result, tuple) else result


def _need_half(backend: str, q: torch.Tensor) -> None:
    if q.dtype not in HALF:
        raise ValueError(
            f"attention {backend!r} takes float16 and bfloat16, got {q.dtype}; "
            "sdpa, sdpa-efficient and sdpa-math take any"
        )
