"""A product of fp8 matrices that ends with GELU and fp8, for Hopper GPUs, in Triton's Gluon.

The first half of a feed-forward network in one kernel:

    h = gelu((x8 w8^T) s_x s_w + b)                       in its tanh form
    s = s_x max_j (s_w sum_k |w8|)_j + max_j |b_j| / 448,   values = e4m3(h / s)

The scale of a row is needed before the row is known. |x8| is at most 448, so by Hoelder's
inequality no |h_j| exceeds 448 s. The row's largest value would give a scale about a hundred times
smaller, with few large channels in x a thousand times. e4m3 keeps its precision over 15 powers of
two, of which this takes seven to eleven: the error of h grows from 2.6 to 2.7 %, and to 2.9 % where
one channel of 5,120 is 200 times as large as the others (Gaussian x and w).

Why it is as it is:

- A program takes tile after tile. One warp copies, through TMA, into a ring; two warpgroups make
  a tile together, each its own rows, both from the same weights. With a tile each they would ask
  two thirds more bytes of the L2 cache.
- Warpgroups take turns in what follows the sums: scales, bias, GELU, stores. So they stay that far
  apart, and the products of the other fill the tensor cores meanwhile.
- Of eight columns of sums side by side a thread has a pair. TMA puts the weights into shared memory
  in such an order that a thread's pairs are neighbours in the output. It stores its 16 columns as
  they are; they need not pass through shared memory.
- tanh is one instruction, right to 11 bits. fp8 tensor cores add with about 14, over all of K, as
  in torch._scaled_mm with fast accumulation.

Needs Triton 3.6.
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

from turbodit.kernels.quantized_linear.reference import LARGEST, TINY

WARPGROUPS = 2  # that compute
# Of a tile: rows of a warpgroup, columns, and inputs of a step.
ROWS, COLUMNS, K = 64, 256, 128
RUN = 64  # columns that four threads have side by side, 16 each
STAGES = 4  # of the ring
GROUP = 16  # tiles of M side by side
# Of a thread: computing, copying, and at the start, when all warps have as many.
REGISTERS = 240, 24, 168

_WARPGROUPS, _STAGES, _GROUP = (gl.constexpr(n) for n in (WARPGROUPS, STAGES, GROUP))
_ROWS, _COLUMNS, _K, _RUN = (gl.constexpr(n) for n in (ROWS, COLUMNS, K, RUN))
_LARGEST, _TINY = gl.constexpr(LARGEST["fp8-channel"]), gl.constexpr(TINY)
_SQRT_2_BY_PI = gl.constexpr(0.7978845608028654)
_CUBE = gl.constexpr(0.7978845608028654 * 0.044715)
_FLAT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
_COLUMN = gl.constexpr(gl.BlockedLayout([COLUMNS // 128], [32], [4], [0]))
# A thread's 16 columns in one piece, so that one instruction stores them.
_STORE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[ROWS, RUN],
    )
)
_SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32]))
_STORE_ROW = gl.constexpr(gl.SliceLayout(1, _STORE.value))
_STORE_COLUMN = gl.constexpr(gl.SliceLayout(0, _STORE.value))


@gluon.jit
def _place(tile, sizes):
    """First row and column of a tile: down the columns of GROUP tiles, then to the right."""
    M, N, _ = sizes
    tiles_m, tiles_n = gl.cdiv(M, _WARPGROUPS * _ROWS), gl.cdiv(N, _COLUMNS)
    group, place = tile // (_GROUP * tiles_n), tile % (_GROUP * tiles_n)
    height = gl.minimum(tiles_m - group * _GROUP, _GROUP)
    m = (group * _GROUP + place % height) * (_WARPGROUPS * _ROWS)
    return m, place // height * _COLUMNS


@gluon.jit
def _weight_place(n, k):
    """Where a tile of weights begins in the five dimensions of `_described_weight`."""
    return [n // _RUN, 0, 0, 0, k]


@gluon.jit
def _copy(descriptors, buffers, barriers, sizes, tiles):
    """The copying warp."""
    x_desc, w_desc = descriptors
    x, w, _, _ = buffers
    ready, empty, _ = barriers
    BYTES: gl.constexpr = _WARPGROUPS * x_desc.block_type.nbytes + w_desc.block_type.nbytes
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = _place(tile, sizes)
        for k in range(0, sizes[2], _K):
            stage, phase = count % _STAGES, count // _STAGES & 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            arrival = ready.index(stage)
            mbarrier.expect(arrival, BYTES)
            for i in gl.static_range(_WARPGROUPS):
                to = x.index(stage * _WARPGROUPS + i)
                tma.async_copy_global_to_shared(x_desc, [m + i * _ROWS, k], arrival, to)
            to = w.index(stage)
            tma.async_copy_global_to_shared(w_desc, _weight_place(n, k), arrival, to)
            count += 1


@gluon.jit
def _multiply(buffers, barriers, count, length_k, SELF: gl.constexpr):
    """A warpgroup's sums (ROWS, COLUMNS), and the number of steps so far."""
    x, w, _, _ = buffers
    ready, empty, _ = barriers
    sums = gl.zeros((_ROWS, _COLUMNS), gl.float32, _SUMS)
    for k in range(0, length_k, _K):
        stage, phase = count % _STAGES, count // _STAGES & 1
        mbarrier.wait(ready.index(stage), phase)
        rows = x.index(stage * _WARPGROUPS + SELF)
        columns = w.index(stage)._reinterpret(w.dtype, [_COLUMNS, _K], _FLAT).permute((1, 0))
        sums = warpgroup_mma(rows, columns, sums, use_acc=k > 0, is_async=True)
        # One product is always on its way; what the one before it has read is free.
        sums = warpgroup_mma_wait(1, deps=[sums])
        mbarrier.arrive(empty.index((count + _STAGES - 1) % _STAGES), count=1, pred=k > 0)
        count += 1
    sums = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(empty.index((count + _STAGES - 1) % _STAGES), count=1)
    return sums, count


