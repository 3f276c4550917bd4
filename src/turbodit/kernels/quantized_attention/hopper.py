"""Quantised attention for Hopper GPUs, in Triton's Gluon: the same result as `triton`'s kernel.

For what SageSLA and Sage run most: D = 128, fp8 values, blocks of 128 queries and 64 keys. It
differs from the portable kernel in who does what at what time:

- One warp copies blocks of K and V through TMA into a ring of shared memory, STAGES ahead; two
  warpgroups of 64 query rows each compute. They share every block that is copied, so a tile of
  128 rows reads K and V half as often as two tiles of 64, which the L2 cache would bound.
- A step takes two key blocks, so the output is rescaled half as often. The next step's Q K^T
  runs beside P V.
- Over a block map, where tiles are short, as many programs as the GPU has multiprocessors walk
  over the tiles: the copies for the next tile come in while the last one is written. Dense
  tiles are long, and left to the GPU to hand out.
- int8 products are added onto integers that are the bits of the float 1.5 * 2^23. Their sums are
  the bits of floats already, and the softmax subtracts that number in its own multiplication:
  no conversion.

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
# Registers of a thread: computing, copying, and at the start, when all warps have as many.
COMPUTE, COPY, START = 240, 24, 168

_D, _BLOCK_Q, _BLOCK_K = gl.constexpr(D), gl.constexpr(BLOCK_Q), gl.constexpr(BLOCK_K)
_ROWS = gl.constexpr(64)  # of a warpgroup
_STAGES = gl.constexpr(4)  # steps of two blocks, a power of two
_LOG2_E = gl.constexpr(LOG2_E)
_LOG2_FP8_MAX = gl.constexpr(LOG2_FP8_MAX)
_EPS, _TINY, _INT8_MAX = gl.constexpr(EPS), gl.constexpr(TINY), gl.constexpr(INT8_MAX)
_MAGIC, _MAGIC_BITS = gl.constexpr(12582912.0), gl.constexpr(0x4B400000)
# What a warpgroup holds: scores of one block, the output, and operands of products with K, V
# and the linear branch.
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
_OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
_BRANCH = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
_QUERIES = gl.constexpr(gl.DotOperandLayout(0, _SCORES, 4))
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, _OUTPUT, 4))
_FEATURES = gl.constexpr(gl.DotOperandLayout(0, _BRANCH, 2))
_SCORE_ROWS = gl.constexpr(gl.SliceLayout(1, _SCORES))
_OUTPUT_ROWS = gl.constexpr(gl.SliceLayout(1, _OUTPUT))


@gluon.jit
def _kept(tile, indices_ptr, counts_ptr, width, blocks_k):
    """How many key blocks a tile sees."""
    count = blocks_k
    if indices_ptr is not None:
        count = width
        if counts_ptr is not None:
            count = gl.load(counts_ptr + tile)
    return count


@gluon.jit
def _block(indices_ptr, place, count, blocks_k):
    """The key block at a place of the list; past its end the one after the last of all."""
    block = place
    if indices_ptr is not None:
        block = gl.load(indices_ptr + place, mask=place < count, other=blocks_k)
    return block


@gluon.jit
def _block_and_scale(indices_ptr, scale_ptr, place, count, blocks_k):
    block = _block(indices_ptr, place, count, blocks_k)
    return block, gl.load(scale_ptr + block, mask=block < blocks_k, other=1.0)


@gluon.jit
def _copy(descriptors, lists, buffers, barriers, sizes):
    """The copying warp."""
    k_desc, v_desc, means_desc = descriptors
    indices_ptr, counts_ptr, width = lists
    tiles, tiles_q, heads, group, blocks_k, _, _ = sizes
    _, k_ring, v_ring, means = buffers
    k_ready, v_ready, empty, means_ready, means_empty = barriers
    done = 0  # steps of earlier tiles
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head = tile // tiles_q
        kv_head = head // heads * (heads // group) + head % heads // group
        count = _kept(tile, indices_ptr, counts_ptr, width, blocks_k)
        list_ptr = indices_ptr
        if indices_ptr is not None:
            list_ptr += gl.to_tensor(tile).to(gl.int64) * width
        steps = (count + 1) // 2
        for step in range(steps):
            stage, phase = (done + step) % _STAGES, (done + step) // _STAGES & 1
            # An odd list ends with a block that is copied twice and masked once.
            first, second = 2 * step, gl.minimum(2 * step + 1, count - 1)
            first = kv_head * blocks_k + _block(list_ptr, first, count, blocks_k)
            second = kv_head * blocks_k + _block(list_ptr, second, count, blocks_k)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            ready = k_ready.index(stage)
            mbarrier.expect(ready, 2 * k_desc.block_type.nbytes)
            at = k_ring.index(2 * stage)
            tma.async_copy_global_to_shared(k_desc, [first * _BLOCK_K, 0], ready, at)
            at = k_ring.index(2 * stage + 1)
            tma.async_copy_global_to_shared(k_desc, [second * _BLOCK_K, 0], ready, at)
            ready = v_ready.index(stage)
            mbarrier.expect(ready, 2 * v_desc.block_type.nbytes)
            at = v_ring.index(2 * stage)
            tma.async_copy_global_to_shared(v_desc, [first * _D, 0], ready, at)
            at = v_ring.index(2 * stage + 1)
            tma.async_copy_global_to_shared(v_desc, [second * _D, 0], ready, at)
        if means_desc is not None:
            mbarrier.wait(means_empty, (tile // gl.num_programs(0) & 1) ^ 1)
            mbarrier.expect(means_ready, means_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(means_desc, [head * _D, 0], means_ready, means)
        done += steps


@gluon.jit
def _to_int8(x):
    """The nearest integers of |x| <= 127."""
    return (x + _MAGIC).to(gl.int32, bitcast=True).to(gl.int8)


@gluon.jit
def _load_queries(q_ptr, start, length, stride, layout: gl.constexpr):
    """64 rows of q from `start` on, whose first q_ptr points at, float32, zeros past the end."""
    rows = gl.arange(0, _ROWS, gl.SliceLayout(1, layout))[:, None]
    dims = gl.arange(0, _D, gl.SliceLayout(0, layout))[None, :]
    q = gl.load(q_ptr + rows * stride + dims, mask=start + rows < length, other=0.0)
    return q.to(gl.float32)


@gluon.jit
def _multiply_scores(q, k_ring, stage):
    """Begins Q K^T of a step's two blocks, added onto _MAGIC_BITS."""
    onto = gl.full((_ROWS, _BLOCK_K), _MAGIC_BITS, gl.int32, _SCORES)
    k = k_ring.index(2 * stage).permute((1, 0))
    first = warpgroup_mma(q, k, onto, is_async=True)
    k = k_ring.index(2 * stage + 1).permute((1, 0))
    return first, warpgroup_mma(q, k, onto, is_async=True)


