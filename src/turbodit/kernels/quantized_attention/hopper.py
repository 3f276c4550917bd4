"""Quantised attention for Hopper GPUs, in Triton's Gluon: the same result as `triton`'s kernel.

For what SageSLA and Sage run most: D = 128, fp8 values, blocks of 128 queries and 64 keys. Why it
is as it is:

- A program is one warpgroup with 64 query rows, and does one thing after the other: wait for K,
  Q K^T, softmax, wait for V, P V. Three programs share a multiprocessor and know nothing of each
  other, so what one waits for the others fill. Two warpgroups that share their copies of K and V
  fall into step and wait together: 1.05 instead of 0.98 ms (H100, 32,760 tokens, 12 heads, a tenth
  of the blocks, with the linear branch).
- A step takes two key blocks: one product of 128 keys, and the output is rescaled half as often.
  There is room for K and V of one step. TMA copies the next K as soon as Q K^T has been waited
  for, and the next V as soon as P V has.
- fp8 tensor cores add with about 14 bits, and what they drop has one sign: a long sum comes out
  too small. So P V of a step is summed by itself and added in float32, in the multiplication that
  rescales the output. It comes in two halves of the channels, one after the other: both at once
  need registers without which no third program fits.
- int8 products are added onto integers that are the bits of the float 1.5 * 2^23. Their sums are
  the bits of floats already, and the softmax subtracts that number in its own multiplication:
  no conversion. Maxima are taken of the integers, of which an instruction compares three.
- Each of the four threads that hold a row sums up its own part of P; they meet after the last step.

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
from turbodit.kernels.linear_attention.reference import EPS
from turbodit.kernels.quantized_attention.reference import INT8_MAX, LOG2_FP8_MAX, TINY

D = 128
BLOCK_Q, BLOCK_K = 128, 64
ROWS = 64  # of q in a program
REGISTERS = 168  # of a thread, at most: three programs share a multiprocessor

_HALF_D = gl.constexpr(D // 2)
_D, _BLOCK_Q, _BLOCK_K = gl.constexpr(D), gl.constexpr(BLOCK_Q), gl.constexpr(BLOCK_K)
_ROWS, _KEYS = gl.constexpr(ROWS), gl.constexpr(2 * BLOCK_K)  # of a step
_LOG2_E = gl.constexpr(LOG2_E)
_LOG2_FP8_MAX = gl.constexpr(LOG2_FP8_MAX)
_EPS, _TINY, _INT8_MAX = gl.constexpr(EPS), gl.constexpr(TINY), gl.constexpr(INT8_MAX)
_MAGIC, _MAGIC_BITS = gl.constexpr(12582912.0), gl.constexpr(0x4B400000)
_MINUS_INF_BITS = gl.constexpr(-0x800000)
# Scores of a step and the output; scores of a block and half the output; operands of products with
# K, V and the linear branch.
_WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
_NARROW = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
_BRANCH = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
_QUERIES = gl.constexpr(gl.DotOperandLayout(0, _NARROW, 4))
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, _NARROW, 4))
_FEATURES = gl.constexpr(gl.DotOperandLayout(0, _BRANCH, 2))
_ROW = gl.constexpr(gl.SliceLayout(1, _NARROW))
_WIDE_ROW = gl.constexpr(gl.SliceLayout(1, _WIDE))


@gluon.jit
def _blocks(indices_ptr, step, count, blocks_k):
    """The two key blocks of a step; past the list's end the one after the last of all."""
    first, second = 2 * step, 2 * step + 1
    if indices_ptr is not None:
        first = gl.load(indices_ptr + first, mask=first < count, other=blocks_k)
        second = gl.load(indices_ptr + second, mask=second < count, other=blocks_k)
    return first, second


@gluon.jit
def _scales(scale_ptr, blocks, blocks_k):
    """Scales of the two key blocks of a step."""
    first, second = blocks
    return (
        gl.load(scale_ptr + first, mask=first < blocks_k, other=1.0),
        gl.load(scale_ptr + second, mask=second < blocks_k, other=1.0),
    )


