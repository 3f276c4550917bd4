"""Attention with its tangent on a GPU; `reference` says what is computed.

One pass over K, dK, V and dV with the running maximum m of the scores, in units of log2. With
weights relative to it, P = exp2(S - m), and W = P∘dS, a program adds up

    total = rowsum(P)    out   = P V
    slope = rowsum(W)    along = W V + P dV

which shrink together when the maximum grows, and ends with

    O = out / total      dO = along / total - slope / total O

That is six matrix products, for the two of attention alone, so the tensor cores should bound it:
- A program has 128 query rows. With 64, the L2 cache would deliver 206 GB of K, dK, V and dV for
  one pass over 32,760 tokens of 12 heads of 128.
- S, dS, `out` and `along` are 192 registers of a thread, so one program fills a multiprocessor.
- Tiles come through TMA, where the GPU has it and the tensors' strides suit it: it takes no
  registers for addresses.
- Both terms of dS, and both of `along`, are summed by the tensor cores in place.
- Only the ragged last key block needs a mask. It is taken last and apart.

Under a block map a program has at most 64 query rows, which two programs of a multiprocessor have
registers for: one multiplies while the other takes exponentials. It walks over the kept key
blocks in the order of their list, whose next entry it reads a step ahead for the addresses. Any
of them may be the ragged one, so every step has the mask: little beside six products.

Statistics and sums are float32; P and W are rounded to the inputs' dtype for their products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turbodit.kernels import LOG2_E
from turbodit.kernels.tma import can_describe, is_large, strides, tiles

TRITON_VERSION = tuple(int(x) for x in triton.__version__.split(".")[:2])
# One compiled kernel for all of them: nothing is gained from a length that 16 divides.
_SIZES = ["H", "Lq", "Lk", "kept"]


class Launch(NamedTuple):
    """Rows of queries and of keys that a program takes at a time, and how it is launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# By head dimension. Hopper and data-centre Blackwell, compute capability 9 and 10, have more
# shared memory.
LARGE = {64: Launch(128, 64, 8, 3), 128: Launch(128, 64, 8, 2)}
SMALL = {64: Launch(128, 32, 8, 2), 128: Launch(64, 32, 4, 1)}
# Under a block map, at most: of smaller blocks a program takes one, with a warp for 16 queries.
SPARSE_LARGE = {64: Launch(64, 64, 4, 3), 128: Launch(64, 32, 4, 2)}
SPARSE_SMALL = {64: Launch(64, 32, 4, 2), 128: Launch(64, 32, 4, 1)}


@triton.jit
def _head(x, batch, head, stride_b, stride_h, TMA: tl.constexpr):
    """What `_rows` takes: a descriptor of all heads, or a pointer to this one's first row."""
    if not TMA:
        x += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return x


@triton.jit
def _rows(
    x, batch, head, start, length, stride, BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr
):
    """BLOCK rows of a head from row `start` on, zeros past the end."""
    if TMA:
        rows = x.load([batch, head, start, 0]).reshape(BLOCK, D)
    else:
        places = tl.arange(0, BLOCK)
        # Offsets in a tile fit in 32 bits, and are the same in every step.
        offsets = places[:, None] * stride + tl.arange(0, D)[None, :]
        x += tl.cast(start, tl.int64) * stride
        rows = tl.load(x + offsets, (start + places < length)[:, None], other=0.0)
    return rows


