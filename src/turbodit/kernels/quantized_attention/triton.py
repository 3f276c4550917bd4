"""Quantised attention on a GPU; `reference` says what is computed.

Three passes: column statistics of K and V, quantised copies of both, attention, which quantises
its own rows of q. The time goes into the attention loop, so whatever can leave it has left it:

- Copies of K and V are whole blocks, zeros past the end, each block contiguous: the loop loads
  without masks and knows no strides.
- A query row's scale, the softmax scale and log2(e) are one factor. All factors are positive,
  so the maximum of a row is taken before they are applied.
- For fp8, P is stretched by moving the exponent, which is free; the row sum stretches with it.
  V's channel scales and mean enter once, at the end.
- fp8 tensor cores read V with its keys contiguous, so V's blocks are written transposed. They
  also want four neighbouring keys of P in one thread, where the accumulator of Q K^T leaves
  two and two. A sum has no order: `_pair_keys` renumbers the keys of P so that every value
  stays in its thread, and V's copy is written in the same order.
- fp8 tensor cores of compute capability 8.9 and 9.0 add with about 14 bits. Each block's
  P V is summed by itself and added in float32, in the multiplication that rescales the sum.

Shapes: B batch, H heads (Hkv of k and v), Lq/Lk length, D head dimension, Mq/Mk number of
query/key blocks. Copies: k (B,Hkv,Mk,block_k,D), v (B,Hkv,Mk,block_k,D) in float16 or
(B,Hkv,Mk,D,block_k) in fp8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turbodit.kernels import LOG2_E
from turbodit.kernels.linear_attention.triton import add_linear_branch
from turbodit.kernels.quantized_attention.reference import (
    INT8_MAX,
    LOG2_FP8_MAX,
    TINY,
    V_MAX,
    Linear,
)


class Launch(NamedTuple):
    """How the attention kernel is launched; a program has one warp for 16 query rows."""

    rows: int  # of queries in one program, at most
    stages: int  # blocks of K and V on their way at once, and being read
    registers: int | None = None  # of a thread, at most, where a program has that many rows


# By compute capability and head dimension. Hopper: three programs of 128 threads share a
# multiprocessor, and one's softmax runs beside another's matrix products; the registers are
# what a third of a multiprocessor has (a quarter for D = 64).
LAUNCH = {
    (80, 64): Launch(128, 3),
    (80, 128): Launch(128, 3),
    (90, 64): Launch(64, 4, 128),
    (90, 128): Launch(64, 3, 168),
    (100, 64): Launch(128, 3),
    (100, 128): Launch(128, 3),
}
# Other devices have 99 KiB of shared memory.
SMALL_LAUNCH = Launch(64, 2)
# Rows that one program of the statistics reads, and at a time; channels that one puts together.
CHUNK, TILE, DIMS = 512, 128, 32

TRITON_VERSION = tuple(int(x) for x in triton.__version__.split(".")[:2])
_TINY = tl.constexpr(TINY)
_INT8_MAX = tl.constexpr(INT8_MAX)
_LOG2_FP8_MAX = tl.constexpr(LOG2_FP8_MAX)


@triton.jit
def _rows(pointer, rows, length, batch, head, stride_b, stride_l, stride_h, D: tl.constexpr):
    """x[batch, rows, head] in float32, zeros past the end, and which rows are real."""
    pointer += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    real = rows[:, None] < length
    offsets = rows[:, None].to(tl.int64) * stride_l + tl.arange(0, D)[None, :]
    return tl.load(pointer + offsets, mask=real, other=0.0).to(tl.float32), real


@triton.jit
def _statistics_kernel(
    x_ptr, sum_ptr, min_ptr, max_ptr, length, stride_b, stride_l, stride_h,
    CHUNK: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum, minimum and maximum of each channel over CHUNK rows of one head."""
    ROWS: tl.constexpr = 16  # that the threads cover side by side: each keeps to its own
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total = tl.zeros((ROWS, D), tl.float32)
    lowest = tl.full((ROWS, D), float("inf"), tl.float32)
    highest = tl.full((ROWS, D), float("-inf"), tl.float32)
    for first in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, length), TILE):
        rows = first + tl.arange(0, TILE)
        x, real = _rows(x_ptr, rows, length, batch, head, stride_b, stride_l, stride_h, D)
        low, high = tl.where(real, x, float("inf")), tl.where(real, x, float("-inf"))
        total += tl.sum(tl.reshape(x, (TILE // ROWS, ROWS, D)), axis=0)
        lowest = tl.minimum(lowest, tl.min(tl.reshape(low, (TILE // ROWS, ROWS, D)), axis=0))
        highest = tl.maximum(highest, tl.max(tl.reshape(high, (TILE // ROWS, ROWS, D)), axis=0))
    out = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + chunk) * D + tl.arange(0, D)
    tl.store(sum_ptr + out, tl.sum(total, axis=0))
    tl.store(min_ptr + out, tl.min(lowest, axis=0))
    tl.store(max_ptr + out, tl.max(highest, axis=0))


@triton.jit
def _combine_kernel(
    sum_ptr, min_ptr, max_ptr, mean_ptr, scale_ptr, chunks, length, limit,
    TILE: tl.constexpr, DIMS: tl.constexpr, D: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Mean of DIMS channels of one head; scale that takes |x|, or |x - mean|, up to `limit`."""
    head_index = tl.program_id(0)
    dims = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    total = tl.zeros((TILE, DIMS), tl.float32)
    lowest = tl.full((TILE, DIMS), float("inf"), tl.float32)
    highest = tl.full((TILE, DIMS), float("-inf"), tl.float32)
    for first in range(0, chunks, TILE):
        rows = first + tl.arange(0, TILE)[:, None]
        offsets, real = (head_index * chunks + rows) * D + dims[None, :], rows < chunks
        total += tl.load(sum_ptr + offsets, mask=real, other=0.0)
        lowest = tl.minimum(lowest, tl.load(min_ptr + offsets, mask=real, other=float("inf")))
        highest = tl.maximum(highest, tl.load(max_ptr + offsets, mask=real, other=float("-inf")))
    mean = tl.sum(total, axis=0) / length
    tl.store(mean_ptr + head_index * D + dims, mean)
    largest, smallest = tl.max(highest, axis=0), tl.min(lowest, axis=0)
    if SMOOTH:
        largest, smallest = largest - mean, smallest - mean
    scale = tl.maximum(tl.maximum(largest, -smallest), _TINY) / limit
    tl.store(scale_ptr + head_index * D + dims, scale)


@triton.jit
def _to_int8(x):
    """The nearest integers of |x| <= 127.

    Added to 1.5 * 2^23, a float holds them in its low bits: faster than the units that convert.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _quantize_keys_kernel(
    k_ptr, mean_ptr, out_ptr, scale_ptr, length, stride_b, stride_l, stride_h,
    BLOCK_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """int8 copy of one block of K, minus the mean if there is one, and its scale."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head_index = batch * tl.num_programs(1) + head
    dims, keys = tl.arange(0, D), tl.arange(0, BLOCK_K)
    rows = block * BLOCK_K + keys
    k, real = _rows(k_ptr, rows, length, batch, head, stride_b, stride_l, stride_h, D)
    if mean_ptr is not None:
        k = tl.where(real, k - tl.load(mean_ptr + head_index * D + dims)[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(k), axis=1), axis=0), _TINY) / _INT8_MAX
    index = (head_index * tl.num_programs(0) + block).to(tl.int64)
    tl.store(scale_ptr + index, scale)
    out = out_ptr + index * BLOCK_K * D + keys[:, None] * D + dims[None, :]
    tl.store(out, _to_int8(k * (1 / scale)))


@triton.jit
def _pair_keys(x, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Renumbers the columns of x (ROWS, KEYS): pairs 0 1 | 8 9 | 2 3 | 10 11 | ... of each 16.

    A thread of Q K^T holds columns 2t, 2t+1, 2t+8 and 2t+9 of each 16 (t = 0..3). As an
    operand of an fp8 product it must hold 4t to 4t+3: the same values, renumbered.
    """
    x = tl.reshape(x, (ROWS, KEYS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), (ROWS, KEYS))


@triton.jit
def _quantize_values_kernel(
    v_ptr, mean_ptr, scale_ptr, out_ptr, length, stride_b, stride_l, stride_h,
    BLOCK_K: tl.constexpr, D: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """float16 copy of one block of V, or a transposed fp8 copy in the order of `_pair_keys`."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head_index = batch * tl.num_programs(1) + head
    dims, keys = tl.arange(0, D), tl.arange(0, BLOCK_K)
    rows = block * BLOCK_K + keys
    v, real = _rows(v_ptr, rows, length, batch, head, stride_b, stride_l, stride_h, D)
    if mean_ptr is not None:
        v = tl.where(real, v - tl.load(mean_ptr + head_index * D + dims)[None, :], 0.0)
    v = v * (1 / tl.load(scale_ptr + head_index * D + dims))[None, :]
    out_ptr += (head_index * tl.num_programs(0) + block).to(tl.int64) * BLOCK_K * D
    v = v.to(out_ptr.dtype.element_ty)
    if FP8:
        v = _pair_keys(tl.trans(v), D, BLOCK_K)
        tl.store(out_ptr + dims[:, None] * BLOCK_K + keys[None, :], v)
    else:
        tl.store(out_ptr + keys[:, None] * D + dims[None, :], v)


@triton.jit
def _add_values(p, v_pointers, acc, FP8: tl.constexpr):
    """acc + P V of one block, added in float32."""
    v = tl.load(v_pointers)
    p = p.to(v.dtype)
    if FP8:
        ROWS: tl.constexpr = p.shape[0]
        BLOCK_K: tl.constexpr = p.shape[1]
        acc += tl.dot(_pair_keys(p, ROWS, BLOCK_K), v, max_num_imprecise_acc=BLOCK_K)
    else:
        acc = tl.dot(p, v, acc)
    return acc


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, v_mean_ptr, out_ptr,
    indices_ptr, counts_ptr, kept, means_ptr, k_sum_ptr, bias_ptr,
    factor, pv_threshold, stride_qb, stride_ql, stride_qh, length_q, length_k, group,
    D: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, FP8: tl.constexpr, SKIP_PV: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """One tile of query rows, which lies within one query block of the block map."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    head_index = (batch * heads + head).to(tl.int64)
    blocks_k = tl.cdiv(length_k, BLOCK_K)
    rows, keys, dims = tile * TILE_Q + tl.arange(0, TILE_Q), tl.arange(0, BLOCK_K), tl.arange(0, D)

    q, real = _rows(q_ptr, rows, length_q, batch, head, stride_qb, stride_ql, stride_qh, D)
    q_scale = tl.maximum(tl.max(tl.abs(q), axis=1), _TINY) / _INT8_MAX
    q = _to_int8(q * (1 / q_scale)[:, None])
    q_scale *= factor
    kv_head = batch * (heads // group) + head // group
    k_scale_ptr += kv_head * blocks_k
    k_ptr += kv_head.to(tl.int64) * blocks_k * BLOCK_K * D
    v_ptr += kv_head.to(tl.int64) * blocks_k * BLOCK_K * D
    k_tile = keys[None, :] * D + dims[:, None]
    v_tile = keys[:, None] * D + dims[None, :]
    if FP8:
        v_tile = dims[None, :] * BLOCK_K + keys[:, None]

    steps = blocks_k
    if CAUSAL:
        steps = tl.minimum(steps, tl.cdiv((tile + 1) * TILE_Q, BLOCK_K))
    if indices_ptr is not None:
        map_row = head_index * tl.cdiv(length_q, BLOCK_Q) + tile * TILE_Q // BLOCK_Q
        indices_ptr += map_row * kept
        steps = kept
        if counts_ptr is not None:
            steps = tl.load(counts_ptr + map_row)

    largest = tl.full((TILE_Q,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    acc = tl.zeros((TILE_Q, D), tl.float32)
    for step in range(steps):
        block = step
        if indices_ptr is not None:
            block = tl.load(indices_ptr + step)
        offset = tl.cast(block, tl.int64) * BLOCK_K * D
        scores = tl.dot(q, tl.load(k_ptr + offset + k_tile), out_dtype=tl.int32).to(tl.float32)
        first = block * BLOCK_K
        partly_hidden = first + BLOCK_K > length_k
        if CAUSAL:
            partly_hidden |= first + BLOCK_K > tile * TILE_Q + 1
        if partly_hidden:
            visible = first + keys[None, :] < length_k
            if CAUSAL:
                visible &= first + keys[None, :] <= rows[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        scale = q_scale * tl.load(k_scale_ptr + block)
        block_largest = tl.max(scores, axis=1) * scale
        new_largest = tl.maximum(largest, block_largest)
        shift = new_largest
        if FP8:
            shift = new_largest - _LOG2_FP8_MAX
        p = tl.exp2(scores * scale[:, None] - shift[:, None])
        rescale = tl.exp2(largest - new_largest)
        if SKIP_PV:
            faint = block_largest < largest - pv_threshold
            p = tl.where(faint[:, None], 0.0, p)
            # Where all rows are faint, no maximum is new: nothing to rescale either.
            if tl.min(faint.to(tl.int32), axis=0) == 0:
                acc = _add_values(p, v_ptr + offset + v_tile, acc * rescale[:, None], FP8)
        else:
            acc = _add_values(p, v_ptr + offset + v_tile, acc * rescale[:, None], FP8)
        largest = new_largest
        total = total * rescale + tl.sum(p, axis=1)

    # Rows without any key have a total of zero and stay zero.
    inverse = 1 / tl.where(total > 0, total, 1.0)
    v_scale = tl.load(v_scale_ptr + kv_head * D + dims)
    out = acc * inverse[:, None] * v_scale[None, :]
    if v_mean_ptr is not None:
        mean = tl.load(v_mean_ptr + kv_head * D + dims)
        out += tl.where(total[:, None] > 0, mean[None, :], 0.0)
    if means_ptr is not None:
        first_row = batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        first_row += tile.to(tl.int64) * TILE_Q * stride_ql
        out = add_linear_branch(
            out, q_ptr + first_row, stride_ql, rows < length_q, means_ptr + head_index * D * D,
            k_sum_ptr + head_index * D, bias_ptr, FEATURE_MAP,
        )  # fmt: skip
    out_row = (batch.to(tl.int64) * length_q + rows) * heads + head
    tl.store(out_ptr + out_row[:, None] * D + dims[None, :], out, mask=real)


def quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    linear: Linear | None,
    k_mean: torch.Tensor | None,
    v_largest: torch.Tensor | None,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    causal: bool,
    pv: str,
    pv_threshold: float | None,
    smooth_k: bool,
    smooth_v: bool,
    feature_map: str,
) -> torch.Tensor:
    """As `turbodit.kernels.quantized_attention.quantized_attention`, all arguments given."""
    batch, length_q, heads, dim = q.shape
    length_k = k.shape[1]
    if smooth_k and k_mean is None:
        k_mean = _statistics(k, INT8_MAX, smooth=True)[0]
    k_int, k_scale = quantize_keys(k, block_k, k_mean)
    v_mean = None
    if v_largest is None:
        v_mean, v_scale = _statistics(v, V_MAX[pv], smooth_v)
        v_mean = v_mean if smooth_v else None
    else:
        v_scale = v_largest.clamp(min=TINY) / V_MAX[pv]
    values = quantize_values(v, block_k, pv, v_scale, v_mean)
    indices, counts = _contiguous(indices), _contiguous(counts)
    means, k_sum, bias = (_contiguous(x) for x in linear or (None,) * 3)
    if (
        _has_hopper_kernel(q)
        and (block_q, block_k, pv) == (128, 64, "fp8")
        and not causal
        and pv_threshold is None
        and v_mean is None
    ):
        from turbodit.kernels.quantized_attention import hopper

        return hopper.attend(
            q, k_int, k_scale, values, v_scale, indices, counts, means, k_sum, bias,
            length_k, scale * LOG2_E, feature_map,
        )  # fmt: skip
    launch = _launch(q.device, dim)
    tile_q = min(block_q, launch.rows)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _attention_kernel[(triton.cdiv(length_q, tile_q), heads, batch)](
        q, k_int, k_scale, values, v_scale, v_mean, out,
        indices, counts, 0 if indices is None else indices.shape[-1], means, k_sum, bias,
        scale * LOG2_E, (pv_threshold or 0.0) * LOG2_E, *q.stride()[:3],
        length_q, length_k, heads // k.shape[2],
        D=dim, TILE_Q=tile_q, BLOCK_Q=block_q, BLOCK_K=block_k,
        CAUSAL=causal, FP8=pv == "fp8", SKIP_PV=pv_threshold is not None, FEATURE_MAP=feature_map,
        num_warps=tile_q // 16, num_stages=launch.stages,
        maxnreg=launch.registers if tile_q == launch.rows else None,
    )  # fmt: skip
    return out


def quantize_keys(
    k: torch.Tensor, block_k: int, mean: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """k (B,L,H,D), less mean (B,H,D) -> int8 (B,H,Mk,block_k,D) and scales (B,H,Mk)."""
    batch, length, heads, dim = k.shape
    blocks = triton.cdiv(length, block_k)
    out = k.new_empty(batch, heads, blocks, block_k, dim, dtype=torch.int8)
    scale = k.new_empty(batch, heads, blocks, dtype=torch.float32)
    _quantize_keys_kernel[(blocks, heads, batch)](
        k, _contiguous(mean), out, scale, length, *k.stride()[:3], BLOCK_K=block_k, D=dim
    )
    return out, scale


def quantize_values(
    v: torch.Tensor, block_k: int, pv: str, scale: torch.Tensor, mean: torch.Tensor | None
) -> torch.Tensor:
    """(v - mean) / scale as the copy that the top of this file speaks of; scale, mean (B,H,D)."""
    batch, length, heads, dim = v.shape
    blocks = triton.cdiv(length, block_k)
    fp8 = pv == "fp8"
    shape = (dim, block_k) if fp8 else (block_k, dim)
    dtype = torch.float8_e4m3fn if fp8 else torch.float16
    out = v.new_empty(batch, heads, blocks, *shape, dtype=dtype)
    _quantize_values_kernel[(blocks, heads, batch)](
        v, mean, scale, out, length, *v.stride()[:3], BLOCK_K=block_k, D=dim, FP8=fp8
    )
    return out


def _statistics(x: torch.Tensor, limit: float, smooth: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each channel of x (B,L,H,D), and scale that takes it up to `limit`: (B,H,D)."""
    batch, length, heads, dim = x.shape
    chunks = triton.cdiv(length, CHUNK)
    parts = x.new_empty(3, batch, heads, chunks, dim, dtype=torch.float32)
    _statistics_kernel[(chunks, heads, batch)](
        x, *parts, length, *x.stride()[:3], CHUNK=CHUNK, TILE=TILE, D=dim, num_warps=8
    )
    mean, scale = x.new_empty(2, batch, heads, dim, dtype=torch.float32)
    _combine_kernel[(batch * heads, triton.cdiv(dim, DIMS))](
        *parts, mean, scale, chunks, length, limit, TILE=TILE, DIMS=DIMS, D=dim, SMOOTH=smooth
    )
    return mean, scale


def _has_hopper_kernel(q: torch.Tensor) -> bool:
    """Whether `hopper` can attend to q: it needs the GPU, the head dimension and Triton 3.6."""
    return (
        TRITON_VERSION >= (3, 6)
        and q.is_cuda
        and q.shape[-1] == 128
        and torch.cuda.get_device_capability(q.device) == (9, 0)
    )


def _launch(device: torch.device, dim: int) -> Launch:
    if device.type != "cuda":  # the interpreter
        return SMALL_LAUNCH
    major, minor = torch.cuda.get_device_capability(device)
    return LAUNCH.get((10 * major + minor, dim), SMALL_LAUNCH)


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
