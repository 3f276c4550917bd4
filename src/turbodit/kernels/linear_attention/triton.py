"""Linear attention on a GPU; `reference` says what is computed.

Every kernel walks over rows of one head: program (head, part) takes the part-th run of them.
Sums over the sequence leave each program as a partial sum of its own, added up afterwards in
a fixed order: no atomics, so equal inputs give equal bits, and enough programs for a GPU of
any size however few heads there are.

Feature maps and sums are float32. The operands of matrix products are rounded to the dtype
of q, k and v; D x D matrices, whose size grows with the sequence, are first divided by their
largest element, so that float16 neither overflows nor loses small ones.

Padding: rows past the end and columns past D are read as -inf, for which every feature map
is zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turbodit.kernels.linear_attention.reference import EPS

BLOCK_L = 64
PROGRAMS = 512  # about twice what a large GPU runs at a time

_EPS = tl.constexpr(EPS)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _phi(x, FEATURE_MAP: tl.constexpr):
    """The feature map over axis 1, float32; zero where x is -inf."""
    x = x.to(tl.float32)
    if FEATURE_MAP == "softmax":
        largest = tl.max(x, axis=1, keep_dims=True)
        weight = tl.exp2((x - tl.where(largest == float("-inf"), 0.0, largest)) * _LOG2E)
        # The largest weight is 1, so only the sum of a row of padding is smaller.
        phi = weight / tl.maximum(tl.sum(weight, axis=1, keep_dims=True), 1.0)
    elif FEATURE_MAP == "elu":
        phi = tl.where(x > 0, x + 1, tl.exp2(x * _LOG2E))
    else:
        phi = tl.maximum(x, 0.0)
    return phi


@triton.jit
def _phi_backward(x, phi, grad, FEATURE_MAP: tl.constexpr):
    """Gradient to x from that to phi(x), float32."""
    if FEATURE_MAP == "softmax":
        grad_x = phi * (grad - tl.sum(phi * grad, axis=1, keep_dims=True))
    elif FEATURE_MAP == "elu":
        grad_x = grad * tl.minimum(phi, 1.0)
    else:
        grad_x = tl.where(x > 0, grad, 0.0)
    return grad_x


@triton.jit
def _scaled(x, dtype: tl.constexpr):
    """(x / s in `dtype`, s) with s = max |x|."""
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1e-30)
    return (x / scale).to(dtype), scale


@triton.jit
def _head(pointer, head, H, stride_b, stride_h):
    """Where head `head` (int64) of B * H begins."""
    return pointer + head // H * stride_b + head % H * stride_h


@triton.jit
def _contiguous_head(pointer, head, length, H, D: tl.constexpr):
    """The same in a contiguous (B, L, H, D) tensor."""
    return pointer + (head // H * length * H + head % H) * D


@triton.jit
def _offsets_and_mask(
    first, stride, length, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Of BLOCK_L rows from `first` (int64) on."""
    rows, columns = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    offsets = first * stride + rows[:, None] * stride + columns[None, :]
    return offsets, (first + rows[:, None] < length) & (columns[None, :] < D)


