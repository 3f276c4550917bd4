"""Linear attention on a GPU; `reference` says what is computed.

Every kernel walks over rows of one head: program (head, part) takes the part-th run of them.
Sums over the sequence leave each program as a partial sum of its own, added up afterwards in
a fixed order: no atomics, so equal inputs give equal bits, and enough programs for a GPU of
any size however few heads there are. There are no more of them than run at a time: each one
costs a D x D matrix, written and read.

Sums over rows that are wanted at the end only are kept as PARTIAL_ROWS rows, so that each
thread adds up its own rows; rows meet once, after the loop.

Feature maps and sums are float32. The operands of matrix products are rounded to the dtype
of q, k and v; D x D matrices, whose size grows with the sequence, are first divided by their
largest element, so that float16 neither overflows nor loses small ones.

Padding: rows past the end are read as zeros. What they would add to a sum is multiplied by
another zero, or masked. Columns past D become -inf, for which every feature map is zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turbodit.kernels import LOG2_E
from turbodit.kernels.linear_attention.reference import EPS

BLOCK_L = 64
MULTIPROCESSORS_OF_INTERPRETER = 8
# How partial sums are added: features that one program takes, and parts at a time.
FEATURES, PARTS = 16, 8

_EPS = tl.constexpr(EPS)
_LOG2E = tl.constexpr(LOG2_E)
_PARTIAL_ROWS = tl.constexpr(16)  # that the threads of a program cover side by side
# One compiled kernel for all of them: nothing is gained from a length that 16 divides.
_SIZES = ["length", "H", "parts"]


@triton.jit
def _features(x, largest, FEATURE_MAP: tl.constexpr):
    """The feature map of x (rows, some columns), float32; softmax's without its division.

    `largest` (rows, 1) is that of all columns; only softmax reads it.
    """
    x = x.to(tl.float32)
    if FEATURE_MAP == "softmax":
        phi = tl.exp2(x * _LOG2E - largest * _LOG2E)
    elif FEATURE_MAP == "elu":
        phi = tl.where(x > 0, x + 1, tl.exp2(x * _LOG2E))
    else:
        phi = tl.maximum(x, 0.0)
    return phi


@triton.jit
def _phi(x, FEATURE_MAP: tl.constexpr, D: tl.constexpr):
    """The feature map over axis 1, float32; zero in columns past D."""
    x = x.to(tl.float32)
    BLOCK_D: tl.constexpr = x.shape[1]
    if D < BLOCK_D:
        x = tl.where(tl.arange(0, BLOCK_D)[None, :] < D, x, float("-inf"))
    if FEATURE_MAP == "softmax":
        weight = _features(x, tl.max(x, axis=1, keep_dims=True), FEATURE_MAP)
        phi = weight * (1 / tl.sum(weight, axis=1, keep_dims=True))
    else:
        phi = _features(x, None, FEATURE_MAP)
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
    """(x / s in `dtype`, s): s = max |x|, or 1 in bfloat16, which has the range of float32."""
    scale = 1.0
    if dtype != tl.bfloat16:
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1e-30)
        x = x / scale
    return x.to(dtype), scale


@triton.jit
def _head(pointer, head, H, stride_b, stride_h):
    """Where head `head` (int64) of B * H begins."""
    return pointer + head // H * stride_b + head % H * stride_h


@triton.jit
def _contiguous_head(pointer, head, length, H, D: tl.constexpr):
    """The same in a contiguous (B, L, H, D) tensor."""
    return pointer + (head // H * length * H + head % H) * D


@triton.jit
def _rows(
    pointer, first, stride, length,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pointers to BLOCK_L rows from `first` (int64) on, and which of their elements there are."""
    rows, columns = tl.arange(0, BLOCK_L)[:, None], tl.arange(0, BLOCK_D)[None, :]
    # Within the tile offsets have 32 bits, and are the same for all tiles.
    pointers = pointer + first * stride + (rows * stride + columns)
    return pointers, (first + rows < length) & (columns < D)