@gluon.jit
def _halves(x):
    """Left and right half of the columns."""
    x = x.reshape((_ROWS, 2, x.shape[1] // 2)).permute((0, 2, 1))
    return x.split()


@gluon.jit
def _in_order(x):
    """(ROWS, RUN) columns as they lie in shared memory -> as they are in the output."""
    x = x.reshape((_ROWS, _RUN // 8, 4, 2)).permute((0, 2, 1, 3)).reshape((_ROWS, _RUN))
    return gl.convert_layout(x, _STORE, assert_trivial=True)


@gluon.jit
def _tanh(x):
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _gelu(x, half):
    """gelu(x) * 2 half"""
    inner = x * (_SQRT_2_BY_PI + _CUBE * (x * x))
    x *= half
    return x * _tanh(inner) + x


@gluon.jit
def _finish(sums, x_scale, w_scale, bias, half):
    """Sums of RUN columns -> their values; w_scale and bias are in shared memory."""
    w_scale, bias = w_scale.load(_STORE_COLUMN)[None, :], bias.load(_STORE_COLUMN)[None, :]
    return _gelu(sums * w_scale * x_scale + bias, half).to(gl.float8e4nv)


@gluon.jit
def _wait_for_turn(turns, turn, SELF: gl.constexpr):
    """The first warpgroup's first turn is there without a wait."""
    mbarrier.wait(turns.index(SELF), turn ^ 1 if SELF == 0 else turn)


@gluon.jit
def _compute(pointers, buffers, barriers, sizes, tiles, SELF: gl.constexpr):
    """One of the computing warpgroups."""
    x_scale_ptr, bound_ptr, w_scale_ptr, bias_ptr, out_ptr, scale_ptr = pointers
    _, _, tile_w_scale, tile_bias = buffers
    _, _, turns = barriers
    M, N, length_k = sizes
    weight_bound, bias_bound = gl.load(bound_ptr), gl.load(bound_ptr + 1)
    count, turn = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = _place(tile, sizes)
        m += SELF * _ROWS
        rows, columns = m + gl.arange(0, _ROWS, _STORE_ROW), n + gl.arange(0, _COLUMNS, _COLUMN)
        x_scale = gl.load(x_scale_ptr + rows, rows < M, other=0.0)
        w_scale = gl.load(w_scale_ptr + columns, columns < N, other=0.0)
        bias = gl.load(bias_ptr + columns, columns < N, other=0.0)
        sums, count = _multiply(buffers, barriers, count, length_k, SELF)
        bound = x_scale * _LARGEST * weight_bound + bias_bound
        scale = gl.where(bound < _TINY, 1.0, bound / _LARGEST)
        gl.store(scale_ptr + rows, scale, (rows < M) & (n == 0))
        half = 0.5 / scale

        _wait_for_turn(turns, turn, SELF)
        tile_w_scale.store(w_scale)
        tile_bias.store(bias.to(gl.float32))
        left, right = _halves(sums)
        pieces = _halves(left) + _halves(right)
        for i in gl.static_range(_COLUMNS // _RUN):
            values = _finish(
                _in_order(pieces[i]), x_scale[:, None], tile_w_scale.slice(i * _RUN, _RUN),
                tile_bias.slice(i * _RUN, _RUN), half[:, None],
            )  # fmt: skip
            places = n + i * _RUN + gl.arange(0, _RUN, _STORE_COLUMN)
            to = out_ptr + rows.to(gl.int64)[:, None] * N + places[None, :]
            gl.store(to, values, (rows < M)[:, None] & (places < N)[None, :])
        mbarrier.arrive(turns.index((SELF + 1) % _WARPGROUPS), count=1)
        turn ^= 1


@gluon.jit(do_not_specialize=["M", "tiles"])
def _gelu_linear_kernel(
    x_desc, w_desc, x_scale_ptr, bound_ptr, w_scale_ptr, bias_ptr, out_ptr, scale_ptr,
    M, N, length_k, tiles, COMPUTE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    x = gl.allocate_shared_memory(x_desc.dtype, [_STAGES * _WARPGROUPS, _ROWS, _K], x_desc.layout)
    tiles_of_w: gl.constexpr = [_STAGES] + w_desc.block_shape  # noqa: RUF005
    w = gl.allocate_shared_memory(w_desc.dtype, tiles_of_w, w_desc.layout)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_scale = gl.allocate_shared_memory(gl.float32, [_COLUMNS], vector)
    bias = gl.allocate_shared_memory(gl.float32, [_COLUMNS], vector)
    ready = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [_WARPGROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=_WARPGROUPS)
    for i in gl.static_range(_WARPGROUPS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    buffers, barriers, sizes = (x, w, w_scale, bias), (ready, empty, turns), (M, N, length_k)
    pointers = (x_scale_ptr, bound_ptr, w_scale_ptr, bias_ptr, out_ptr, scale_ptr)
    # The compiler knows constants only where they have a name.
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_compute, (pointers, buffers, barriers, sizes, tiles, FIRST)),
            (_compute, (pointers, buffers, barriers, sizes, tiles, SECOND)),
            (_copy, ((x_desc, w_desc), buffers, barriers, sizes, tiles)),
        ],
        [4, 1],
        [COMPUTE, COPY],
    )


def gelu_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    bound: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu(x weight^T + bias) in "fp8-channel": values (M,N) e4m3 and scale (M,1) float32.

    All is contiguous and on one device of compute capability 9.0; x and weight start at a multiple
    of 16 bytes; 16 divides K, 64 divides N.

    Args:
        x, x_scale: (M,K) e4m3 and (M,1) float32.
        weight, weight_scale: (N,K) e4m3 and (N,1) float32.
        bias: (N,), any floating dtype.
        bound: (2,) float32: the largest sum of magnitudes of a row of weight * weight_scale, and
            the largest magnitude of the bias.
    """
    (m, k), n = x.shape, len(weight)
    values, scale = x.new_empty(m, n), x_scale.new_empty(m, 1)
    if m == 0:
        return values, scale
    tiles = triton.cdiv(m, WARPGROUPS * ROWS) * triton.cdiv(n, COLUMNS)
    compute, copy, start = REGISTERS
    _gelu_linear_kernel[(min(tiles, _multiprocessors(x.device)),)](
        _described(x), _described_weight(weight),
        x_scale, bound, weight_scale, bias, values, scale, m, n, k, tiles,
        COMPUTE=compute, COPY=copy, num_warps=4, maxnreg=start,
    )  # fmt: skip
    return values, scale


def _described(x: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [ROWS, K], _layout(2))


def _described_weight(weight: torch.Tensor) -> TensorDescriptor:
    """(N,K) in five dimensions: rows of a run follow as 0 1, 16 17, 32 33, 48 49, 2 3, ..."""
    runs = weight.view(-1, 4, RUN // 8, 2, weight.shape[1]).transpose(1, 2)
    return TensorDescriptor.from_tensor(runs, [COLUMNS // RUN, RUN // 8, 4, 2, K], _layout(5))


@functools.cache
def _layout(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=rank)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