@gluon.jit
def _multiply_values(first, second, v_ring, stage):
    """Begins P V of a step's two blocks."""
    onto = gl.zeros((_ROWS, _D), gl.float32, _OUTPUT)
    v = v_ring.index(2 * stage).permute((1, 0))
    out = warpgroup_mma(first, v, onto, use_acc=False, is_async=True)
    v = v_ring.index(2 * stage + 1).permute((1, 0))
    return warpgroup_mma(second, v, out, is_async=True)


@gluon.jit
def _as_operand(p):
    """P of a block in fp8, its keys renumbered as `triton._pair_keys` says."""
    p = p.to(gl.float8e4nv).reshape((_ROWS, _BLOCK_K // 16, 2, 4, 2))
    p = p.permute((0, 1, 3, 2, 4)).reshape((_ROWS, _BLOCK_K))
    return gl.convert_layout(p, _WEIGHTS)


@gluon.jit
def _softmax(
    first, second, first_block, second_block, first_scale, second_scale, largest, total, length_k
):  # fmt: skip
    """P of a step's two blocks, relative to the largest score so far, and how much that grew."""
    x = first.to(gl.float32, bitcast=True)
    y = second.to(gl.float32, bitcast=True)
    if (gl.maximum(first_block, second_block) + 1) * _BLOCK_K > length_k:
        keys = gl.arange(0, _BLOCK_K, gl.SliceLayout(0, _SCORES))[None, :]
        x = gl.where(first_block * _BLOCK_K + keys < length_k, x, float("-inf"))
        y = gl.where(second_block * _BLOCK_K + keys < length_k, y, float("-inf"))
    new_largest = gl.maximum(
        (gl.max(x, axis=1) - _MAGIC) * first_scale, (gl.max(y, axis=1) - _MAGIC) * second_scale
    )
    new_largest = gl.maximum(largest, new_largest)
    shift = new_largest - _LOG2_FP8_MAX
    x_shift, y_shift = _MAGIC * first_scale + shift, _MAGIC * second_scale + shift
    p = gl.exp2(x * first_scale[:, None] - x_shift[:, None])
    r = gl.exp2(y * second_scale[:, None] - y_shift[:, None])
    rescale = gl.exp2(largest - new_largest)
    total = total * rescale + gl.sum(p + r, axis=1)
    return _as_operand(p), _as_operand(r), new_largest, total, rescale


@gluon.jit
def _add_linear_branch(
    out, q_ptr, start, length, stride, means, k_sum_ptr, bias_ptr, ready, phase,
    FEATURE_MAP: gl.constexpr,
):  # fmt: skip
    """As `linear_attention.triton.add_linear_branch`, for the rows of a warpgroup."""
    q = _load_queries(q_ptr, start, length, stride, _FEATURES)
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
    weights = (phi * k_sum * (1 / norm)[:, None]).to(q_ptr.dtype.element_ty)
    mbarrier.wait(ready, phase)
    out = warpgroup_mma(weights, means, gl.convert_layout(out, _BRANCH), is_async=True)
    out = gl.convert_layout(warpgroup_mma_wait(0, deps=[out]), _OUTPUT)
    dims = gl.arange(0, _D, gl.SliceLayout(0, _OUTPUT))
    return out + gl.load(bias_ptr + dims)[None, :]


@gluon.jit
def _compute(
    inputs, lists, linear, buffers, barriers, sizes, q_strides,
    WARPGROUP: gl.constexpr, FEATURE_MAP: gl.constexpr,
):  # fmt: skip
    """One of the two warpgroups."""
    q_ptr, k_scale_ptr, v_scale_ptr, out_ptr, factor = inputs
    indices_ptr, counts_ptr, width = lists
    k_sum_ptr, bias_ptr = linear
    tiles, tiles_q, heads, group, blocks_k, length_q, length_k = sizes
    stride_qb, stride_ql, stride_qh = q_strides
    q_rows, k_ring, v_ring, means = buffers
    k_ready, v_ready, empty, means_ready, means_empty = barriers
    q_int = q_rows.index(WARPGROUP)
    dims = gl.arange(0, _D, gl.SliceLayout(0, _OUTPUT))
    done = 0  # steps of earlier tiles
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head = tile // tiles_q
        kv_head = head // heads * (heads // group) + head % heads // group
        count = _kept(tile, indices_ptr, counts_ptr, width, blocks_k)
        list_ptr = indices_ptr
        if indices_ptr is not None:
            list_ptr += gl.to_tensor(tile).to(gl.int64) * width
        start = tile % tiles_q * _BLOCK_Q + WARPGROUP * _ROWS
        tile_ptr = q_ptr + (head // heads).to(gl.int64) * stride_qb
        tile_ptr += (head % heads).to(gl.int64) * stride_qh + start.to(gl.int64) * stride_ql
        scale_ptr = k_scale_ptr + kv_head * blocks_k

        q = _load_queries(tile_ptr, start, length_q, stride_ql, _QUERIES)
        q_scale = gl.maximum(gl.max(gl.abs(q), axis=1), _TINY) / _INT8_MAX
        q_int.store(_to_int8(q * (1 / q_scale)[:, None]))
        fence_async_shared()
        q_scale = gl.convert_layout(q_scale * factor, _SCORE_ROWS)

        largest = gl.full((_ROWS,), float("-inf"), gl.float32, _SCORE_ROWS)
        total = gl.zeros((_ROWS,), gl.float32, _SCORE_ROWS)
        out = gl.zeros((_ROWS, _D), gl.float32, _OUTPUT)
        steps = (count + 1) // 2
        if steps > 0:
            # Blocks are known two steps ahead and their scales one: neither is waited for.
            b0, scale0 = _block_and_scale(list_ptr, scale_ptr, 0, count, blocks_k)
            b1, scale1 = _block_and_scale(list_ptr, scale_ptr, 1, count, blocks_k)
            next0 = _block(list_ptr, 2, count, blocks_k)
            next1 = _block(list_ptr, 3, count, blocks_k)
            mbarrier.wait(k_ready.index(done % _STAGES), done // _STAGES & 1)
            s0, s1 = _multiply_scores(q_int, k_ring, done % _STAGES)
            s0, s1 = warpgroup_mma_wait(0, deps=[s0, s1])
            for step in range(steps):
                now = done + step
                stage, following = now % _STAGES, (now + 1) % _STAGES
                p0, p1, largest, total, rescale = _softmax(
                    s0, s1, b0, b1, q_scale * scale0, q_scale * scale1, largest, total, length_k
                )
                b0, b1 = next0, next1
                scale0 = gl.load(scale_ptr + b0, mask=b0 < blocks_k, other=1.0)
                scale1 = gl.load(scale_ptr + b1, mask=b1 < blocks_k, other=1.0)
                next0 = _block(list_ptr, 2 * step + 4, count, blocks_k)
                next1 = _block(list_ptr, 2 * step + 5, count, blocks_k)
                # After the last step these scores are of nothing, and nobody reads them.
                is_next = step + 1 < steps
                mbarrier.wait(v_ready.index(stage), now // _STAGES & 1)
                mbarrier.wait(k_ready.index(following), (now + 1) // _STAGES & 1, pred=is_next)
                s0, s1 = _multiply_scores(q_int, k_ring, following)
                update = _multiply_values(p0, p1, v_ring, stage)
                update, s0, s1 = warpgroup_mma_wait(0, deps=[update, s0, s1])
                mbarrier.arrive(empty.index(stage), count=1)
                out = out * gl.convert_layout(rescale, _OUTPUT_ROWS)[:, None] + update
            done += steps

        # Rows without any key have a total of zero and stay zero.
        inverse = gl.convert_layout(1 / gl.where(total > 0, total, 1.0), _OUTPUT_ROWS)
        v_scale = gl.load(v_scale_ptr + kv_head * _D + dims)
        out = out * inverse[:, None] * v_scale[None, :]
        if k_sum_ptr is not None:
            out = _add_linear_branch(
                out, tile_ptr, start, length_q, stride_ql, means, k_sum_ptr + head * _D, bias_ptr,
                means_ready, tile // gl.num_programs(0) & 1, FEATURE_MAP,
            )  # fmt: skip
            mbarrier.arrive(means_empty, count=1)
        row = (head // heads).to(gl.int64) * length_q + start
        rows = gl.arange(0, _ROWS, _OUTPUT_ROWS)[:, None]
        to = out_ptr + (row * heads + head % heads) * _D + (rows * (heads * _D) + dims[None, :])
        gl.store(to, out.to(out_ptr.dtype.element_ty), mask=start + rows < length_q)


@gluon.jit
def _attention_kernel(
    q_ptr, k_desc, k_scale_ptr, v_desc, v_scale_ptr, out_ptr, indices_ptr, counts_ptr, width,
    means_desc, k_sum_ptr, bias_ptr, factor, stride_qb, stride_ql, stride_qh,
    length_q, length_k, heads, group, tiles,
    COMPUTE: gl.constexpr, COPY: gl.constexpr, FEATURE_MAP: gl.constexpr,
):  # fmt: skip
    """A run of tiles: every gl.num_programs(0)-th one."""
    blocks_k, tiles_q = gl.cdiv(length_k, _BLOCK_K), gl.cdiv(length_q, _BLOCK_Q)
    q_rows = gl.allocate_shared_memory(gl.int8, [2, _ROWS, _D], k_desc.layout)
    k_ring = gl.allocate_shared_memory(gl.int8, [2 * _STAGES, _BLOCK_K, _D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [2 * _STAGES, _D, _BLOCK_K], v_desc.layout)
    means = q_rows
    if means_desc is not None:
        means = gl.allocate_shared_memory(means_desc.dtype, [_D, _D], means_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    means_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    means_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both warpgroups
    mbarrier.init(means_ready, count=1)
    mbarrier.init(means_empty, count=2)
    fence_async_shared()

    buffers = (q_rows, k_ring, v_ring, means)
    barriers = (k_ready, v_ready, empty, means_ready, means_empty)
    descriptors = (k_desc, v_desc, means_desc)
    inputs = (q_ptr, k_scale_ptr, v_scale_ptr, out_ptr, factor)
    lists = (indices_ptr, counts_ptr, width)
    linear = (k_sum_ptr, bias_ptr)
    sizes = (tiles, tiles_q, heads, group, blocks_k, length_q, length_k)
    q_strides = (stride_qb, stride_ql, stride_qh)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                _compute,
                (inputs, lists, linear, buffers, barriers, sizes, q_strides, FIRST, FEATURE_MAP),
            ),
            (
                _compute,
                (inputs, lists, linear, buffers, barriers, sizes, q_strides, SECOND, FEATURE_MAP),
            ),
            (_copy, (descriptors, lists, buffers, barriers, sizes)),
        ],
        [4, 1],
        [COMPUTE, COPY],
    )


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
    tiles = batch * heads * triton.cdiv(length_q, BLOCK_Q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    programs = tiles
    if indices is not None:
        programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    _attention_kernel[(programs,)](
        q, _described(k, (BLOCK_K, D)), k_scale, _described(v, (D, BLOCK_K)), v_scale, out,
        indices, counts, 0 if indices is None else indices.shape[-1],
        None if means is None else _described(means, (D, D)), k_sum, bias,
        factor, *q.stride()[:3], length_q, length_k, heads, heads // k.shape[1], tiles,
        COMPUTE=COMPUTE, COPY=COPY, FEATURE_MAP=feature_map, num_warps=4, maxnreg=START,
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
