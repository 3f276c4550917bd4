"""Attention with its tangent: the directional derivative along given tangents of q, k and v.

Dense, or block-sparse: each block of queries sees the key blocks that its indices list.
`reference` holds the formulas. The tangent itself has no gradient.

Shapes: B batch, Lq/Lk query/key length, H heads, D head dimension, Mq/Mk blocks of queries/keys
(the last ones may be ragged), N kept blocks. Layout (B, L, H, D) with any strides; what has no
contiguous last dimension is copied. A kernel computes both in one pass on a GPU, in float16 and
bfloat16 with D 64 or 128; everything else goes through the reference.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from turbodit.kernels import HEAD_DIMS, custom_op, implementation, kernels_run
from turbodit.kernels.attention_jvp import reference
from turbodit.kernels.block_map import check_indices

__all__ = ["attention_jvp", "sparse_attention_jvp"]

BLOCKS = (16, 32, 64, 128)


def attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor | None = None,
    k_tangent: torch.Tensor | None = None,
    v_tangent: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v and its tangent (rCM, arXiv:2510.08431; sCM, arXiv:2410.11081).

    Args:
        q: (B, Lq, H, D).
        k, v: (B, Lk, H, D).
        q_tangent, k_tangent, v_tangent: shape and dtype of q, k and v; None: zeros, whose work
            is left out.
        scale: of the scores, positive; 1/sqrt(D) if not given.

    Returns:
        Output and tangent, both (B, Lq, H, D) in q's dtype.

    Raises:
        ValueError: shapes, dtypes or a scale that do not fit.
    """
    tangents = q_tangent, k_tangent, v_tangent
    _check(q, k, v, tangents)
    return _attention_jvp(q, k, v, *tangents, _checked_scale(q, scale))


def sparse_attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor | None = None,
    k_tangent: torch.Tensor | None = None,
    v_tangent: torch.Tensor | None = None,
    *,
    indices: torch.Tensor,
    block_q: int,
    block_k: int,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v over the kept blocks (SLA, arXiv:2509.24006, eq. 4) and its tangent.

    Args:
        q, k, v, q_tangent, k_tangent, v_tangent, scale: as of `attention_jvp`.
        indices: (B, H, Mq, N) int32, the key blocks that each query block keeps, in any order,
            none twice. They have no tangent.
        block_q, block_k: rows of a block of queries and of keys: 16, 32, 64 or 128.

    Returns:
        Output and tangent, both (B, Lq, H, D) in q's dtype.

    Raises:
        ValueError: shapes, dtypes, block sizes or a scale that do not fit.
    """
    tangents = q_tangent, k_tangent, v_tangent
    _check(q, k, v, tangents)
    _check_blocks(q, k, indices, block_q, block_k)
    scale = _checked_scale(q, scale)
    return _sparse_attention_jvp(q, k, v, *tangents, indices, block_q, block_k, scale)


@custom_op("turbodit::attention_jvp")
def _attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor | None,
    k_tangent: torch.Tensor | None,
    v_tangent: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(q).attention_jvp(q, k, v, q_tangent, k_tangent, v_tangent, scale)


@custom_op("turbodit::sparse_attention_jvp")
def _sparse_attention_jvp(
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
    tangents = q_tangent, k_tangent, v_tangent
    return _implementation(q).sparse_attention_jvp(
        q, k, v, *tangents, indices, block_q, block_k, scale
    )


@_attention_jvp.register_fake
@_sparse_attention_jvp.register_fake
def _(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether the kernel takes tensors like x (B, L, H, D)."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and half and x.shape[-1] in HEAD_DIMS and kernels_run(x.device)


def _implementation(x: torch.Tensor) -> ModuleType:
    return implementation(__name__, x) if has_kernel(x) else reference


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tangents: tuple[torch.Tensor | None, ...]
) -> None:
    inputs = (q, k, v)
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    if (
        any(x.ndim != 4 or x.shape[1] == 0 for x in inputs)
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[2:] != k.shape[2:]
    ):
        raise ValueError(
            f"q, k and v must be (B,Lq,H,D), (B,Lk,H,D) and (B,Lk,H,D) with L > 0, got {shapes}"
        )
    for name, x, tangent in zip("qkv", inputs, tangents, strict=True):
        if tangent is not None and tangent.shape != x.shape:
            raise ValueError(
                f"the tangent of {name} must be {tuple(x.shape)}, got {tuple(tangent.shape)}"
            )
    dtypes = [x.dtype for x in (*inputs, *tangents) if x is not None]
    if len(set(dtypes)) > 1:
        raise ValueError(f"q, k, v and their tangents must have one dtype, got {dtypes}")


def _check_blocks(
    q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, block_q: int, block_k: int
) -> None:
    if block_q not in BLOCKS or block_k not in BLOCKS:
        raise ValueError(f"blocks of {block_q} queries and {block_k} keys; supported: {BLOCKS}")
    check_indices(indices, None)
    rows = (q.shape[0], q.shape[2], (q.shape[1] + block_q - 1) // block_q)
    key_blocks = (k.shape[1] + block_k - 1) // block_k
    if indices.shape[:3] != rows or not 0 < indices.shape[3] <= key_blocks:
        raise ValueError(
            f"block indices have shape {tuple(indices.shape)}, expected {(*rows, 'N')} with "
            f"N from 1 to {key_blocks}"
        )


def _checked_scale(q: torch.Tensor, scale: float | None) -> float:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"the scale must be positive, got {scale}")
    return scale