@triton.jit
def _add_keys(
    q, dq, k, dk, v, dv, batch, head, start, Lk,
    stride_kl, stride_dkl, stride_vl, stride_dvl,
    scale_log2, scale, out, along, largest, total, slope,
    D: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys from row `start` on; tangents that are None are zero. Sums are relative to
    exp2(largest)."""
    if MASKED:
        exists = start + tl.arange(0, BLOCK_K) < Lk
    k_rows = _rows(k, batch, head, start, Lk, stride_kl, BLOCK_K, D, TMA)
    if dk is not None:
        dk_rows = _rows(dk, batch, head, start, Lk, stride_dkl, BLOCK_K, D, TMA)
    v_rows = _rows(v, batch, head, start, Lk, stride_vl, BLOCK_K, D, TMA)
    if dv is not None:
        dv_rows = _rows(dv, batch, head, start, Lk, stride_dvl, BLOCK_K, D, TMA)
    HAS_SLOPE: tl.constexpr = (dq is not None) or (dk is not None)
    scores = tl.dot(q, tl.trans(k_rows))
    if HAS_SLOPE:
        scores_tangent = tl.zeros(scores.shape, tl.float32)
        if dq is not None:
            scores_tangent = tl.dot(dq, tl.trans(k_rows), scores_tangent)
        if dk is not None:
            scores_tangent = tl.dot(q, tl.trans(dk_rows), scores_tangent)
    if MASKED:
        scores = tl.where(exists[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * scale_log2)
    shrink = tl.exp2(largest - new_largest)
    weights = tl.exp2(scores * scale_log2 - new_largest[:, None])
    narrow = weights.to(v_rows.dtype)
    total = total * shrink + tl.sum(weights, axis=1)
    out = tl.dot(narrow, v_rows, out * shrink[:, None])
    along *= shrink[:, None]
    if HAS_SLOPE:
        # Of the rounded ones, as slope * O has to cancel their part along O.
        weighted = (weights * (scores_tangent * scale)).to(v_rows.dtype)
        slope = slope * shrink + tl.sum(weighted.to(tl.float32), axis=1)
        along = tl.dot(weighted, v_rows, along)
    if dv is not None:
        along = tl.dot(narrow, dv_rows, along)
    return out, along, new_largest, total, slope


@triton.jit
def _store(
    out_ptr, along_ptr, batch, head, query_start, Lq, stride_b, stride_l, stride_h,
    out, along, total, slope,
    BLOCK_Q: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Output and tangent of some queries from their sums."""
    out /= total[:, None]
    along = along / total[:, None] - (slope / total)[:, None] * out
    rows = query_start + tl.arange(0, BLOCK_Q)
    offsets = rows[:, None].to(tl.int64) * stride_l + tl.arange(0, D)[None, :]
    offsets += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    exists = (rows < Lq)[:, None]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), exists)
    tl.store(along_ptr + offsets, along.to(along_ptr.dtype.element_ty), exists)


