"""Linear attention: sums over keys and values in one pass, and what a query reads from them.

Two operators, each with a gradient, so that a caller may change the sums in between (SLA
multiplies its projection into them). `reference` holds the formulas.

Shapes: B batch, L length, H heads, D head dimension, at most 128. Layout (B, L, H, D) with
any strides but for a contiguous last dimension. float16 and bfloat16 on a GPU; on a CPU any
floating dtype.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from turbodit.kernels.linear_attention import reference
from turbodit.kernels.linear_attention.reference import EPS, FEATURE_MAPS

__all__ = ["EPS", "FEATURE_MAPS", "key_value_sums", "linear_attention", "linear_output"]

MAX_HEAD_DIM = 128


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


@torch.library.custom_op("turbodit::key_value_sums", mutates_args=())
def key_value_sums(
    k: torch.Tensor, v: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v (B,L,H,D) -> kv = phi(K)^T V (B,H,D,D) and k_sum = sum phi(k) (B,H,D), float32.

    Raises: as `linear_attention`.
    """
    _check(feature_map, k, v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {_shapes(k, v)}")
    return _implementation(k).key_value_sums(k, v, feature_map)


@torch.library.custom_op("turbodit::linear_output", mutates_args=())
def linear_output(
    q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, feature_map: str
) -> torch.Tensor:
    """phi(q) kv / (phi(q) . k_sum + 1e-5); q (B,L,H,D), kv (B,H,D,D), k_sum (B,H,D) float32.

    Returns (B, L, H, D) in q's dtype. Raises: as `linear_attention`.
    """
    _check(feature_map, q)
    batch, _, heads, dim = q.shape
    if kv.shape != (batch, heads, dim, dim) or k_sum.shape != (batch, heads, dim):
        raise ValueError(
            f"q, kv and k_sum must be (B,L,H,D), (B,H,D,D) and (B,H,D), got {_shapes(q, kv, k_sum)}"
        )
    return _implementation(q).linear_output(q, kv, k_sum, feature_map)


@torch.library.custom_op("turbodit::key_value_sums_backward", mutates_args=())
def _key_value_sums_backward(
    grad_kv: torch.Tensor,
    grad_k_sum: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    run = _implementation(k).key_value_sums_backward
    return run(grad_kv, grad_k_sum, k, v, feature_map)


@torch.library.custom_op("turbodit::linear_output_backward", mutates_args=())
def _linear_output_backward(
    grad: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _implementation(q).linear_output_backward(grad, q, kv, k_sum, feature_map)


@key_value_sums.register_fake
def _(k: torch.Tensor, v: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, dim = k.shape
    dtype = torch.promote_types(k.dtype, torch.float32)
    return (
        k.new_empty(batch, heads, dim, dim, dtype=dtype),
        k.new_empty(batch, heads, dim, dtype=dtype),
    )


@linear_output.register_fake
def _(q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, feature_map: str) -> torch.Tensor:
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), k_sum.new_empty(k_sum.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.feature_map = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_sums(ctx: Any, grad_kv: torch.Tensor, grad_k_sum: torch.Tensor) -> tuple[Any, ...]:
    grads = _key_value_sums_backward(grad_kv, grad_k_sum, *ctx.saved_tensors, ctx.feature_map)
    return *grads, None


def _backward_of_output(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return *_linear_output_backward(grad, *ctx.saved_tensors, ctx.feature_map), None


key_value_sums.register_autograd(_backward_of_sums, setup_context=_save)
linear_output.register_autograd(_backward_of_output, setup_context=_save)


def _implementation(x: torch.Tensor) -> ModuleType:
    """The kernels on a GPU, the reference elsewhere. Triton is imported where it is needed."""
    if not x.is_cuda:
        return reference
    from turbodit.kernels.linear_attention import triton

    return triton


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
