"""Attention with its tangent for Hopper GPUs, in Triton's Gluon: the same result as `triton`'s.

For what training runs most: D = 128, all three tangents. Who does what at what time:

- One warp copies K and dK, then V and dV, through TMA into a ring of two steps of 64 keys. Two
  warpgroups of 64 query rows each compute, and share every copy.
- A warpgroup starts the three products of S and dS at once, and takes the softmax of S beside
  those of dS. It starts both products with P, and makes P∘dS beside them.
- Nothing is in flight at a step's end: ptxas waits after every product if its sum is carried over
  the loop's end.

Needs Triton 3.6. Shapes: as in `triton`.
"""

from __future__ import annotations

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from turbodit.kernels import LOG2_E

D, ROWS, KEYS = 128, 64, 64
# Registers of a thread: computing, copying, and at the start, when all warps have as many.
COMPUTE, COPY, START = 240, 24, 168

_D, _ROWS, _KEYS = gl.constexpr(D), gl.constexpr(ROWS), gl.constexpr(KEYS)
_STAGES = gl.constexpr(2)
_FLAT = gl.constexpr(gl.NVMMASharedLayout.get_default_for([KEYS, D], gl.bfloat16))  # any 16 bits
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, _OUTPUT, 2))
_SCORE_ROWS = gl.constexpr(gl.SliceLayout(1, _SCORES))
_OUTPUT_ROWS = gl.constexpr(gl.SliceLayout(1, _OUTPUT))


@gluon.jit
def _flat(tile):
    """A tile of one head, (1, 1, rows, D), as (rows, D)."""
    return tile._reinterpret(tile.dtype, [_KEYS, _D], _FLAT)