@gluon.jit
def _copy(descriptor, blocks, blocks_k, kv_head, ready, to, wanted):
    """Begins to copy the two blocks of a step, of K or V."""
    ROWS: gl.constexpr = descriptor.block_type.shape[0]
    first, second = blocks
    second = gl.where(second < blocks_k, second, first)  # an odd list's last one, twice
    head = kv_head * blocks_k
    mbarrier.expect(ready, 2 * descriptor.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(
        descriptor, [(head + first) * ROWS, 0], ready, to.index(0), pred=wanted
    )
    tma.async_copy_global_to_shared(
        descriptor, [(head + second) * ROWS, 0], ready, to.index(1), pred=wanted
    )


@gluon.jit
def _load_queries(q_ptr, start, length, stride, layout: gl.constexpr):
    """The rows of q from `start` on, whose first q_ptr points at, float32, zeros past the end."""
    rows = gl.arange(0, _ROWS, gl.SliceLayout(1, layout))[:, None]
    dims = gl.arange(0, _D, gl.SliceLayout(0, layout))[None, :]
    q = gl.load(q_ptr + rows * stride + dims, mask=start + rows < length, other=0.0)
    return q.to(gl.float32)


@gluon.jit
def _quantize_queries(q_ptr, start, length, stride, to):
    """Writes int8 rows of q into shared memory; their scales."""
    q = _load_queries(q_ptr, start, length, stride, _QUERIES)
    scale = gl.maximum(gl.max(gl.abs(q), axis=1), _TINY) / _INT8_MAX
    nearest = (q * (1 / scale)[:, None] + _MAGIC).to(gl.int32, bitcast=True)
    to.store(nearest.to(gl.int8))
    fence_async_shared()
    return scale


@gluon.jit
def _multiply_scores(q, k):
    """Q K^T of a step, added onto _MAGIC_BITS."""
    onto = gl.full((_ROWS, _KEYS), _MAGIC_BITS, gl.int32, _WIDE)
    scores = warpgroup_mma(q, k.permute((1, 0)), onto, is_async=True)
    return warpgroup_mma_wait(0, deps=[scores])


@gluon.jit
def _multiply_values(p, v, HALF: gl.constexpr):
    """P V of a step, for half the channels."""
    first, second = p
    START: gl.constexpr = HALF * _HALF_D
    x = v.index(0).slice(START, _HALF_D).permute((1, 0))
    y = v.index(1).slice(START, _HALF_D).permute((1, 0))
    onto = gl.zeros((_ROWS, _HALF_D), gl.float32, _NARROW)
    out = warpgroup_mma(first, x, onto, use_acc=False, is_async=True)
    out = warpgroup_mma(second, y, out, is_async=True)
    return warpgroup_mma_wait(0, deps=[out])


@gluon.jit
def _by_thread(x):
    """x of one block, with what one thread holds of a row in two dimensions, 1 and 3."""
    return x.reshape((_ROWS, _BLOCK_K // 8, 4, 2))


@gluon.jit
def _thread_max(x):
    return gl.max(gl.max(_by_thread(x), axis=3), axis=1)


@gluon.jit
def _thread_sum(x):
    return gl.sum(gl.sum(_by_thread(x), axis=3), axis=1)


@gluon.jit
def _for_threads(x, like):
    """x of each row, to go with the numbers of each row's threads."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _as_operand(p):
    """P of a block in fp8, its keys renumbered as `triton._pair_keys` says."""
    p = p.to(gl.float8e4nv).reshape((_ROWS, _BLOCK_K // 16, 2, 4, 2))
    p = p.permute((0, 1, 3, 2, 4)).reshape((_ROWS, _BLOCK_K))
    return gl.convert_layout(p, _WEIGHTS)


@gluon.jit
def _split(scores, blocks, length_k):
    """Scores of each of a step's two blocks, the bits of -inf where there is no key."""
    x, y = scores.reshape((_ROWS, 2, _BLOCK_K)).permute((0, 2, 1)).split()
    x, y = gl.convert_layout(x, _NARROW), gl.convert_layout(y, _NARROW)
    first, second = blocks
    if (gl.maximum(first, second) + 1) * _BLOCK_K > length_k:
        keys = gl.arange(0, _BLOCK_K, gl.SliceLayout(0, _NARROW))[None, :]
        x = gl.where(first * _BLOCK_K + keys < length_k, x, _MINUS_INF_BITS)
        y = gl.where(second * _BLOCK_K + keys < length_k, y, _MINUS_INF_BITS)
    return x, y


@gluon.jit
def _softmax(scores, blocks, scales, largest, total, length_k):
    """P of a step, relative to the largest score so far, and how much that grew.

    largest: of each row; total: of what each thread holds of a row.
    """
    x, y = _split(scores, blocks, length_k)
    x_scale, y_scale = scales
    # Floats above zero have the order of their bits, and those of -inf are below them all.
    x_max = _thread_max(x).to(gl.float32, bitcast=True) - _MAGIC
    y_max = _thread_max(y).to(gl.float32, bitcast=True) - _MAGIC
    maxima = gl.maximum(x_max * _for_threads(x_scale, x_max), y_max * _for_threads(y_scale, y_max))
    new_largest = gl.maximum(largest, gl.convert_layout(gl.max(maxima, axis=1), _ROW))
    shift = new_largest - _LOG2_FP8_MAX
    x_shift, y_shift = _MAGIC * x_scale + shift, _MAGIC * y_scale + shift
    x, y = x.to(gl.float32, bitcast=True), y.to(gl.float32, bitcast=True)
    x = gl.exp2(x * x_scale[:, None] - x_shift[:, None])
    y = gl.exp2(y * y_scale[:, None] - y_shift[:, None])
    rescale = gl.exp2(largest - new_largest)
    total = total * _for_threads(rescale, total) + _thread_sum(x + y)
    return (_as_operand(x), _as_operand(y)), new_largest, total, rescale


@gluon.jit
def _joined(left, right):
    """The output of all channels."""
    out = gl.join(left, right).permute((0, 2, 1)).reshape((_ROWS, _D))
    return gl.convert_layout(out, _WIDE)


@gluon.jit
def _normalized(out, total, v_scale_ptr):
    """Rows without any key have a total of zero and stay zero."""
    total = gl.convert_layout(gl.sum(total, axis=1), _WIDE_ROW)
    inverse = 1 / gl.where(total > 0, total, 1.0)
    dims = gl.arange(0, _D, gl.SliceLayout(0, _WIDE))
    return out * inverse[:, None] * gl.load(v_scale_ptr + dims)[None, :]


@gluon.jit
def _add_linear_branch(out, q, means, ready, k_sum_ptr, bias_ptr, FEATURE_MAP: gl.constexpr):
    """As `linear_attention.triton.add_linear_branch`."""
    dims = gl.arange(0, _D, gl.SliceLayout(0, _FEATURES))
    k_sum = gl.load(k_sum_ptr + dims)[None, :]
    if FEATURE_MAP == "softmax":
        phi = gl.exp2((q - gl.max(q, axis=1)[:, None]) * _LOG2_E)
        # The division that softmax still lacks is made up for by multiplying eps instead.
        norm = gl.sum(phi * (k_sum + _EPS), axis=1)
    else:
        if FEATURE_MAP == "elu":
            phi = gl.where(q > 0, q + 1, gl.exp2(q * _LOG2_E))
        else:
            phi = gl.maximum(q, 0.0)
        norm = gl.sum(phi * k_sum, axis=1) + _EPS
    weights = (phi * k_sum * (1 / norm)[:, None]).to(means.dtype)
    mbarrier.wait(ready, 0)
    out = warpgroup_mma(weights, means, gl.convert_layout(out, _BRANCH), is_async=True)
    out = gl.convert_layout(warpgroup_mma_wait(0, deps=[out]), _WIDE)
    dims = gl.arange(0, _D, gl.SliceLayout(0, _WIDE))
    return out + gl.load(bias_ptr + dims)[None, :]


@gluon.jit
def _attention_kernel(
    q_ptr, k_desc, k_scale_ptr, v_desc, v_scale_ptr, out_ptr, indices_ptr, counts_ptr, width,
    means_desc, k_sum_ptr, bias_ptr, factor, stride_qb, stride_ql, stride_qh,
    length_q, length_k, heads, group, FEATURE_MAP: gl.constexpr,
):  # fmt: skip
    """Half a query block of a head. Programs side by side share it: its K and V stay in L2."""
    blocks_k, halves = gl.cdiv(length_k, _BLOCK_K), gl.cdiv(length_q, _ROWS)
    head, half = gl.program_id(0) // halves, gl.program_id(0) % halves
    kv_head = head // heads * (heads // group) + head % heads // group
    start = half * _ROWS
    q_ptr += (head // heads).to(gl.int64) * stride_qb
    q_ptr += (head % heads).to(gl.int64) * stride_qh + start.to(gl.int64) * stride_ql
    k_scale_ptr += kv_head * blocks_k
    count = blocks_k
    if indices_ptr is not None:
        map_row = head * gl.cdiv(length_q, _BLOCK_Q) + half // 2
        indices_ptr += map_row.to(gl.int64) * width
        count = width
        if counts_ptr is not None:
            count = gl.load(counts_ptr + map_row)
    steps = (count + 1) // 2

    memory = gl.allocate_shared_memory(gl.int8, [2, _KEYS, _D], k_desc.layout)
    k = memory.index(0)
    k_blocks = k._reinterpret(gl.int8, [2, _BLOCK_K, _D], k_desc.layout)
    v_blocks = memory.index(1)._reinterpret(v_desc.dtype, [2, _D, _BLOCK_K], v_desc.layout)
    q = gl.allocate_shared_memory(gl.int8, [_ROWS, _D], k_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    k_ready, v_ready, means_ready = ready.index(0), ready.index(1), ready.index(2)
    for i in gl.static_range(3):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()

    # Blocks are known two steps ahead and their scales one: neither is waited for.
    blocks = _blocks(indices_ptr, 0, count, blocks_k)
    next_blocks = _blocks(indices_ptr, 1, count, blocks_k)
    _copy(k_desc, blocks, blocks_k, kv_head, k_ready, k_blocks, steps > 0)
    _copy(v_desc, blocks, blocks_k, kv_head, v_ready, v_blocks, steps > 0)
    scales = _scales(k_scale_ptr, blocks, blocks_k)
    q_scale = _quantize_queries(q_ptr, start, length_q, stride_ql, q)
    q_scale = gl.convert_layout(q_scale * factor, _ROW)

    largest = gl.full((_ROWS,), float("-inf"), gl.float32, _ROW)
    total = _thread_sum(gl.zeros((_ROWS, _BLOCK_K), gl.float32, _NARROW))
    left = gl.zeros((_ROWS, _HALF_D), gl.float32, _NARROW)
    right = gl.zeros((_ROWS, _HALF_D), gl.float32, _NARROW)
    for step in range(steps):
        is_next = step + 1 < steps
        mbarrier.wait(k_ready, step & 1)
        scores = _multiply_scores(q, k)
        _copy(k_desc, next_blocks, blocks_k, kv_head, k_ready, k_blocks, is_next)
        later_blocks = _blocks(indices_ptr, step + 2, count, blocks_k)
        next_scales = _scales(k_scale_ptr, next_blocks, blocks_k)
        p, largest, total, rescale = _softmax(
            scores, blocks, (q_scale * scales[0], q_scale * scales[1]), largest, total, length_k
        )
        mbarrier.wait(v_ready, step & 1)
        left = left * rescale[:, None] + _multiply_values(p, v_blocks, 0)
        update = _multiply_values(p, v_blocks, 1)
        _copy(v_desc, next_blocks, blocks_k, kv_head, v_ready, v_blocks, is_next)
        right = right * rescale[:, None] + update
        blocks, scales, next_blocks = next_blocks, next_scales, later_blocks

    # K and V have been read: their place is free.
    means = memory
    if means_desc is not None:
        means = memory._reinterpret(means_desc.dtype, [_D, _D], means_desc.layout)
        mbarrier.expect(means_ready, means_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(means_desc, [head * _D, 0], means_ready, means)
    out = _normalized(_joined(left, right), total, v_scale_ptr + kv_head * _D)
    if means_desc is not None:
        q = _load_queries(q_ptr, start, length_q, stride_ql, _FEATURES)
        k_sum_ptr += head * _D
        out = _add_linear_branch(out, q, means, means_ready, k_sum_ptr, bias_ptr, FEATURE_MAP)
    row = (head // heads).to(gl.int64) * length_q + start
    rows = gl.arange(0, _ROWS, _WIDE_ROW)[:, None]
    dims = gl.arange(0, _D, gl.SliceLayout(0, _WIDE))[None, :]
    to = out_ptr + (row * heads + head % heads) * _D + (rows * (heads * _D) + dims)
    gl.store(to, out.to(out_ptr.dtype.element_ty), mask=start + rows < length_q)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    means: torch.Tensor | None,
    k_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    length_k: int,
    factor: float,
    feature_map: str,
) -> torch.Tensor:
    """Attention of q over quantised copies of K and V, as `triton.quantized_attention` has them.

    Args:
        q: (B,L,H,128) float16 or bfloat16.
        k, k_scale: int8 (B,Hkv,Mk,64,128) and float32 (B,Hkv,Mk).
        v, v_scale: fp8 (B,Hkv,Mk,128,64) and float32 (B,Hkv,128).
        indices, counts: int32 (B,H,Mq,N) and (B,H,Mq), for blocks of 128 queries, or None.
        means, k_sum, bias: of the linear branch, or None. All but q are contiguous.
        factor: that scores are multiplied by, log2(e) included.
    """
    batch, length_q, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    width = 0 if indices is None else indices.shape[-1]
    _attention_kernel[(batch * heads * triton.cdiv(length_q, ROWS),)](
        q, _described(k, (BLOCK_K, D)), k_scale, _described(v, (D, BLOCK_K)), v_scale, out,
        indices, counts, width,
        None if means is None else _described(means, (D, D)), k_sum, bias,
        factor, *q.stride()[:3], length_q, length_k, heads, heads // k.shape[1],
        FEATURE_MAP=feature_map, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out


def _described(x: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """x as rows of block[1] elements, read in tiles of `block`."""
    return TensorDescriptor.from_tensor(x.view(-1, block[1]), list(block), _layout(block, x.dtype))


@functools.cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _NAMES[dtype])


_NAMES = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
}
