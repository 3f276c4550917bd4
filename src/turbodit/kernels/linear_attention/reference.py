"""Linear attention in plain PyTorch: what the kernels compute, and how a CPU does it.

    out = phi(q) kv / (phi(q) . k_sum + 1e-5),  kv = phi(K)^T V,  k_sum = sum over L of phi(k)

(Katharopoulos et al., arXiv:2006.16236; the linear branch of SLA, arXiv:2509.24006, eq. 5).

Shapes: B batch, L length (of queries and of keys, which may differ), H heads, D head
dimension. Everything is computed in float32, or in float64 if that is what comes in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbodit.kernels import wide
from turbodit.kernels.block_map.reference import pool

FEATURE_MAPS = ("softmax", "elu", "relu")
EPS = 1e-5


def phi(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """The feature map over the last dimension: softmax, elu + 1 or relu; at least float32."""
    x = _wide(x)
    if feature_map == "softmax":
        return x.softmax(dim=-1)
    return F.elu(x) + 1 if feature_map == "elu" else x.relu()


def key_value_sums(
    k: torch.Tensor, v: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v (B,L,H,D) -> kv (B,H,D,D), k_sum (B,H,D)."""
    phi_k = phi(k, feature_map)
    return _sum_of_products(phi_k, _wide(v)), phi_k.sum(dim=1)


def key_value_sums_backward(
    grad_kv: torch.Tensor,
    grad_k_sum: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients to k and v (B,L,H,D), in their dtypes."""
    phi_k = phi(k, feature_map)
    grad_phi = torch.einsum("blhe,bhde->blhd", _wide(v), grad_kv) + grad_k_sum[:, None]
    grad_v = torch.einsum("blhd,bhde->blhe", phi_k, grad_kv)
    grad_k = _phi_backward(k, phi_k, grad_phi, feature_map)
    return grad_k.to(k.dtype).contiguous(), grad_v.to(v.dtype).contiguous()


def key_value_statistics(
    k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, block_k: int, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v (B,L,H,D), weight (D,D) -> pooled_k (B,H,Mk,D), k_mean, v_largest (B,H,D), means
    (B,H,D,D) in k's dtype, k_sum (B,H,D)."""
    kv, k_sum = key_value_sums(k, v, feature_map)
    # Where no key has a feature, its row of kv is zero as well.
    means = kv @ weight.to(kv.dtype).T / torch.where(k_sum > 0, k_sum, 1)[..., None]
    k_mean, v_largest = _wide(k).mean(dim=1), _wide(v).abs().amax(dim=1)
    return pool(k, block_k), k_mean, v_largest, means.to(k.dtype), k_sum


def linear_branch(
    q: torch.Tensor,
    means: torch.Tensor,
    k_sum: torch.Tensor,
    bias: torch.Tensor,
    feature_map: str,
) -> torch.Tensor:
    """w means + bias with w_i = phi(q)_i k_sum_i / (phi(q) . k_sum + 1e-5).

    This is phi(q) kv W^T / (phi(q) . k_sum + 1e-5) + bias, from numbers that fit in half
    precision however long the sequence: weights of at most 1, and phi-weighted means of values.

    q (B,L,H,D), means (B,H,D,D), k_sum (B,H,D), bias (D,) -> (B,L,H,D), at least float32.
    """
    phi_q = phi(q, feature_map)
    weights = phi_q * k_sum[:, None] / _denominator(phi_q, k_sum)
    return torch.einsum("blhd,bhde->blhe", weights, means.to(weights.dtype)) + bias


def linear_output(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_sum: torch.Tensor,
    feature_map: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """q (B,L,H,D), kv (B,H,D,D), k_sum (B,H,D), bias (D,) -> (B,L,H,D) in q's dtype."""
    phi_q = phi(q, feature_map)
    out = torch.einsum("blhd,bhde->blhe", phi_q, kv) / _denominator(phi_q, k_sum)
    out = out if bias is None else out + bias
    return out.to(q.dtype).contiguous()


def linear_output_backward(
    grad: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to q (B,L,H,D) in its dtype, kv (B,H,D,D), k_sum (B,H,D) and bias (D,)."""
    phi_q = phi(q, feature_map)
    denominator = _denominator(phi_q, k_sum)
    grad_numerator = _wide(grad) / denominator
    grad_phi = torch.einsum("blhe,bhde->blhd", grad_numerator, kv)
    # d(n/z)/dz = -n/z^2, and n = phi(q) kv.
    grad_denominator = -(phi_q * grad_phi).sum(-1, keepdim=True) / denominator
    grad_phi = grad_phi + grad_denominator * k_sum[:, None]
    grad_kv = _sum_of_products(phi_q, grad_numerator)
    grad_k_sum = (phi_q * grad_denominator).sum(dim=1)
    grad_q = _phi_backward(q, phi_q, grad_phi, feature_map)
    grad_bias = _wide(grad).sum(dim=(0, 1, 2))
    return grad_q.to(q.dtype).contiguous(), grad_kv, grad_k_sum, grad_bias


def _sum_of_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """sum over L of x^T y; both (B,L,H,D) -> (B,H,D,D)"""
    return torch.einsum("blhd,blhe->bhde", x, y).contiguous()


def _denominator(phi_q: torch.Tensor, k_sum: torch.Tensor) -> torch.Tensor:
    """(B,L,H,1)"""
    return torch.einsum("blhd,bhd->blh", phi_q, k_sum)[..., None] + EPS


def _phi_backward(
    x: torch.Tensor, phi_x: torch.Tensor, grad: torch.Tensor, feature_map: str
) -> torch.Tensor:
    """Gradient to x from that to phi(x)."""
    if feature_map == "softmax":
        return phi_x * (grad - (phi_x * grad).sum(-1, keepdim=True))
    return grad * (phi_x.clamp(max=1) if feature_map == "elu" else x > 0)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(wide(x.dtype))