@gluon.jit
def _copy(descriptors, buffers, barriers, sizes):
    """The copying warp."""
    heads, _, length_k = sizes
    q_desc, dq_desc, k_desc, dk_desc, v_desc, dv_desc = descriptors
    q, dq, k, dk, v, dv = buffers
    q_ready, k_ready, v_ready, k_empty, v_empty = barriers
    batch, head = gl.program_id(1) // heads, gl.program_id(1) % heads
    for half in gl.static_range(2):
        start = (gl.program_id(0) * 2 + half) * _ROWS
        ready = q_ready.index(half)
        mbarrier.expect(ready, 2 * q_desc.block_type.nbytes)
        at = [batch, head, start, 0]
        tma.async_copy_global_to_shared(q_desc, at, ready, q.index(half))
        tma.async_copy_global_to_shared(dq_desc, at, ready, dq.index(half))
    for step in range(gl.cdiv(length_k, _KEYS)):
        stage, phase = step % _STAGES, step // _STAGES & 1
        at = [batch, head, step * _KEYS, 0]
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        ready = k_ready.index(stage)
        mbarrier.expect(ready, 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, at, ready, k.index(stage))
        tma.async_copy_global_to_shared(dk_desc, at, ready, dk.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        ready = v_ready.index(stage)
        mbarrier.expect(ready, 2 * v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, at, ready, v.index(stage))
        tma.async_copy_global_to_shared(dv_desc, at, ready, dv.index(stage))


@gluon.jit
def _operand(x, dtype: gl.constexpr):
    return gl.convert_layout(x.to(dtype), _WEIGHTS)


@gluon.jit
def _over_output(x):
    return gl.convert_layout(x, _OUTPUT_ROWS)[:, None]


@gluon.jit
def _compute(
    outputs, buffers, barriers, sizes, factors, HALF: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups."""
    heads, length_q, length_k = sizes
    factor, scale = factors
    out_ptr, along_ptr = outputs
    q, dq, k, dk, v, dv = buffers
    q_ready, k_ready, v_ready, k_empty, v_empty = barriers
    q_rows, dq_rows = _flat(q.index(HALF)), _flat(dq.index(HALF))
    largest = gl.full((_ROWS,), float("-inf"), gl.float32, _SCORE_ROWS)
    total = gl.zeros((_ROWS,), gl.float32, _SCORE_ROWS)
    slope = gl.zeros((_ROWS,), gl.float32, _SCORE_ROWS)
    out = gl.zeros((_ROWS, _D), gl.float32, _OUTPUT)
    along = gl.zeros((_ROWS, _D), gl.float32, _OUTPUT)
    zeros = gl.zeros((_ROWS, _KEYS), gl.float32, _SCORES)
    mbarrier.wait(q_ready.index(HALF), 0)
    for step in range(gl.cdiv(length_k, _KEYS)):
        stage, phase = step % _STAGES, step // _STAGES & 1
        mbarrier.wait(k_ready.index(stage), phase)
        k_rows = _flat(k.index(stage)).permute((1, 0))
        dk_rows = _flat(dk.index(stage)).permute((1, 0))
        scores = warpgroup_mma(q_rows, k_rows, zeros, use_acc=False, is_async=True)
        tangent = warpgroup_mma(dq_rows, k_rows, zeros, use_acc=False, is_async=True)
        tangent = warpgroup_mma(q_rows, dk_rows, tangent, is_async=True)
        scores = warpgroup_mma_wait(2, deps=[scores])
        if (step + 1) * _KEYS > length_k:
            keys = gl.arange(0, _KEYS, gl.SliceLayout(0, _SCORES))[None, :]
            scores = gl.where(step * _KEYS + keys < length_k, scores, float("-inf"))
        new_largest = gl.maximum(largest, gl.max(scores, axis=1) * factor)
        weights = gl.exp2(scores * factor - new_largest[:, None])
        shrink = gl.exp2(largest - new_largest)
        largest = new_largest
        total = total * shrink + gl.sum(weights, axis=1)
        narrow = _operand(weights, q.dtype)
        out *= _over_output(shrink)
        along *= _over_output(shrink)
        mbarrier.wait(v_ready.index(stage), phase)
        v_rows, dv_rows = _flat(v.index(stage)), _flat(dv.index(stage))
        out = warpgroup_mma(narrow, v_rows, out, is_async=True)
        along = warpgroup_mma(narrow, dv_rows, along, is_async=True)
        tangent = warpgroup_mma_wait(2, deps=[tangent])
        # Of the rounded ones, as slope * O has to cancel their part along O.
        narrow = (weights * (tangent * scale)).to(q.dtype)
        slope = slope * shrink + gl.sum(narrow.to(gl.float32), axis=1)
        along = warpgroup_mma(gl.convert_layout(narrow, _WEIGHTS), v_rows, along, is_async=True)
        mbarrier.arrive(k_empty.index(stage), count=1)
        out, along = warpgroup_mma_wait(0, deps=[out, along])
        mbarrier.arrive(v_empty.index(stage), count=1)

    out = out * _over_output(1 / total)
    along = along * _over_output(1 / total) - _over_output(slope / total) * out
    start = (gl.program_id(0) * 2 + HALF) * _ROWS
    rows = gl.arange(0, _ROWS, _OUTPUT_ROWS)[:, None]
    dims = gl.arange(0, _D, gl.SliceLayout(0, _OUTPUT))[None, :]
    batch, head = gl.program_id(1) // heads, gl.program_id(1) % heads
    first = ((batch.to(gl.int64) * length_q + start) * heads + head) * _D
    offsets = first + rows * (heads * _D) + dims
    exists = start + rows < length_q
    gl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=exists)
    gl.store(along_ptr + offsets, along.to(along_ptr.dtype.element_ty), mask=exists)


@gluon.jit
def _kernel(
    q_desc, dq_desc, k_desc, dk_desc, v_desc, dv_desc, out_ptr, along_ptr,
    heads, length_q, length_k, factor, scale,
    COMPUTE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """128 queries of a head."""
    dtype: gl.constexpr = k_desc.dtype
    layout: gl.constexpr = k_desc.layout
    q = gl.allocate_shared_memory(dtype, [2, 1, 1, _ROWS, _D], layout)
    dq = gl.allocate_shared_memory(dtype, [2, 1, 1, _ROWS, _D], layout)
    k = gl.allocate_shared_memory(dtype, [_STAGES, 1, 1, _KEYS, _D], layout)
    dk = gl.allocate_shared_memory(dtype, [_STAGES, 1, 1, _KEYS, _D], layout)
    v = gl.allocate_shared_memory(dtype, [_STAGES, 1, 1, _KEYS, _D], layout)
    dv = gl.allocate_shared_memory(dtype, [_STAGES, 1, 1, _KEYS, _D], layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for stage in gl.static_range(_STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)  # both warpgroups
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    descriptors = (q_desc, dq_desc, k_desc, dk_desc, v_desc, dv_desc)
    buffers = (q, dq, k, dk, v, dv)
    barriers = (q_ready, k_ready, v_ready, k_empty, v_empty)
    outputs = (out_ptr, along_ptr)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    sizes = (heads, length_q, length_k)
    factors = (factor, scale)
    gl.warp_specialize(
        [
            (_compute, (outputs, buffers, barriers, sizes, factors, FIRST)),
            (_compute, (outputs, buffers, barriers, sizes, factors, SECOND)),
            (_copy, (descriptors, buffers, barriers, sizes)),
        ],
        [4, 1],
        [COMPUTE, COPY],
    )


def attention_jvp(
    q: torch.Tensor,
    q_tangent: torch.Tensor,
    k: torch.Tensor,
    k_tangent: torch.Tensor,
    v: torch.Tensor,
    v_tangent: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `triton.attention_jvp`, for tensors that TMA can read."""
    batch, length, heads, _ = q.shape
    out, along = q.new_empty(q.shape), q.new_empty(q.shape)
    inputs = (q, q_tangent, k, k_tangent, v, v_tangent)
    _kernel[(triton.cdiv(length, 2 * ROWS), batch * heads)](
        *(_described(x) for x in inputs), out, along,
        heads, length, k.shape[1], scale * LOG2_E, scale,
        COMPUTE=COMPUTE, COPY=COPY, num_warps=4, maxnreg=START,
    )  # fmt: skip
    return out, along


def _described(x: torch.Tensor) -> TensorDescriptor:
    tile = [1, 1, ROWS, D]
    return TensorDescriptor.from_tensor(x.transpose(1, 2), tile, tile_layout(x.dtype))


@functools.cache
def tile_layout(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, D], _NAMES[dtype])


_NAMES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
