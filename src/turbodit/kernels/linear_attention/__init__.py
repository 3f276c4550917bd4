"""Linear attention: sums over keys and values in one pass, and what a query reads from them.

Two operators, each with a gradient, so that a caller may change the sums in between (SLA
multiplies its projection into them). For inference `key_value_statistics` finds in the same
pass whatever else sparse-linear attention wants to know of K and V. `reference` holds the
formulas.

Shapes: B batch, L length, H heads, D head dimension, at most 128, Mk blocks of keys. Layout
(B, L, H, D) with any strides but for a contiguous last dimension. float16 and bfloat16 on a
GPU; on a CPU any floating dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from turbodit.kernels import custom_op, implementation, wide
from turbodit.kernels.linear_attention.reference import EPS, FEATURE_MAPS

__all__ = [
    "EPS",
    "FEATURE_MAPS",
    "KeyValueStatistics",
    "key_value_statistics",
    "key_value_sums",
    "linear_attention",
    "linear_output",
]

MAX_HEAD_DIM = 128
BLOCKS_K = (16, 32, 64, 128)  # on a GPU


class KeyValueStatistics(NamedTuple):
    """What sparse-linear attention reads of all keys and values; float32 unless it says other.

    Attributes:
        pooled_k: (B, H, Mk, D), the mean of each block of keys, as `block_map.pool` gives it.
        k_mean: (B, H, D), the mean of all keys.
        v_largest: (B, H, D), the largest |v| of each channel.
        means: (B, H, D, D) in k's dtype: row i is the mean of the projected values weighted by
            phi(k)_i, zero where k_sum_i is.
        k_sum: (B, H, D), sum phi(k).
    """

    pooled_k: torch.Tensor
    k_mean: torch.Tensor
    v_largest: torch.Tensor
    means: torch.Tensor
    k_sum: torch.Tensor


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str = "softmax"
) -> torch.Tensor:
    """phi(q) (phi(K)^T V) / (phi(q) . sum phi(k) + 1e-5) (arXiv:2006.16236), differentiable.

    Args:
        q: (B, Lq, H, D).
        k, v: (B, Lk, H, D).
        feature_map: "softmax" over D, "elu" (elu + 1) or "relu".

    Returns:
        (B, Lq, H, D) in q's dtype.

    Raises:
        ValueError: unknown feature map, shapes that do not fit, or on a GPU another dtype
            than float16 and bfloat16, D over 128 or a last dimension that is not contiguous.
    """
    kv, k_sum = key_value_sums(k, v, feature_map)
    return linear_output(q, kv, k_sum, feature_map)


@custom_op("turbodit::key_value_sums")
def key_value_sums(
    k: torch.Tensor, v: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v (B,L,H,D) -> kv = phi(K)^T V (B,H,D,D) and k_sum = sum phi(k) (B,H,D), float32.

    Raises: as `linear_attention`.
    """
    _check(feature_map, k, v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {_shapes(k, v)}")
    return implementation(__name__, k).key_value_sums(k, v, feature_map)


def key_value_statistics(
    k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, block_k: int, feature_map: str
) -> KeyValueStatistics:
    """Everything that a fused sparse-linear attention needs of K and V, which are read once.

    Args:
        k, v: (B, L, H, D).
        weight: (D, D) float32, the projection of the linear branch (out, in).
        block_k: rows of a block of keys; on a GPU 16, 32, 64 or 128.
        feature_map: phi: "softmax" over D, "elu" (elu + 1) or "relu".

    No gradients. Raises: as `linear_attention`.
    """
    return KeyValueStatistics(*_key_value_statistics(k, v, weight, block_k, feature_map))


@custom_op("turbodit::key_value_statistics")
def _key_value_statistics(
    k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, block_k: int, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(feature_map, k, v)
    if k.shape != v.shape or weight.shape != (k.shape[-1],) * 2:
        raise ValueError(
            f"k, v and weight must be (B,L,H,D) and (D,D), got {_shapes(k, v, weight)}"
        )
    if block_k < 1 or (k.is_cuda and block_k not in BLOCKS_K):
        raise ValueError(f"blocks of {block_k} keys; supported on a GPU: {BLOCKS_K}")
    return implementation(__name__, k).key_value_statistics(k, v, weight, block_k, feature_map)


@custom_op("turbodit::linear_output")
def linear_output(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_sum: torch.Tensor,
    feature_map: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """phi(q) kv / (phi(q) . k_sum + 1e-5) + bias; q (B,L,H,D), the others float32: kv (B,H,D,D),
    k_sum (B,H,D), bias (D,) or None.

    Returns (B, L, H, D) in q's dtype. Raises: as `linear_attention`.
    """
    _check(feature_map, q)
    batch, _, heads, dim = q.shape
    if kv.shape != (batch, heads, dim, dim) or k_sum.shape != (batch, heads, dim):
        raise ValueError(
            f"q, kv and k_sum must be (B,L,H,D), (B,H,D,D) and (B,H,D), got {_shapes(q, kv, k_sum)}"
        )
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"the bias must be ({dim},), got {_shapes(bias)}")
    return implementation(__name__, q).linear_output(q, kv, k_sum, feature_map, bias)


@custom_op("turbodit::key_value_sums_backward")
def _key_value_sums_backward(
    grad_kv: torch.Tensor,
    grad_k_sum: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    run = implementation(__name__, k).key_value_sums_backward
    return run(grad_kv, grad_k_sum, k, v, feature_map)


@custom_op("turbodit::linear_output_backward")
def _linear_output_backward(
    grad: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to q, kv, k_sum and bias."""
    return implementation(__name__, q).linear_output_backward(grad, q, kv, k_sum, feature_map)


@key_value_sums.register_fake
def _(k: torch.Tensor, v: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, dim = k.shape
    dtype = wide(k.dtype)
    return (
        k.new_empty(batch, heads, dim, dim, dtype=dtype),
        k.new_empty(batch, heads, dim, dtype=dtype),
    )


@_key_value_statistics.register_fake
def _(
    k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, block_k: int, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, heads, dim = k.shape
    blocks = (length + block_k - 1) // block_k
    return (
        k.new_empty(batch, heads, blocks, dim, dtype=wide(k.dtype)),
        k.new_empty(batch, heads, dim, dtype=wide(k.dtype)),
        k.new_empty(batch, heads, dim, dtype=wide(k.dtype)),
        k.new_empty(batch, heads, dim, dim),
        k.new_empty(batch, heads, dim, dtype=wide(k.dtype)),
    )


@linear_output.register_fake
def _(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_sum: torch.Tensor,
    feature_map: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


@_key_value_sums_backward.register_fake
def _(
    grad_kv: torch.Tensor,
    grad_k_sum: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


@_linear_output_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    bias = kv.new_empty(q.shape[-1])
    return q.new_empty(q.shape), kv.new_empty(kv.shape), k_sum.new_empty(k_sum.shape), bias


def _save_sums(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    k, v, ctx.feature_map = inputs
    ctx.save_for_backward(k, v)


def _backward_of_sums(ctx: Any, grad_kv: torch.Tensor, grad_k_sum: torch.Tensor) -> tuple[Any, ...]:
    grads = _key_value_sums_backward(grad_kv, grad_k_sum, *ctx.saved_tensors, ctx.feature_map)
    return *grads, None


def _save_output(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, kv, k_sum, ctx.feature_map, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(q, kv, k_sum)


def _backward_of_output(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    *grads, grad_bias = _linear_output_backward(grad, *ctx.saved_tensors, ctx.feature_map)
    return *grads, None, grad_bias if ctx.has_bias else None


key_value_sums.register_autograd(_backward_of_sums, setup_context=_save_sums)
linear_output.register_autograd(_backward_of_output, setup_context=_save_output)


def _check(feature_map: str, *tensors: torch.Tensor) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"unknown feature map {feature_map!r}; supported: {', '.join(FEATURE_MAPS)}"
        )
    for x in tensors:
        if x.ndim != 4 or x.shape[1] == 0:
            raise ValueError(f"expected (B, L, H, D) with L > 0, got {tuple(x.shape)}")
        if x.is_cuda and (
            x.dtype not in (torch.float16, torch.bfloat16)
            or x.shape[-1] > MAX_HEAD_DIM
            or x.stride(-1) != 1
        ):
            raise ValueError(
                "on a GPU linear attention takes float16 or bfloat16, a head dimension of at "
                f"most {MAX_HEAD_DIM} and a contiguous last dimension; got {x.dtype}, "
                f"{tuple(x.shape)}, strides {x.stride()}"
            )


def _shapes(*tensors: torch.Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)