@triton.jit(do_not_specialize=_SIZES)
def _kernel(
    q, dq, k, dk, v, dv, out_ptr, along_ptr,
    H, Lq, Lk, scale_log2, scale,
    stride_qb, stride_ql, stride_qh,
    stride_dqb, stride_dql, stride_dqh,
    stride_kb, stride_kl, stride_kh,
    stride_dkb, stride_dkl, stride_dkh,
    stride_vb, stride_vl, stride_vh,
    stride_dvb, stride_dvl, stride_dvh,
    stride_ob, stride_ol, stride_oh,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    query_start = tl.program_id(0) * BLOCK_Q
    q = _head(q, batch, head, stride_qb, stride_qh, False)
    if dq is not None:
        dq = _head(dq, batch, head, stride_dqb, stride_dqh, False)
    k = _head(k, batch, head, stride_kb, stride_kh, TMA)
    if dk is not None:
        dk = _head(dk, batch, head, stride_dkb, stride_dkh, TMA)
    v = _head(v, batch, head, stride_vb, stride_vh, TMA)
    if dv is not None:
        dv = _head(dv, batch, head, stride_dvb, stride_dvh, TMA)
    q_rows = _rows(q, batch, head, query_start, Lq, stride_ql, BLOCK_Q, D, False)
    dq_rows = None
    if dq is not None:
        dq_rows = _rows(dq, batch, head, query_start, Lq, stride_dql, BLOCK_Q, D, False)

    out = tl.zeros((BLOCK_Q, D), tl.float32)
    along = tl.zeros((BLOCK_Q, D), tl.float32)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    slope = tl.zeros((BLOCK_Q,), tl.float32)
    whole = Lk // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        out, along, largest, total, slope = _add_keys(
            q_rows, dq_rows, k, dk, v, dv, batch, head, start, Lk,
            stride_kl, stride_dkl, stride_vl, stride_dvl,
            scale_log2, scale, out, along, largest, total, slope, D, BLOCK_K, TMA, False,
        )  # fmt: skip
    if whole < Lk:
        out, along, largest, total, slope = _add_keys(
            q_rows, dq_rows, k, dk, v, dv, batch, head, whole, Lk,
            stride_kl, stride_dkl, stride_vl, stride_dvl,
            scale_log2, scale, out, along, largest, total, slope, D, BLOCK_K, TMA, True,
        )  # fmt: skip
    _store(
        out_ptr, along_ptr, batch, head, query_start, Lq, stride_ob, stride_ol, stride_oh,
        out, along, total, slope, BLOCK_Q, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _sparse_kernel(
    q, dq, k, dk, v, dv, indices, out_ptr, along_ptr,
    H, Lq, Lk, kept, scale_log2, scale,
    stride_qb, stride_ql, stride_qh,
    stride_dqb, stride_dql, stride_dqh,
    stride_kb, stride_kl, stride_kh,
    stride_dkb, stride_dkl, stride_dkh,
    stride_vb, stride_vl, stride_vh,
    stride_dvb, stride_dvl, stride_dvh,
    stride_ob, stride_ol, stride_oh,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """ROWS of a block of queries against the blocks of keys that it keeps, KEYS at a time."""
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    query_start = tl.program_id(0) * ROWS
    q = _head(q, batch, head, stride_qb, stride_qh, False)
    if dq is not None:
        dq = _head(dq, batch, head, stride_dqb, stride_dqh, False)
    k = _head(k, batch, head, stride_kb, stride_kh, TMA)
    if dk is not None:
        dk = _head(dk, batch, head, stride_dkb, stride_dkh, TMA)
    v = _head(v, batch, head, stride_vb, stride_vh, TMA)
    if dv is not None:
        dv = _head(dv, batch, head, stride_dvb, stride_dvh, TMA)
    q_rows = _rows(q, batch, head, query_start, Lq, stride_ql, ROWS, D, False)
    dq_rows = None
    if dq is not None:
        dq_rows = _rows(dq, batch, head, query_start, Lq, stride_dql, ROWS, D, False)

    out = tl.zeros((ROWS, D), tl.float32)
    along = tl.zeros((ROWS, D), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    slope = tl.zeros((ROWS,), tl.float32)
    query_block = tl.program_id(1).to(tl.int64) * tl.cdiv(Lq, BLOCK_Q) + query_start // BLOCK_Q
    indices += query_block * kept
    STEPS: tl.constexpr = BLOCK_K // KEYS
    block = tl.load(indices)
    for step in range(kept * STEPS):
        # A block begins with a key that exists, so the maximum is finite from its first step on.
        start = block * BLOCK_K + step % STEPS * KEYS
        block = tl.load(indices + tl.minimum((step + 1) // STEPS, kept - 1))
        out, along, largest, total, slope = _add_keys(
            q_rows, dq_rows, k, dk, v, dv, batch, head, start, Lk,
            stride_kl, stride_dkl, stride_vl, stride_dvl,
            scale_log2, scale, out, along, largest, total, slope, D, KEYS, TMA, True,
        )  # fmt: skip
    _store(
        out_ptr, along_ptr, batch, head, query_start, Lq, stride_ob, stride_ol, stride_oh,
        out, along, total, slope, ROWS, D,
    )  # fmt: skip


def attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor | None,
    k_tangent: torch.Tensor | None,
    v_tangent: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, dim = q.shape
    out, out_tangent = q.new_empty(q.shape), q.new_empty(q.shape)
    inputs = [_with_rows(x) for x in (q, q_tangent, k, k_tangent, v, v_tangent)]
    given = [x for x in inputs if x is not None]
    if _has_hopper_kernel(q) and len(given) == 6 and can_describe(*given):
        from turbodit.kernels.attention_jvp import hopper

        return hopper.attention_jvp(*given, scale=scale)
    launch, tma = _launch(q), can_describe(*inputs[2:])
    _kernel[(triton.cdiv(length, launch.block_q), batch * heads)](
        *inputs[:2], *tiles(launch.block_k, tma, *inputs[2:]), out, out_tangent,
        heads, length, k.shape[1], scale * LOG2_E, scale,
        *strides(*inputs, out),
        D=dim, BLOCK_Q=launch.block_q, BLOCK_K=launch.block_k, TMA=tma,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out, out_tangent


def sparse_attention_jvp(
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
    batch, length, heads, dim = q.shape
    out, out_tangent = q.new_empty(q.shape), q.new_empty(q.shape)
    inputs = [_with_rows(x) for x in (q, q_tangent, k, k_tangent, v, v_tangent)]
    launch, tma = _sparse_launch(q), can_describe(*inputs[2:])
    rows, keys = min(launch.block_q, block_q), min(launch.block_k, block_k)
    _sparse_kernel[(triton.cdiv(length, rows), batch * heads)](
        *inputs[:2], *tiles(keys, tma, *inputs[2:]), indices.contiguous(), out, out_tangent,
        heads, length, k.shape[1], indices.shape[3], scale * LOG2_E, scale,
        *strides(*inputs, out),
        D=dim, BLOCK_Q=block_q, BLOCK_K=block_k, ROWS=rows, KEYS=keys, TMA=tma,
        # A matrix product takes 16 rows of a warp at least.
        num_warps=min(launch.num_warps, rows // 16), num_stages=launch.num_stages,
    )  # fmt: skip
    return out, out_tangent


def _with_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """x with rows that can be read: a tangent may be one number in all places."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _has_hopper_kernel(x: torch.Tensor) -> bool:
    """Whether `hopper` is for x: it needs the GPU, the head dimension and Triton 3.6."""
    return (
        TRITON_VERSION >= (3, 6)
        and x.is_cuda
        and x.shape[-1] == 128
        and torch.cuda.get_device_capability(x.device) == (9, 0)
    )


def _launch(x: torch.Tensor) -> Launch:
    return (LARGE if is_large(x) else SMALL)[x.shape[-1]]


def _sparse_launch(x: torch.Tensor) -> Launch:
    return (SPARSE_LARGE if is_large(x) else SPARSE_SMALL)[x.shape[-1]]