@triton.jit
def _load_rows(
    pointer, first, stride, length,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Zeros where there is nothing."""
    pointers, exists = _rows(pointer, first, stride, length, D, BLOCK_L, BLOCK_D)
    return tl.load(pointers, exists, other=0.0)


@triton.jit
def _by_partial_rows(x):
    """x (rows, columns) -> (rows / _PARTIAL_ROWS, _PARTIAL_ROWS, columns), without an exchange."""
    return tl.reshape(x, (x.shape[0] // _PARTIAL_ROWS, _PARTIAL_ROWS, x.shape[1]))


@triton.jit
def _matrix(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and mask of a contiguous (D, D) matrix, and of a vector (D,)."""
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    offsets = columns[:, None] * D + columns[None, :]
    return offsets, inside[:, None] & inside[None, :], columns, inside


@triton.jit(do_not_specialize=_SIZES)
def _key_value_sums_kernel(
    k_ptr, v_ptr, kv_ptr, k_sum_ptr, pooled_ptr, v_largest_ptr,
    length, run, H,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    FEATURE_MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A part of V^T phi(K) and of sum phi(k); with pooled_ptr also of max |v|, and the means of
    blocks of BLOCK_L keys."""
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    matrix, inside_matrix, vector, inside_vector = _matrix(D, BLOCK_D)
    # Transposed, both operands of the product are read from shared memory as they are.
    kv = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    k_sum = tl.zeros((_PARTIAL_ROWS, BLOCK_D), tl.float32)
    v_largest = tl.zeros((_PARTIAL_ROWS, BLOCK_D), tl.float32)
    for row in range(part * run, tl.minimum((part + 1) * run, length), BLOCK_L):
        k = _load_rows(k_ptr, row, stride_kl, length, D, BLOCK_L, BLOCK_D)
        v = _load_rows(v_ptr, row, stride_vl, length, D, BLOCK_L, BLOCK_D)
        phi_k = _phi(k, FEATURE_MAP, D)
        kv = tl.dot(tl.trans(v), phi_k.to(v.dtype), kv)
        exists = (row + tl.arange(0, BLOCK_L) < length).to(tl.float32)
        k_sum += tl.sum(_by_partial_rows(phi_k * exists[:, None]), axis=0)
        if pooled_ptr is not None:
            # Tensor cores add k from shared memory as it is, exactly: all columns are the sum.
            ones = tl.full((BLOCK_L, 16), 1.0, k.dtype)
            total = tl.max(tl.dot(tl.trans(k), ones, input_precision="ieee"), axis=1)
            count = tl.minimum(length - row, BLOCK_L).to(tl.float32)
            block = head * tl.cdiv(length, BLOCK_L) + row // BLOCK_L
            tl.store(pooled_ptr + block * D + vector, total * (1 / count), inside_vector)
            largest = tl.max(_by_partial_rows(tl.abs(v.to(tl.float32))), axis=0)
            v_largest = tl.maximum(v_largest, largest)
    out = head * tl.num_programs(1) + part
    tl.store(kv_ptr + out * D * D + matrix, kv, inside_matrix)
    tl.store(k_sum_ptr + out * D + vector, tl.sum(k_sum, axis=0), inside_vector)
    if pooled_ptr is not None:
        tl.store(v_largest_ptr + out * D + vector, tl.max(v_largest, axis=0), inside_vector)


@triton.jit
def _vectors(pointer, first, count, features, D: tl.constexpr, ROWS: tl.constexpr):
    """Of `count` vectors (D,) the ROWS from `first` on: (ROWS, features), zeros past the end."""
    rows = first + tl.arange(0, ROWS)[:, None]
    mask = (rows < count) & (features[None, :] < D)
    return tl.load(pointer + rows * D + features[None, :], mask, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def _add_parts_kernel(
    kv_parts_ptr, k_sum_parts_ptr, v_largest_parts_ptr, pooled_ptr, weight_ptr,
    kv_ptr, k_sum_ptr, v_largest_ptr, k_mean_ptr,
    parts, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    FEATURES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds FEATURES columns of the parts of one head, and writes them as rows of kv. With
    weight_ptr these are means, and the statistics of channels are put together too."""
    head = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    values = tl.arange(0, BLOCK_D)
    tile = values[:, None] * D + features[None, :]
    inside = (values[:, None] < D) & (features[None, :] < D)
    kv_parts_ptr += head * parts * D * D
    k_sum_parts_ptr += head * parts * D
    kv = tl.zeros((BLOCK_D, FEATURES), tl.float32)
    k_sum = tl.zeros((PARTS, FEATURES), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None, None]
        mask = (part < parts) & inside[None, :, :]
        some = tl.load(kv_parts_ptr + part * D * D + tile[None, :, :], mask, other=0.0)
        kv += tl.sum(some, axis=0)
        k_sum += _vectors(k_sum_parts_ptr, first, parts, features, D, PARTS)
    kv, k_sum = tl.trans(kv), tl.sum(k_sum, axis=0)
    out, exists = head * D + features, features < D
    tl.store(k_sum_ptr + out, k_sum, exists)
    if weight_ptr is not None:
        transposed = values[:, None] + values[None, :] * D
        mask = (values[:, None] < D) & (values[None, :] < D)
        weight = tl.load(weight_ptr + transposed, mask, other=0.0).to(tl.float32)
        kv = tl.dot(kv, weight, input_precision="tf32x3")
        kv = kv / tl.where(k_sum > 0, k_sum, 1.0)[:, None]
        v_largest_parts_ptr += head * parts * D
        v_largest = tl.zeros((PARTS, FEATURES), tl.float32)
        for first in range(0, parts, PARTS):
            some = _vectors(v_largest_parts_ptr, first, parts, features, D, PARTS)
            v_largest = tl.maximum(v_largest, some)
        tl.store(v_largest_ptr + out, tl.max(v_largest, axis=0), exists)
        blocks = tl.cdiv(length, BLOCK_K)
        pooled_ptr += head * blocks * D
        BLOCKS: tl.constexpr = 128
        k_total = tl.zeros((BLOCKS, FEATURES), tl.float32)
        for first in range(0, blocks, BLOCKS):
            rows = length - (first + tl.arange(0, BLOCKS)[:, None]) * BLOCK_K
            some = _vectors(pooled_ptr, first, blocks, features, D, BLOCKS)
            k_total += some * tl.minimum(rows, BLOCK_K)
        tl.store(k_mean_ptr + out, tl.sum(k_total, axis=0) / length, exists)
    pointers = kv_ptr + out[:, None] * D + values[None, :]
    mask = exists[:, None] & (values[None, :] < D)
    tl.store(pointers, kv.to(kv_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_SIZES)
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
        k = _load_rows(k_ptr, row, stride_kl, length, D, BLOCK_L, BLOCK_D)
        v = _load_rows(v_ptr, row, stride_vl, length, D, BLOCK_L, BLOCK_D)
        phi_k = _phi(k, FEATURE_MAP, D)
        grad_phi = tl.dot(v, tl.trans(grad_kv)) * scale + grad_k_sum[None, :]
        grad_k = _phi_backward(k, phi_k, grad_phi, FEATURE_MAP)
        grad_v = tl.dot(phi_k.to(v.dtype), grad_kv) * scale
        pointers, exists = _rows(grad_k_ptr, row, H * D, length, D, BLOCK_L, BLOCK_D)
        tl.store(pointers, grad_k.to(k.dtype), exists)
        pointers, exists = _rows(grad_v_ptr, row, H * D, length, D, BLOCK_L, BLOCK_D)
        tl.store(pointers, grad_v.to(v.dtype), exists)


@triton.jit(do_not_specialize=_SIZES)
def _linear_output_kernel(
    q_ptr, kv_ptr, k_sum_ptr, bias_ptr, out_ptr,
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
        q = _load_rows(q_ptr, row, stride_ql, length, D, BLOCK_L, BLOCK_D)
        phi_q = _phi(q, FEATURE_MAP, D)
        denominator = tl.sum(phi_q * k_sum[None, :], axis=1, keep_dims=True) + _EPS
        out = tl.dot(phi_q.to(q.dtype), kv) * (scale / denominator)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + vector, inside_vector, other=0.0)[None, :]
        pointers, exists = _rows(out_ptr, row, H * D, length, D, BLOCK_L, BLOCK_D)
        tl.store(pointers, out.to(q.dtype), exists)


@triton.jit(do_not_specialize=_SIZES)
def _linear_output_backward_kernel(
    grad_ptr, q_ptr, kv_ptr, k_sum_ptr, grad_q_ptr, grad_kv_ptr, grad_k_sum_ptr, grad_bias_ptr,
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
    grad_kv = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)  # transposed, as in the forward pass
    grad_k_sum = tl.zeros((_PARTIAL_ROWS, BLOCK_D), tl.float32)
    grad_bias = tl.zeros((_PARTIAL_ROWS, BLOCK_D), tl.float32)
    for row in range(part * run, tl.minimum((part + 1) * run, length), BLOCK_L):
        q = _load_rows(q_ptr, row, stride_ql, length, D, BLOCK_L, BLOCK_D)
        grad = _load_rows(grad_ptr, row, stride_gl, length, D, BLOCK_L, BLOCK_D)
        phi_q = _phi(q, FEATURE_MAP, D)
        inverse = 1 / (tl.sum(phi_q * k_sum[None, :], axis=1, keep_dims=True) + _EPS)
        grad_phi = tl.dot(grad, tl.trans(kv)) * (scale * inverse)
        grad_denominator = -tl.sum(phi_q * grad_phi, axis=1, keep_dims=True) * inverse
        grad_phi += grad_denominator * k_sum[None, :]
        grad_q = _phi_backward(q, phi_q, grad_phi, FEATURE_MAP)
        pointers, exists = _rows(grad_q_ptr, row, H * D, length, D, BLOCK_L, BLOCK_D)
        tl.store(pointers, grad_q.to(q.dtype), exists)
        grad_numerator, grad_scale = _scaled(grad * inverse, q.dtype)
        grad_kv += tl.dot(tl.trans(grad_numerator), phi_q.to(q.dtype)) * grad_scale
        grad_k_sum += tl.sum(_by_partial_rows(phi_q * grad_denominator), axis=0)
        grad_bias += tl.sum(_by_partial_rows(grad.to(tl.float32)), axis=0)
    out = head * tl.num_programs(1) + part
    tl.store(grad_kv_ptr + out * D * D + matrix, grad_kv, inside_matrix)
    tl.store(grad_k_sum_ptr + out * D + vector, tl.sum(grad_k_sum, axis=0), inside_vector)
    tl.store(grad_bias_ptr + out * D + vector, tl.sum(grad_bias, axis=0), inside_vector)


@triton.jit
def add_linear_branch(
    out, q_ptr, stride_ql, exists, means_ptr, k_sum_ptr, bias_ptr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """out (rows, D) + w means + bias, for the epilogue of a kernel.

    `reference.linear_branch` says what w is. q_ptr is that of the first row, `exists` (rows,)
    says which rows there are; means_ptr and k_sum_ptr are those of the head. Some channels of q
    at a time: `out` fills the registers.
    """
    ROWS: tl.constexpr = out.shape[0]
    D: tl.constexpr = out.shape[1]
    CHUNK: tl.constexpr = 32 if D > 32 else D
    some, columns = tl.arange(0, CHUNK), tl.arange(0, D)
    q_pointers = q_ptr + (tl.arange(0, ROWS)[:, None] * stride_ql + some[None, :])
    largest = tl.full((ROWS, 1), float("-inf"), tl.float32)
    if FEATURE_MAP == "softmax":
        for start in tl.range(0, D, CHUNK, num_stages=1):
            q = tl.load(q_pointers + start, exists[:, None], other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(q, axis=1, keep_dims=True))
    norm = tl.zeros((ROWS, 1), tl.float32)
    for start in tl.range(0, D, CHUNK, num_stages=1):
        q = tl.load(q_pointers + start, exists[:, None], other=0.0)
        k_sum = tl.load(k_sum_ptr + start + some)
        # The division that softmax still lacks is made up for by multiplying eps instead.
        eps = _EPS if FEATURE_MAP == "softmax" else 0.0
        phi = _features(q, largest, FEATURE_MAP)
        norm += tl.sum(phi * (k_sum[None, :] + eps), axis=1, keep_dims=True)
    if FEATURE_MAP != "softmax":
        norm += _EPS
    inverse = 1 / norm
    for start in tl.range(0, D, CHUNK, num_stages=1):
        q = tl.load(q_pointers + start, exists[:, None], other=0.0)
        k_sum = tl.load(k_sum_ptr + start + some)
        means = tl.load(means_ptr + ((start + some)[:, None] * D + columns[None, :]))
        weights = _features(q, largest, FEATURE_MAP) * k_sum[None, :] * inverse
        out = tl.dot(weights.to(means.dtype), means, out)
    return out + tl.load(bias_ptr + columns)[None, :]


def key_value_sums(
    k: torch.Tensor, v: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    block_l = _block_l(k)
    grid, run = _grid(k, block_l)
    parts = _partial_sums(k, grid)
    _key_value_sums_kernel[grid](
        k, v, *parts, None, None, k.shape[1], run, k.shape[2],
        *k.stride()[:3], *v.stride()[:3],
        FEATURE_MAP=feature_map, **_constants(k, block_l),
    )  # fmt: skip
    return _added(*parts)


def key_value_statistics(
    k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, block_k: int, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, heads, dim = k.shape
    grid, run = _grid(k, block_k)
    kv, k_sums = _partial_sums(k, grid)
    v_maxima = torch.empty_like(k_sums)
    pooled = k.new_empty(batch, heads, triton.cdiv(length, block_k), dim, dtype=torch.float32)
    _key_value_sums_kernel[grid](
        k, v, kv, k_sums, pooled, v_maxima, length, run, heads,
        *k.stride()[:3], *v.stride()[:3],
        FEATURE_MAP=feature_map, **_constants(k, block_k),
    )  # fmt: skip
    means = k.new_empty(batch, heads, dim, dim)
    k_sum = k.new_empty(batch, heads, dim, dtype=torch.float32)
    v_largest, k_mean = torch.empty_like(k_sum), torch.empty_like(k_sum)
    _add_parts_kernel[_feature_grid(kv)](
        kv, k_sums, v_maxima, pooled, weight.contiguous(), means, k_sum, v_largest, k_mean,
        grid[1], length, BLOCK_K=block_k, **_add_constants(kv),
    )  # fmt: skip
    return pooled, k_mean, v_largest, means, k_sum


def key_value_sums_backward(
    grad_kv: torch.Tensor,
    grad_k_sum: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    block_l = _block_l(k)
    grid, run = _grid(k, block_l)
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    _key_value_sums_backward_kernel[grid](
        grad_kv.contiguous(), grad_k_sum.contiguous(), k, v, grad_k, grad_v,
        k.shape[1], run, k.shape[2],
        *k.stride()[:3], *v.stride()[:3],
        FEATURE_MAP=feature_map, **_constants(k, block_l),
    )  # fmt: skip
    return grad_k, grad_v


def linear_output(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_sum: torch.Tensor,
    feature_map: str,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    block_l = _block_l(q)
    grid, run = _grid(q, block_l, at_a_time=2)
    out = q.new_empty(q.shape)
    _linear_output_kernel[grid](
        q, kv.contiguous(), k_sum.contiguous(), bias if bias is None else bias.contiguous(), out,
        q.shape[1], run, q.shape[2],
        *q.stride()[:3],
        FEATURE_MAP=feature_map, **_constants(q, block_l),
    )  # fmt: skip
    return out


def linear_output_backward(
    grad: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    block_l = _block_l(q)
    grid, run = _grid(q, block_l)
    # The gradient of a sum is one number in all places: no rows to read.
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_q = q.new_empty(q.shape)
    grad_kv, grad_k_sum = _partial_sums(q, grid)
    grad_bias = torch.empty_like(grad_k_sum)
    _linear_output_backward_kernel[grid](
        grad, q, kv.contiguous(), k_sum.contiguous(), grad_q, grad_kv, grad_k_sum, grad_bias,
        q.shape[1], run, q.shape[2],
        *grad.stride()[:3], *q.stride()[:3],
        FEATURE_MAP=feature_map, **_constants(q, block_l),
    )  # fmt: skip
    return grad_q, *_added(grad_kv, grad_k_sum), grad_bias.sum(dim=(0, 1, 2))


def _added(kv_parts: torch.Tensor, k_sum_parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of all parts: kv (B,H,D,D), not transposed any more, and k_sum (B,H,D) float32."""
    batch, heads, parts, dim = k_sum_parts.shape
    kv, k_sum = kv_parts.new_empty(batch, heads, dim, dim), k_sum_parts.new_empty(batch, heads, dim)
    _add_parts_kernel[_feature_grid(kv_parts)](
        kv_parts, k_sum_parts, None, None, None, kv, k_sum, None, None, parts, 0,
        BLOCK_K=BLOCK_L, **_add_constants(kv_parts),
    )  # fmt: skip
    return kv, k_sum


def _feature_grid(kv_parts: torch.Tensor) -> tuple[int, int]:
    batch, heads, _, dim, _ = kv_parts.shape
    return batch * heads, triton.cdiv(dim, FEATURES)


def _add_constants(kv_parts: torch.Tensor) -> dict[str, int]:
    dim = kv_parts.shape[-1]
    sizes = {"D": dim, "BLOCK_D": _block(dim), "FEATURES": FEATURES, "PARTS": PARTS}
    return {**sizes, "num_warps": 8}


def _grid(x: torch.Tensor, block: int, at_a_time: int = 1) -> tuple[tuple[int, int], int]:
    """(B * H, parts), and the rows of each part, for programs that take `block` rows in a step
    and of which a multiprocessor has room for `at_a_time`."""
    batch, length, heads, _ = x.shape
    blocks = triton.cdiv(length, block)
    programs = at_a_time * _multiprocessors(x)
    blocks_each = triton.cdiv(blocks, max(1, programs // (batch * heads)))
    return (batch * heads, triton.cdiv(blocks, blocks_each)), blocks_each * block


def _block_l(x: torch.Tensor) -> int:
    """Rows that a program takes at a time."""
    return BLOCK_L if _is_large(x) else BLOCK_L // 2


def _is_large(x: torch.Tensor) -> bool:
    """Whether the device has the shared memory of Hopper and data-centre Blackwell."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _multiprocessors(x: torch.Tensor) -> int:
    if not x.is_cuda:
        return MULTIPROCESSORS_OF_INTERPRETER
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _partial_sums(x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for a (D, D) and a (D,) sum of each program: (B, H, parts, ...) float32."""
    batch, _, heads, dim = x.shape
    shape = (batch, heads, grid[1])
    return (
        x.new_empty(*shape, dim, dim, dtype=torch.float32),
        x.new_empty(*shape, dim, dtype=torch.float32),
    )


def _constants(x: torch.Tensor, block_l: int) -> dict[str, int]:
    dim = x.shape[-1]
    block = _block(dim)
    # With three stages rows are loaded during the whole step before the one that needs them.
    launch = {"num_warps": 8 if block > 64 else 4, "num_stages": 3 if _is_large(x) else 2}
    return {"D": dim, "BLOCK_D": block, "BLOCK_L": block_l, **launch}


def _block(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
