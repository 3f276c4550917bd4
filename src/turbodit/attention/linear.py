"""Linear attention alone as a back-end."""

from __future__ import annotations

import torch

from turbodit.kernels.linear_attention import linear_attention


def linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """phi(q) (phi(K)^T V) / (phi(q) . sum phi(k)), phi softmax over D, in time linear in L.

    It replaces no softmax attention: a model must be trained with it.

    Args:
        q: (B, Lq, H, D).
        k, v: (B, Lk, H, D).

    Returns:
        (B, Lq, H, D), dtype of q.

    Raises:
        ValueError: as `turbodit.kernels.linear_attention.linear_attention`.
    """
    return linear_attention(q, k, v, "softmax")
