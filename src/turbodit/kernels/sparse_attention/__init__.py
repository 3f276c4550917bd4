"""Block-sparse attention: each block of queries sees the key blocks that its indices list.

`reference` holds the formulas. The linear branch of SLA can be added on the way out, which
saves a pass over the output; that form is for inference.

Shapes: B batch, Lq/Lk query/key length, H heads, D head dimension, Mq/Mk blocks of queries/keys
of block_q/block_k rows (the last ones may be ragged), N kept blocks. Layout (B, L, H, D) with
any strides but for a contiguous last dimension. On a GPU float16 or bfloat16, D 64 or 128; on a
CPU any floating dtype and D.
"""

from __future__ import annotations

from typing import Any

import torch

from turbodit.kernels import HEAD_DIMS, custom_op, implementation, wide
from turbodit.kernels.block_map import check_indices
from turbodit.kernels.linear_attention import FEATURE_MAPS

__all__ = ["LinearBranch", "sparse_attention", "sparse_attention_forward"]

# (means (B,H,D,D) in dtype of q, k_sum (B,H,D) float32, bias (D,) float32)
LinearBranch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BLOCKS_Q = (16, 32, 64, 128)
BLOCKS_K = (16, 32, 64)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    linear: LinearBranch | None = None,
    feature_map: str = "softmax",
) -> torch.Tensor:
    """softmax(scale q k^T) v over the kept blocks (SLA, arXiv:2509.24006, eq. 4); differentiable.

    Args:
        q: (B, Lq, H, D).
        k, v: (B, Lk, H, D).
        indices: (B, H, Mq, N) int32, the key blocks that each query block keeps, in any order,
            none twice.
        counts: (B, H, Mq) int32, how many of each row of indices count; None: all N. A query
            block that keeps none gets zeros.
        block_q, block_k: rows of a block of queries (16, 32, 64 or 128) and of keys (16, 32 or 64).
        scale: of the scores, positive; 1/sqrt(D) if not given.
        linear: means (B,H,D,D) in q's dtype, k_sum (B,H,D) and bias (D,) float32: adds the
            linear branch w means + bias, w_i = phi(q)_i k_sum_i / (phi(q) . k_sum + 1e-5), where
            row i of means is a mean of values weighted by phi(k)_i and k_sum is sum phi(k).
            Not differentiable.
        feature_map: phi: "softmax" over D, "elu" (elu + 1) or "relu".

    Returns:
        (B, Lq, H, D) in q's dtype.

    Raises:
        ValueError: shapes, dtypes, block sizes or scale that do not fit, an unknown feature
            map, or `linear` where a gradient is asked for.
    """
    if linear is not None and torch.is_grad_enabled():
        asked = [x for x in (q, k, v, *linear) if x.requires_grad]
        if asked:
            raise ValueError(
                "sparse attention with `linear` has no gradient; add the linear branch to its "
                "output instead, or use torch.no_grad()"
            )
    return sparse_attention_forward(
        q, k, v, indices, counts,
        block_q=block_q, block_k=block_k, scale=scale, linear=linear, feature_map=feature_map,
    )[0]  # fmt: skip


def sparse_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    linear: LinearBranch | None = None,
    feature_map: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sparse_attention`, with the log-sum-exp of the scores of the sparse branch.

    Returns:
        out (B, Lq, H, D) in q's dtype; lse (B, H, Lq) float32, natural logarithm, -inf where
        no block is kept. lse carries no gradient.
    """
    _check_rows(q, k, v)
    _check_blocks(q, k, indices, counts, block_q, block_k)
    _check_linear(q, linear, feature_map)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"the scale must be positive, got {scale}")
    return _sparse_attention(
        q, k, v, indices, counts, block_q, block_k, scale, *(linear or (None,) * 3), feature_map
    )


@custom_op("turbodit::sparse_attention")
def _sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    means: torch.Tensor | None,
    k_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return implementation(__name__, q).forward(
        q, k, v, indices, counts, block_q, block_k, scale, means, k_sum, bias, feature_map
    )


@custom_op("turbodit::sparse_attention_backward")
def _sparse_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return implementation(__name__, q).backward(
        grad, q, k, v, out, lse, indices, counts, block_q, block_k, scale
    )


@_sparse_attention.register_fake
def _(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=wide(q.dtype))


@_sparse_attention_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, indices, counts, *ctx.settings = inputs[:8]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, indices, counts)


def _backward(ctx: Any, grad: torch.Tensor, grad_lse: None) -> tuple[Any, ...]:
    grads = _sparse_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None,) * 9


_sparse_attention.register_autograd(_backward, setup_context=_save)


def _check_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    if (
        any(x.ndim != 4 or x.shape[1] == 0 for x in (q, k, v))
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[2:] != k.shape[2:]
    ):
        raise ValueError(
            f"q, k and v must be (B,Lq,H,D), (B,Lk,H,D) and (B,Lk,H,D) with L > 0, got {shapes}"
        )
    if len({x.dtype for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.is_cuda and (
        q.dtype not in (torch.float16, torch.bfloat16)
        or q.shape[-1] not in HEAD_DIMS
        or any(x.stride(-1) != 1 for x in (q, k, v))
    ):
        raise ValueError(
            "on a GPU sparse attention takes float16 or bfloat16, a head dimension of "
            f"{' or '.join(map(str, HEAD_DIMS))} and a contiguous last dimension; got "
            f"{q.dtype}, {shapes}, strides {q.stride()}, {k.stride()}, {v.stride()}"
        )


def _check_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    block_q: int,
    block_k: int,
) -> None:
    if block_q not in BLOCKS_Q or block_k not in BLOCKS_K:
        raise ValueError(
            f"blocks of {block_q} queries and {block_k} keys; supported: {BLOCKS_Q} and {BLOCKS_K}"
        )
    check_indices(indices, counts)
    batch, length, heads, _ = q.shape
    rows = (batch, heads, (length + block_q - 1) // block_q)
    key_blocks = (k.shape[1] + block_k - 1) // block_k
    if indices.shape[:3] != rows or not 0 < indices.shape[3] <= key_blocks:
        raise ValueError(
            f"block indices have shape {tuple(indices.shape)}, expected {(*rows, 'N')} with "
            f"N from 1 to {key_blocks}"
        )


def _check_linear(q: torch.Tensor, linear: LinearBranch | None, feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"unknown feature map {feature_map!r}; supported: {', '.join(FEATURE_MAPS)}"
        )
    if linear is None:
        return
    batch, _, heads, dim = q.shape
    shapes = tuple(tuple(x.shape) for x in linear)
    expected = ((batch, heads, dim, dim), (batch, heads, dim), (dim,))
    dtypes = [q.dtype, wide(q.dtype), wide(q.dtype)]
    if shapes != expected or [x.dtype for x in linear] != dtypes:
        raise ValueError(
            f"linear must be (means, k_sum, bias) of shapes {expected} and {dtypes}; got "
            f"{shapes}, {[x.dtype for x in linear]}"
        )
