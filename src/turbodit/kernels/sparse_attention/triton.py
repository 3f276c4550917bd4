"""Block-sparse attention on a GPU; `reference` says what is computed.

Where the time goes on a Hopper GPU, and what is done about it:
- The tiles that a loop reads come through TMA, where the GPU has it and the tensors' strides
  suit it. It takes no registers for addresses, so two programs fit on a multiprocessor: one
  multiplies while the other takes exponentials. Elsewhere they come through pointers.
- A tile of 128 query rows reads K and V half as often as two of 64, which the L2 cache bounds.
- Only the step with the ragged last key block needs a mask. It is taken last and apart,
  wherever that block stands in its row.
- Addresses need the next block's index: it is read a step ahead.
- dK and dV walk over the list of the query blocks that keep a key block, not over all of
  them. Of a head, key blocks that many keep come first, so that no long walk starts when all
  others end; heads stay together, for the cache.
- What dK and dV need of each query row, its log-sum-exp and rowsum(dO * O), is written by dQ,
  for whole blocks: no step needs a mask.

Scores are in units of log2, for exp2. Statistics and sums are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turbodit.kernels import LOG2_E
from turbodit.kernels.block_map.triton import inverse_indices
from turbodit.kernels.linear_attention.triton import add_linear_branch
from turbodit.kernels.tma import TensorDescriptor, can_describe, is_large, strides, tiles

_LOG2E = tl.constexpr(LOG2_E)
_LN2 = tl.constexpr(1 / LOG2_E)
_FIND_CHUNK = tl.constexpr(128)

# One compiled kernel for all of them: nothing is gained from a length that 16 divides.
_SIZES = ["H", "Lq", "Lk", "width", "query_blocks"]


class Launch(NamedTuple):
    """How a kernel is launched."""

    num_warps: int
    num_stages: int
    step: int = 64  # query rows that dK and dV take at a time
    registers: int | None = None  # of a thread, at most


class Launches(NamedTuple):
    forward: Launch
    dq: Launch
    dkdv: Launch


# By head dimension and rows of a query block (of fewer than 64: as for 64, with a warp for 16
# rows). Hopper and data-centre Blackwell, compute capability 9 and 10, have more shared memory.
LARGE = {
    (64, 64): Launches(forward=Launch(4, 3), dq=Launch(4, 3), dkdv=Launch(4, 3)),
    (64, 128): Launches(forward=Launch(4, 3), dq=Launch(8, 3), dkdv=Launch(4, 3)),
    (128, 64): Launches(forward=Launch(4, 3), dq=Launch(4, 2), dkdv=Launch(4, 2)),
    (128, 128): Launches(forward=Launch(8, 2, registers=128), dq=Launch(8, 3), dkdv=Launch(4, 2)),
}
SMALL = {
    (64, 64): Launches(forward=Launch(4, 2), dq=Launch(4, 2), dkdv=Launch(4, 2, 32)),
    (64, 128): Launches(forward=Launch(4, 2), dq=Launch(8, 2), dkdv=Launch(4, 2, 32)),
    (128, 64): Launches(forward=Launch(4, 2), dq=Launch(4, 1), dkdv=Launch(4, 1, 32)),
    (128, 128): Launches(forward=Launch(8, 2), dq=Launch(8, 1), dkdv=Launch(4, 1, 32)),
}


@triton.jit
def _head(pointer, head, H, stride_b, stride_h):
    """Where head `head` of B * H begins."""
    return pointer + (head // H).to(tl.int64) * stride_b + (head % H).to(tl.int64) * stride_h


@triton.jit
def _offsets(stride, BLOCK: tl.constexpr, D: tl.constexpr):
    """Of BLOCK rows from a pointer on: 32 bits, and the same in every step."""
    return tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def _load(pointers, exists):
    """A tile of rows, zeros where a row does not exist."""
    return tl.load(pointers, exists[:, None], other=0.0)


@triton.jit
def _rows(
    x, batch, head, start, length, stride, BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr
):
    """BLOCK rows of a head from row `start` on, zeros past the end.

    x: with TMA a descriptor of all heads, else a pointer to this one's first row.
    """
    if TMA:
        rows = x.load([batch, head, start, 0]).reshape(BLOCK, D)
    else:
        pointers = x + start.to(tl.int64) * stride + _offsets(stride, BLOCK, D)
        rows = _load(pointers, start + tl.arange(0, BLOCK) < length)
    return rows


@triton.jit
def _find(wanted, blocks_ptr, count):
    """Where `wanted` stands among `count` blocks; `count` if nowhere."""
    place = count
    for start in range(0, count, _FIND_CHUNK):
        places = start + tl.arange(0, _FIND_CHUNK)
        blocks = tl.load(blocks_ptr + places, places < count, other=-1)
        place = tl.minimum(place, tl.min(tl.where(blocks == wanted, places, count), axis=0))
    return place


@triton.jit
def _kept_blocks(indices_ptr, counts_ptr, row, width, Lk, BLOCK_K: tl.constexpr):
    """Of a query block: its list, how long it is, the ragged block's place in it (the length if
    it is not there), and how many blocks need no mask."""
    blocks_ptr = indices_ptr + row * width
    count = width
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)
    ragged = count
    if Lk % BLOCK_K != 0:
        ragged = _find(Lk // BLOCK_K, blocks_ptr, count)
    whole = tl.where(ragged < count, count - 1, count)
    return blocks_ptr, count, ragged, whole


@triton.jit
def _block_at(blocks_ptr, place, count, ragged):
    """The block at `place` of the list in which the ragged one has changed places with the last.

    0 past the end.
    """
    last = count - 1
    elsewhere = tl.where(place == last, tl.minimum(ragged, last), place)
    return tl.load(blocks_ptr + tl.where(place == ragged, last, elsewhere), place < count, other=0)


@triton.jit
def _attend(q, k, v, exists, scale, out, largest, total, MASKED: tl.constexpr):
    """One step of the online softmax: `out` and `total` are relative to exp2(largest)."""
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where(exists[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
    return out, new_largest, total


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q_ptr, k, v, indices_ptr, counts_ptr, means_ptr, k_sum_ptr, bias_ptr, out_ptr, lse_ptr,
    H, Lq, Lk, width, scale,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    query_block, head = tl.program_id(0), tl.program_id(1)
    batch, within = head // H, head % H
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    if not TMA:
        k = _head(k, head, H, stride_kb, stride_kh)
        v = _head(v, head, H, stride_vb, stride_vh)
    row = head.to(tl.int64) * tl.num_programs(0) + query_block
    blocks_ptr, count, ragged, whole = _kept_blocks(
        indices_ptr, counts_ptr, row, width, Lk, BLOCK_K
    )
    query_start = query_block.to(tl.int64) * BLOCK_Q
    query_rows = query_start + tl.arange(0, BLOCK_Q)
    query_exists = query_rows < Lq
    q_ptr += query_start * stride_ql
    q = _load(q_ptr + _offsets(stride_ql, BLOCK_Q, D), query_exists)

    out = tl.zeros((BLOCK_Q, D), tl.float32)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    block = _block_at(blocks_ptr, 0, count, ragged)
    for place in range(whole):
        start = block * BLOCK_K
        block = _block_at(blocks_ptr, place + 1, count, ragged)
        k_rows = _rows(k, batch, within, start, Lk, stride_kl, BLOCK_K, D, TMA)
        v_rows = _rows(v, batch, within, start, Lk, stride_vl, BLOCK_K, D, TMA)
        out, largest, total = _attend(q, k_rows, v_rows, None, scale, out, largest, total, False)
    if whole < count:
        start = block * BLOCK_K
        exists = start + tl.arange(0, BLOCK_K) < Lk
        k_rows = _rows(k, batch, within, start, Lk, stride_kl, BLOCK_K, D, TMA)
        v_rows = _rows(v, batch, within, start, Lk, stride_vl, BLOCK_K, D, TMA)
        out, largest, total = _attend(q, k_rows, v_rows, exists, scale, out, largest, total, True)

    lse = (largest + tl.log2(total)) * _LN2
    tl.store(lse_ptr + head.to(tl.int64) * Lq + query_rows, lse, query_exists)
    # Without any key, total is 0 and so is out.
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    if means_ptr is not None:
        out = add_linear_branch(
            out, q_ptr, stride_ql, query_exists, means_ptr + head.to(tl.int64) * D * D,
            k_sum_ptr + head * D, bias_ptr, FEATURE_MAP,
        )  # fmt: skip
    out_ptr = _head(out_ptr, head, H, stride_ob, stride_oh) + query_start * stride_ol
    offsets = _offsets(stride_ol, BLOCK_Q, D)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), query_exists[:, None])


@triton.jit
def _add_to_dq(q, grad, k, v, exists, scale, log2_sum, along_out, dq, MASKED: tl.constexpr):
    """One step: dq += dS k, still without the scale."""
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - log2_sum[:, None])
    if MASKED:
        weights = tl.where(exists[None, :], weights, 0.0)
    grad_scores = weights * (tl.dot(grad, tl.trans(v)) - along_out[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=_SIZES)
def _dq_kernel(
    q_ptr, k, v, out_ptr, grad_ptr, lse_ptr, indices_ptr, counts_ptr,
    log2_sum_ptr, along_out_ptr, dq_ptr,
    H, Lq, Lk, width, scale,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh,
    stride_gb, stride_gl, stride_gh,
    stride_db, stride_dl, stride_dh,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    query_block, head = tl.program_id(0), tl.program_id(1)
    batch, within = head // H, head % H
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    if not TMA:
        k = _head(k, head, H, stride_kb, stride_kh)
        v = _head(v, head, H, stride_vb, stride_vh)
    out_ptr = _head(out_ptr, head, H, stride_ob, stride_oh)
    grad_ptr = _head(grad_ptr, head, H, stride_gb, stride_gh)
    row = head.to(tl.int64) * tl.num_programs(0) + query_block
    blocks_ptr, count, ragged, whole = _kept_blocks(
        indices_ptr, counts_ptr, row, width, Lk, BLOCK_K
    )
    query_start = query_block.to(tl.int64) * BLOCK_Q
    query_rows = query_start + tl.arange(0, BLOCK_Q)
    query_exists = query_rows < Lq

    out_ptr += query_start * stride_ol
    out = _load(out_ptr + _offsets(stride_ol, BLOCK_Q, D), query_exists)
    grad_ptr += query_start * stride_gl
    grad = _load(grad_ptr + _offsets(stride_gl, BLOCK_Q, D), query_exists)
    along_out = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    # +inf makes the weights of rows past the end zero.
    lse = tl.load(lse_ptr + head.to(tl.int64) * Lq + query_rows, query_exists, other=float("inf"))
    log2_sum = lse * _LOG2E
    statistics = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    tl.store(log2_sum_ptr + statistics, log2_sum)
    tl.store(along_out_ptr + statistics, along_out)
    q_ptr += query_start * stride_ql
    q = _load(q_ptr + _offsets(stride_ql, BLOCK_Q, D), query_exists)

    dq = tl.zeros((BLOCK_Q, D), tl.float32)
    block = _block_at(blocks_ptr, 0, count, ragged)
    for place in range(whole):
        start = block * BLOCK_K
        block = _block_at(blocks_ptr, place + 1, count, ragged)
        k_rows = _rows(k, batch, within, start, Lk, stride_kl, BLOCK_K, D, TMA)
        v_rows = _rows(v, batch, within, start, Lk, stride_vl, BLOCK_K, D, TMA)
        dq = _add_to_dq(q, grad, k_rows, v_rows, None, scale, log2_sum, along_out, dq, False)
    if whole < count:
        start = block * BLOCK_K
        exists = start + tl.arange(0, BLOCK_K) < Lk
        k_rows = _rows(k, batch, within, start, Lk, stride_kl, BLOCK_K, D, TMA)
        v_rows = _rows(v, batch, within, start, Lk, stride_vl, BLOCK_K, D, TMA)
        dq = _add_to_dq(q, grad, k_rows, v_rows, exists, scale, log2_sum, along_out, dq, True)

    dq_ptr = _head(dq_ptr, head, H, stride_db, stride_dh) + query_start * stride_dl
    offsets = _offsets(stride_dl, BLOCK_Q, D)
    dq *= scale * _LN2
    tl.store(dq_ptr + offsets, dq.to(dq_ptr.dtype.element_ty), query_exists[:, None])


@triton.jit
def _add_to_dkdv(k, v, q, grad, log2_sum, along_out, scale, dk, dv):
    """Some queries: dv += P^T dO and dk += dS^T q, the latter without the scale.

    dP comes before the sum that needs P: exp2 and that product then run at the same time.
    """
    scores = tl.dot(k, tl.trans(q))
    weights = tl.exp2(scores * scale - log2_sum[None, :])
    grad_weights = tl.dot(v, tl.trans(grad))
    dv = tl.dot(weights.to(grad.dtype), grad, dv)
    grad_scores = weights * (grad_weights - along_out[None, :])
    dk = tl.dot(grad_scores.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=_SIZES)
def _dkdv_kernel(
    q, k_ptr, v_ptr, grad, log2_sum, along_out,
    keepers_ptr, counts_ptr, order_ptr, dk_ptr, dv_ptr,
    H, Lq, Lk, query_blocks, scale,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh,
    stride_db, stride_dl, stride_dh,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    key_blocks, head = tl.num_programs(0), tl.program_id(1).to(tl.int64)
    batch, within = tl.program_id(1) // H, tl.program_id(1) % H
    key_block = tl.load(order_ptr + head * key_blocks + tl.program_id(0))
    row = head * key_blocks + key_block
    if not TMA:
        q = _head(q, head, H, stride_qb, stride_qh)
        grad = _head(grad, head, H, stride_gb, stride_gh)
        log2_sum += head * query_blocks * BLOCK_Q
        along_out += head * query_blocks * BLOCK_Q
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    keepers_ptr += row * query_blocks
    count = tl.load(counts_ptr + row)

    key_start = key_block * BLOCK_K
    key_exists = key_start + tl.arange(0, BLOCK_K) < Lk
    k_ptr += key_start * stride_kl
    k = _load(k_ptr + _offsets(stride_kl, BLOCK_K, D), key_exists)
    v_ptr += key_start * stride_vl
    v = _load(v_ptr + _offsets(stride_vl, BLOCK_K, D), key_exists)
    dk = tl.zeros((BLOCK_K, D), tl.float32)
    dv = tl.zeros((BLOCK_K, D), tl.float32)

    # Past the last query q, dO and, its log2_sum being +inf, P are 0: no masks.
    STEPS: tl.constexpr = BLOCK_Q // STEP
    query_block = tl.load(keepers_ptr)
    for step in range(count * STEPS):
        start = query_block * BLOCK_Q + step % STEPS * STEP
        # The list has a place for every query block, so there is one to read ahead.
        query_block = tl.load(keepers_ptr + tl.minimum((step + 1) // STEPS, query_blocks - 1))
        q_rows = _rows(q, batch, within, start, Lq, stride_ql, STEP, D, TMA)
        grad_rows = _rows(grad, batch, within, start, Lq, stride_gl, STEP, D, TMA)
        if TMA:
            sums = log2_sum.load([tl.program_id(1), start]).reshape(STEP)
            along = along_out.load([tl.program_id(1), start]).reshape(STEP)
        else:
            sums = tl.load(log2_sum + start + tl.arange(0, STEP))
            along = tl.load(along_out + start + tl.arange(0, STEP))
        dk, dv = _add_to_dkdv(k, v, q_rows, grad_rows, sums, along, scale, dk, dv)

    dk_ptr = _head(dk_ptr, head, H, stride_db, stride_dh) + key_start * stride_dl
    dv_ptr = _head(dv_ptr, head, H, stride_db, stride_dh) + key_start * stride_dl
    offsets = _offsets(stride_dl, BLOCK_K, D)
    dk *= scale * _LN2
    tl.store(dk_ptr + offsets, dk.to(dk_ptr.dtype.element_ty), key_exists[:, None])
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), key_exists[:, None])


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    means: torch.Tensor | None = None,
    k_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    feature_map: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, dim = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)
    launch = _launches(q, block_q).forward
    tma = can_describe(k, v)
    _forward_kernel[(indices.shape[2], batch * heads)](
        q, *tiles(block_k, tma, k, v), indices.contiguous(), _contiguous(counts),
        _contiguous(means), _contiguous(k_sum), _contiguous(bias), out, lse,
        heads, length, k.shape[1], indices.shape[3], scale * _LOG2E.value,
        *strides(q, k, v, out),
        D=dim, BLOCK_Q=block_q, BLOCK_K=block_k, TMA=tma,
        FEATURE_MAP=feature_map, **_options(launch, block_q),
    )  # fmt: skip
    return out, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, heads, dim = q.shape
    query_blocks, key_blocks = indices.shape[2], triton.cdiv(k.shape[1], block_k)
    # The gradient of a sum is one number in all places: no rows to read.
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    _, launch_dq, launch_dkdv = _launches(q, block_q)
    sizes = {"D": dim, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    scale_log2 = scale * _LOG2E.value

    tma = can_describe(k, v)
    dq = q.new_empty(q.shape)
    # Of each row what dK and dV need of it, whole blocks long: no masks there.
    log2_sum, along_out = lse.new_empty(2, batch, heads, query_blocks * block_q).unbind()
    _dq_kernel[(query_blocks, batch * heads)](
        q, *tiles(block_k, tma, k, v), out, grad, lse, indices.contiguous(), _contiguous(counts),
        log2_sum, along_out, dq,
        heads, length, k.shape[1], indices.shape[3], scale_log2,
        *strides(q, k, v, out, grad, dq),
        **sizes, TMA=tma, **_options(launch_dq, block_q),
    )  # fmt: skip

    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    keepers, keeper_counts = inverse_indices(indices, counts, key_blocks)
    order = keeper_counts.argsort(dim=-1, descending=True)
    step = min(launch_dkdv.step, block_q)
    # TMA writes to multiples of 128 bytes: of a row's statistics, 32.
    tma = step >= 32 and can_describe(q, grad)
    q_tiles, grad_tiles = tiles(step, tma, q, grad)
    statistics = [log2_sum, along_out]
    if tma:
        statistics = [TensorDescriptor.from_tensor(x.flatten(0, 1), [1, step]) for x in statistics]
    _dkdv_kernel[(key_blocks, batch * heads)](
        q_tiles, k, v, grad_tiles, *statistics, keepers, keeper_counts, order, dk, dv,
        heads, length, k.shape[1], query_blocks, scale_log2,
        *strides(q, k, v, grad, dk),
        **sizes, STEP=step, TMA=tma, **_options(launch_dkdv, block_k),
    )  # fmt: skip
    return dq, dk, dv


def _launches(x: torch.Tensor, block_q: int) -> Launches:
    table = LARGE if is_large(x) else SMALL
    return table[64 if x.shape[-1] <= 64 else 128, max(64, block_q)]


def _options(launch: Launch, rows: int) -> dict[str, int | None]:
    # A matrix product takes 16 rows of a warp at least.
    num_warps = min(launch.num_warps, rows // 16)
    registers = launch.registers if num_warps == launch.num_warps else None
    return {"num_warps": num_warps, "num_stages": launch.num_stages, "maxnreg": registers}


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