@triton.jit
def _matrix(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and mask of a contiguous (D, D) matrix, and of a vector (D,)."""
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    offsets = columns[:, None] * D + columns[None, :]
    return offsets, inside[:, None] & inside[None, :], columns, inside


@triton.jit
def _key_value_sums_kernel(
    k_ptr, v_ptr, kv_ptr, k_sum_ptr,
    length, run, H,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    FEATURE_MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    kv = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    k_sum = tl.zeros((BLOCK_D,), tl.float32)
    for row in range(part * run, tl.minimum((part + 1) * run, length), BLOCK_L):
        offsets, mask = _offsets_and_mask(row, stride_kl, length, D, BLOCK_L, BLOCK_D)
        phi_k = _phi(tl.load(k_ptr + offsets, mask, other=float("-inf")), FEATURE_MAP)
        offsets, mask = _offsets_and_mask(row, stride_vl, length, D, BLOCK_L, BLOCK_D)
        v = tl.load(v_ptr + offsets, mask, other=0.0)
        kv = tl.dot(tl.trans(phi_k.to(v.dtype)), v, kv)
        k_sum += tl.sum(phi_k, axis=0)
    out = head * tl.num_programs(1) + part
    matrix, inside_matrix, vector, inside_vector = _matrix(D, BLOCK_D)
    tl.store(kv_ptr + out * D * D + matrix, kv, inside_matrix)
    tl.store(k_sum_ptr + out * D + vector, k_sum, inside_vector)


@triton.jit
def _key_value_sums_backward_kernel(
    grad_kv_ptr, grad_k_sum_ptr, k_ptr, v_ptr, grad_k_ptr, grad_v_ptr,
    length, run, H,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    FEATURE_MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    grad_k_ptr = _contiguous_head(grad_k_ptr, head, length, H, D)
    grad_v_ptr = _contiguous_head(grad_v_ptr, head, length, H, D)
    matrix, inside_matrix, vector, inside_vector = _matrix(D, BLOCK_D)
    grad_kv = tl.load(grad_kv_ptr + head * D * D + matrix, inside_matrix, other=0.0)
    grad_k_sum = tl.load(grad_k_sum_ptr + head * D + vector, inside_vector, other=0.0)
    grad_kv, scale = _scaled(grad_kv, v_ptr.dtype.element_ty)
    for row in range(part * run, tl.minimum((part + 1) * run, length), BLOCK_L):
        offsets, mask = _offsets_and_mask(row, stride_kl, length, D, BLOCK_L, BLOCK_D)
        k = tl.load(k_ptr + offsets, mask, other=float("-inf"))
        offsets, mask = _offsets_and_mask(row, stride_vl, length, D, BLOCK_L, BLOCK_D)
        v = tl.load(v_ptr + offsets, mask, other=0.0)
        phi_k = _phi(k, FEATURE_MAP)
        grad_phi = tl.dot(v, tl.trans(grad_kv)) * scale + grad_k_sum[None, :]
        grad_k = _phi_backward(k, phi_k, grad_phi, FEATURE_MAP)
        grad_v = tl.dot(phi_k.to(v.dtype), grad_kv) * scale
        offsets, mask = _offsets_and_mask(row, H * D, length, D, BLOCK_L, BLOCK_D)
        tl.store(grad_k_ptr + offsets, grad_k, mask)
        tl.store(grad_v_ptr + offsets, grad_v, mask)


@triton.jit
def _linear_output_kernel(
    q_ptr, kv_ptr, k_sum_ptr, out_ptr,
    length, run, H,
    stride_qb, stride_ql, stride_qh,
    FEATURE_MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    out_ptr = _contiguous_head(out_ptr, head, length, H, D)
    matrix, inside_matrix, vector, inside_vector = _matrix(D, BLOCK_D)
    kv = tl.load(kv_ptr + head * D * D + matrix, inside_matrix, other=0.0)
    k_sum = tl.load(k_sum_ptr + head * D + vector, inside_vector, other=0.0)
    kv, scale = _scaled(kv, q_ptr.dtype.element_ty)
    for row in range(part * run, tl.minimum((part + 1) * run, length), BLOCK_L):
        offsets, mask = _offsets_and_mask(row, stride_ql, length, D, BLOCK_L, BLOCK_D)
        q = tl.load(q_ptr + offsets, mask, other=float("-inf"))
        phi_q = _phi(q, FEATURE_MAP)
        denominator = tl.sum(phi_q * k_sum[None, :], axis=1, keep_dims=True) + _EPS
        out = tl.dot(phi_q.to(q.dtype), kv) * (scale / denominator)
        offsets, mask = _offsets_and_mask(row, H * D, length, D, BLOCK_L, BLOCK_D)
        tl.store(out_ptr + offsets, out, mask)


@triton.jit
def _linear_output_backward_kernel(
    grad_ptr, q_ptr, kv_ptr, k_sum_ptr, grad_q_ptr, grad_kv_ptr, grad_k_sum_ptr,
    length, run, H,
    stride_gb, stride_gl, stride_gh,
    stride_qb, stride_ql, stride_qh,
    FEATURE_MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    grad_ptr = _head(grad_ptr, head, H, stride_gb, stride_gh)
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    grad_q_ptr = _contiguous_head(grad_q_ptr, head, length, H, D)
    matrix, inside_matrix, vector, inside_vector = _matrix(D, BLOCK_D)
    kv = tl.load(kv_ptr + head * D * D + matrix, inside_matrix, other=0.0)
    k_sum = tl.load(k_sum_ptr + head * D + vector, inside_vector, other=0.0)
    kv, scale = _scaled(kv, q_ptr.dtype.element_ty)
    grad_kv = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    grad_k_sum = tl.zeros((BLOCK_D,), tl.float32)
    for row in range(part * run, tl.minimum((part + 1) * run, length), BLOCK_L):
        offsets, mask = _offsets_and_mask(row, stride_ql, length, D, BLOCK_L, BLOCK_D)
        q = tl.load(q_ptr + offsets, mask, other=float("-inf"))
        offsets, mask = _offsets_and_mask(row, stride_gl, length, D, BLOCK_L, BLOCK_D)
        grad = tl.load(grad_ptr + offsets, mask, other=0.0)
        phi_q = _phi(q, FEATURE_MAP)
        inverse = 1 / (tl.sum(phi_q * k_sum[None, :], axis=1, keep_dims=True) + _EPS)
        grad_phi = tl.dot(grad, tl.trans(kv)) * (scale * inverse)
        grad_denominator = -tl.sum(phi_q * grad_phi, axis=1, keep_dims=True) * inverse
        grad_phi += grad_denominator * k_sum[None, :]
        grad_q = _phi_backward(q, phi_q, grad_phi, FEATURE_MAP)
        grad_numerator, grad_scale = _scaled(grad * inverse, q.dtype)
        grad_kv += tl.dot(tl.trans(phi_q.to(q.dtype)), grad_numerator) * grad_scale
        grad_k_sum += tl.sum(phi_q * grad_denominator, axis=0)
        offsets, mask = _offsets_and_mask(row, H * D, length, D, BLOCK_L, BLOCK_D)
        tl.store(grad_q_ptr + offsets, grad_q, mask)
    out = head * tl.num_programs(1) + part
    tl.store(grad_kv_ptr + out * D * D + matrix, grad_kv, inside_matrix)
    tl.store(grad_k_sum_ptr + out * D + vector, grad_k_sum, inside_vector)


def key_value_sums(
    k: torch.Tensor, v: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    grid, run = _grid(k)
    kv, k_sum = _partial_sums(k, grid)
    _key_value_sums_kernel[grid](
        k, v, kv, k_sum, k.shape[1], run, k.shape[2],
        *k.stride()[:3], *v.stride()[:3],
        FEATURE_MAP=feature_map, **_constants(k),
    )  # fmt: skip
    return kv.sum(dim=2), k_sum.sum(dim=2)


def key_value_sums_backward(
    grad_kv: torch.Tensor,
    grad_k_sum: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    grid, run = _grid(k)
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    _key_value_sums_backward_kernel[grid](
        grad_kv.contiguous(), grad_k_sum.contiguous(), k, v, grad_k, grad_v,
        k.shape[1], run, k.shape[2],
        *k.stride()[:3], *v.stride()[:3],
        FEATURE_MAP=feature_map, **_constants(k),
    )  # fmt: skip
    return grad_k, grad_v


def linear_output(
    q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, feature_map: str
) -> torch.Tensor:
    grid, run = _grid(q)
    out = q.new_empty(q.shape)
    _linear_output_kernel[grid](
        q, kv.contiguous(), k_sum.contiguous(), out, q.shape[1], run, q.shape[2],
        *q.stride()[:3],
        FEATURE_MAP=feature_map, **_constants(q),
    )  # fmt: skip
    return out


def linear_output_backward(
    grad: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grid, run = _grid(q)
    # The gradient of a sum is one number in all places: no rows to read.
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_q = q.new_empty(q.shape)
    grad_kv, grad_k_sum = _partial_sums(q, grid)
    _linear_output_backward_kernel[grid](
        grad, q, kv.contiguous(), k_sum.contiguous(), grad_q, grad_kv, grad_k_sum,
        q.shape[1], run, q.shape[2],
        *grad.stride()[:3], *q.stride()[:3],
        FEATURE_MAP=feature_map, **_constants(q),
    )  # fmt: skip
    return grad_q, grad_kv.sum(dim=2), grad_k_sum.sum(dim=2)


def _grid(x: torch.Tensor) -> tuple[tuple[int, int], int]:
    """(B * H, parts), and the rows of each part."""
    batch, length, heads, _ = x.shape
    blocks = triton.cdiv(length, BLOCK_L)
    blocks_each = min(triton.cdiv(blocks * batch * heads, PROGRAMS), blocks)
    return (batch * heads, triton.cdiv(blocks, blocks_each)), blocks_each * BLOCK_L


def _partial_sums(x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for a (D, D) and a (D,) sum of each program: (B, H, parts, ...) float32."""
    batch, _, heads, dim = x.shape
    shape = (batch, heads, grid[1])
    return (
        x.new_empty(*shape, dim, dim, dtype=torch.float32),
        x.new_empty(*shape, dim, dtype=torch.float32),
    )


def _constants(x: torch.Tensor) -> dict[str, int]:
    dim = x.shape[-1]
    block = max(16, triton.next_power_of_2(dim))
    launch = {"num_warps": 8 if block > 64 else 4, "num_stages": 2}
    return {"D": dim, "BLOCK_D": block, "BLOCK_L": BLOCK_L, **launch}
