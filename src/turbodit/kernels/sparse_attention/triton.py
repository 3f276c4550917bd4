"""Block-sparse attention on a GPU; `reference` says what is computed.

Where the time goes on a Hopper GPU, and what is done about it:
- Tensor cores wait for shared memory where a product is only 64 wide, so a step of the
  forward pass can take two kept key blocks side by side.
- Only the step with the ragged last key block, or with an odd one, needs a mask. It is taken
  last and apart, wherever that block stands in its row.
- Addresses need the next block's index: it is read a step ahead.
- dK and dV walk over the list of the query blocks that keep a key block, not over all of
  them. Of a head, key blocks that many keep come first, so that no long walk starts when all
  others end; heads stay together, for the cache.
- What dK and dV need of each query row, its log-sum-exp and rowsum(dO * O), is written by dQ,
  for whole blocks: only the ragged last one needs a mask.

Scores are in units of log2, for exp2. Statistics and sums are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turbodit.kernels.block_map.triton import inverse_indices
from turbodit.kernels.linear_attention.reference import EPS

_EPS = tl.constexpr(EPS)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FIND_CHUNK = tl.constexpr(128)

# One compiled kernel for all of them: nothing is gained from a length that 16 divides.
_SIZES = ["H", "Lq", "Lk", "width", "query_blocks"]


class Launch(NamedTuple):
    """How a kernel is launched; `step` is how much it takes at a time."""

    step: int  # one or two key blocks (forward, dQ), or query rows (dK and dV)
    num_warps: int
    num_stages: int


class Launches(NamedTuple):
    forward: Launch
    dq: Launch
    dkdv: Launch


# By head dimension and rows of a query block (of fewer than 64: as for 64, with a warp for 16
# rows). Hopper and data-centre Blackwell, compute capability 9 and 10, have more shared memory.
LARGE = {
    (64, 64): Launches(forward=Launch(2, 4, 2), dq=Launch(1, 4, 3), dkdv=Launch(64, 4, 3)),
    (64, 128): Launches(forward=Launch(2, 8, 2), dq=Launch(1, 8, 3), dkdv=Launch(64, 4, 3)),
    (128, 64): Launches(forward=Launch(1, 4, 2), dq=Launch(1, 4, 2), dkdv=Launch(64, 4, 2)),
    (128, 128): Launches(forward=Launch(2, 8, 2), dq=Launch(1, 8, 2), dkdv=Launch(64, 4, 2)),
}
SMALL = {
    (64, 64): Launches(forward=Launch(1, 4, 2), dq=Launch(1, 4, 2), dkdv=Launch(32, 4, 2)),
    (64, 128): Launches(forward=Launch(1, 4, 2), dq=Launch(1, 8, 2), dkdv=Launch(32, 4, 2)),
    (128, 64): Launches(forward=Launch(1, 4, 2), dq=Launch(1, 4, 1), dkdv=Launch(32, 4, 1)),
    (128, 128): Launches(forward=Launch(1, 8, 2), dq=Launch(1, 8, 1), dkdv=Launch(32, 4, 1)),
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
def _load(pointers, exists, MASKED: tl.constexpr):
    """A tile of rows, zeros where MASKED and a row does not exist."""
    return tl.load(pointers, exists[:, None], other=0.0) if MASKED else tl.load(pointers)


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
def _kept_blocks(
    indices_ptr, counts_ptr, row, width, Lk, BLOCK_K: tl.constexpr, BLOCKS_PER_STEP: tl.constexpr
):
    """Of a query block: its list, how long it is, the ragged block's place in it (the length if
    it is not there), and how many steps need no mask."""
    blocks_ptr = indices_ptr + row * width
    count = width
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)
    ragged = count
    if Lk % BLOCK_K != 0:
        ragged = _find(Lk // BLOCK_K, blocks_ptr, count)
    whole_steps = tl.where(ragged < count, count - 1, count) // BLOCKS_PER_STEP
    return blocks_ptr, count, ragged, whole_steps


@triton.jit
def _block_at(blocks_ptr, place, count, ragged):
    """The block at `place` of the list in which the ragged one has changed places with the last.

    0 past the end.
    """
    last = count - 1
    elsewhere = tl.where(place == last, tl.minimum(ragged, last), place)
    return tl.load(blocks_ptr + tl.where(place == ragged, last, elsewhere), place < count, other=0)


@triton.jit
def _step_blocks(blocks_ptr, step, count, ragged, BLOCKS_PER_STEP: tl.constexpr):
    """The one or two blocks of a step."""
    first = step * BLOCKS_PER_STEP
    second = first + BLOCKS_PER_STEP - 1
    return (
        _block_at(blocks_ptr, first, count, ragged),
        _block_at(blocks_ptr, second, count, ragged),
    )


@triton.jit
def _step_pointers(
    pointer, first, second, stride,
    BLOCK_K: tl.constexpr, BLOCKS_PER_STEP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """To the rows of a step's blocks."""
    first_start = first.to(tl.int64) * BLOCK_K * stride
    if BLOCKS_PER_STEP == 1:
        pointers = pointer + first_start + _offsets(stride, BLOCK_K, D)
    else:
        second_start = second.to(tl.int64) * BLOCK_K * stride
        places = tl.arange(0, 2 * BLOCK_K)
        start = tl.where(places < BLOCK_K, first_start, second_start)
        offsets = (places % BLOCK_K)[:, None] * stride + tl.arange(0, D)[None, :]
        pointers = pointer + start[:, None] + offsets
    return pointers


@triton.jit
def _step_exists(first, second, blocks, Lk, BLOCK_K: tl.constexpr, BLOCKS_PER_STEP: tl.constexpr):
    """Which rows of a step there are, if only the first `blocks` of its blocks are."""
    places = tl.arange(0, BLOCKS_PER_STEP * BLOCK_K)
    rows = tl.where(places < BLOCK_K, first, second) * BLOCK_K + places % BLOCK_K
    return (rows < Lk) & (places < blocks * BLOCK_K)


@triton.jit
def _attend(q, k_pointers, v_pointers, exists, scale, out, largest, total, MASKED: tl.constexpr):
    """One step of the online softmax: `out` and `total` are relative to exp2(largest)."""
    k = _load(k_pointers, exists, MASKED)
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where(exists[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, axis=1)
    v = _load(v_pointers, exists, MASKED)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
    return out, new_largest, total


@triton.jit
def _phi(q, largest, FEATURE_MAP: tl.constexpr):
    """The feature map of some columns of q, float32; softmax's without its division."""
    q = q.to(tl.float32)
    if FEATURE_MAP == "softmax":
        phi = tl.exp2((q - largest[:, None]) * _LOG2E)
    elif FEATURE_MAP == "elu":
        phi = tl.where(q > 0, q + 1, tl.exp2(q * _LOG2E))
    else:
        phi = tl.maximum(q, 0.0)
    return phi


@triton.jit
def add_linear_branch(
    out, q_ptr, stride_ql, exists, kv_ptr, k_sum_ptr, bias_ptr, FEATURE_MAP: tl.constexpr
):
    """out (rows, D) + phi(q) kv / (phi(q) . k_sum + eps) + bias, for the epilogue of a kernel.

    q_ptr is that of the first row, kv_ptr and k_sum_ptr are those of the head. Computed as
    w (kv / k_sum) with weights w_i = phi(q)_i k_sum_i / (phi(q) . k_sum + eps): these are at
    most 1, and the rows of kv / k_sum are means of values, so both fit in half precision however
    long the sequence. Some columns of q at a time: `out` fills the registers.
    """
    ROWS: tl.constexpr = out.shape[0]
    D: tl.constexpr = out.shape[1]
    CHUNK: tl.constexpr = 32 if D > 32 else D
    some = tl.arange(0, CHUNK)
    q_pointers = q_ptr + _offsets(stride_ql, ROWS, CHUNK)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    if FEATURE_MAP == "softmax":
        for start in tl.range(0, D, CHUNK, num_stages=1):
            q = _load(q_pointers + start, exists, True)
            largest = tl.maximum(largest, tl.max(q.to(tl.float32), axis=1))
    norm = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(0, D, CHUNK, num_stages=1):
        q = _load(q_pointers + start, exists, True)
        k_sum = tl.load(k_sum_ptr + start + some)
        # The division that softmax still lacks is made up for by multiplying eps instead.
        eps = _EPS if FEATURE_MAP == "softmax" else 0.0
        norm += tl.sum(_phi(q, largest, FEATURE_MAP) * (k_sum[None, :] + eps), axis=1)
    if FEATURE_MAP != "softmax":
        norm += _EPS
    for start in tl.range(0, D, CHUNK, num_stages=1):
        q = _load(q_pointers + start, exists, True)
        k_sum = tl.load(k_sum_ptr + start + some)
        kv = tl.load(kv_ptr + start * D + _offsets(D, CHUNK, D))
        means = kv / tl.where(k_sum > 0, k_sum, 1.0)[:, None]
        weights = _phi(q, largest, FEATURE_MAP) * (k_sum[None, :] / norm[:, None])
        out = tl.dot(weights.to(q.dtype), means.to(q.dtype), out)
    return out + tl.load(bias_ptr + tl.arange(0, D))[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, kv_ptr, k_sum_ptr, bias_ptr, out_ptr, lse_ptr,
    H, Lq, Lk, width, scale,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCKS_PER_STEP: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    query_block, head = tl.program_id(0), tl.program_id(1)
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    row = head.to(tl.int64) * tl.num_programs(0) + query_block
    blocks_ptr, count, ragged, whole_steps = _kept_blocks(
        indices_ptr, counts_ptr, row, width, Lk, BLOCK_K, BLOCKS_PER_STEP
    )
    query_start = query_block.to(tl.int64) * BLOCK_Q
    query_rows = query_start + tl.arange(0, BLOCK_Q)
    query_exists = query_rows < Lq
    q_ptr += query_start * stride_ql
    q = _load(q_ptr + _offsets(stride_ql, BLOCK_Q, D), query_exists, True)

    out = tl.zeros((BLOCK_Q, D), tl.float32)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    first, second = _step_blocks(blocks_ptr, 0, count, ragged, BLOCKS_PER_STEP)
    for step in range(whole_steps):
        k_pointers = _step_pointers(k_ptr, first, second, stride_kl, BLOCK_K, BLOCKS_PER_STEP, D)
        v_pointers = _step_pointers(v_ptr, first, second, stride_vl, BLOCK_K, BLOCKS_PER_STEP, D)
        first, second = _step_blocks(blocks_ptr, step + 1, count, ragged, BLOCKS_PER_STEP)
        out, largest, total = _attend(
            q, k_pointers, v_pointers, None, scale, out, largest, total, False
        )
    left = count - whole_steps * BLOCKS_PER_STEP
    if left > 0:
        k_pointers = _step_pointers(k_ptr, first, second, stride_kl, BLOCK_K, BLOCKS_PER_STEP, D)
        v_pointers = _step_pointers(v_ptr, first, second, stride_vl, BLOCK_K, BLOCKS_PER_STEP, D)
        exists = _step_exists(first, second, left, Lk, BLOCK_K, BLOCKS_PER_STEP)
        out, largest, total = _attend(
            q, k_pointers, v_pointers, exists, scale, out, largest, total, True
        )

    lse = (largest + tl.log2(total)) * _LN2
    tl.store(lse_ptr + head.to(tl.int64) * Lq + query_rows, lse, query_exists)
    # Without any key, total is 0 and so is out.
    out = out / tl.where(total == 0, 1.0, total)[:, None]
    if kv_ptr is not None:
        out = add_linear_branch(
            out, q_ptr, stride_ql, query_exists, kv_ptr + head.to(tl.int64) * D * D,
            k_sum_ptr + head * D, bias_ptr, FEATURE_MAP,
        )  # fmt: skip
    out_ptr = _head(out_ptr, head, H, stride_ob, stride_oh) + query_start * stride_ol
    offsets = _offsets(stride_ol, BLOCK_Q, D)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), query_exists[:, None])


@triton.jit
def _add_to_dq(
    q, grad, k_pointers, v_pointers, exists, scale, log2_sum, along_out, dq, MASKED: tl.constexpr
):
    """One step: dq += dS k, still without the scale."""
    k = _load(k_pointers, exists, MASKED)
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - log2_sum[:, None])
    if MASKED:
        weights = tl.where(exists[None, :], weights, 0.0)
    v = _load(v_pointers, exists, MASKED)
    grad_scores = weights * (tl.dot(grad, tl.trans(v)) - along_out[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=_SIZES)
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, indices_ptr, counts_ptr,
    log2_sum_ptr, along_out_ptr, dq_ptr,
    H, Lq, Lk, width, scale,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    stride_ob, stride_ol, stride_oh,
    stride_gb, stride_gl, stride_gh,
    stride_db, stride_dl, stride_dh,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCKS_PER_STEP: tl.constexpr,
):  # fmt: skip
    query_block, head = tl.program_id(0), tl.program_id(1)
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    out_ptr = _head(out_ptr, head, H, stride_ob, stride_oh)
    grad_ptr = _head(grad_ptr, head, H, stride_gb, stride_gh)
    row = head.to(tl.int64) * tl.num_programs(0) + query_block
    blocks_ptr, count, ragged, whole_steps = _kept_blocks(
        indices_ptr, counts_ptr, row, width, Lk, BLOCK_K, BLOCKS_PER_STEP
    )
    query_start = query_block.to(tl.int64) * BLOCK_Q
    query_rows = query_start + tl.arange(0, BLOCK_Q)
    query_exists = query_rows < Lq

    out_ptr += query_start * stride_ol
    out = _load(out_ptr + _offsets(stride_ol, BLOCK_Q, D), query_exists, True)
    grad_ptr += query_start * stride_gl
    grad = _load(grad_ptr + _offsets(stride_gl, BLOCK_Q, D), query_exists, True)
    along_out = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    # +inf makes the weights of rows past the end zero.
    lse = tl.load(lse_ptr + head.to(tl.int64) * Lq + query_rows, query_exists, other=float("inf"))
    log2_sum = lse * _LOG2E
    statistics = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    tl.store(log2_sum_ptr + statistics, log2_sum)
    tl.store(along_out_ptr + statistics, along_out)
    q_ptr += query_start * stride_ql
    q = _load(q_ptr + _offsets(stride_ql, BLOCK_Q, D), query_exists, True)

    dq = tl.zeros((BLOCK_Q, D), tl.float32)
    first, second = _step_blocks(blocks_ptr, 0, count, ragged, BLOCKS_PER_STEP)
    for step in range(whole_steps):
        k_pointers = _step_pointers(k_ptr, first, second, stride_kl, BLOCK_K, BLOCKS_PER_STEP, D)
        v_pointers = _step_pointers(v_ptr, first, second, stride_vl, BLOCK_K, BLOCKS_PER_STEP, D)
        first, second = _step_blocks(blocks_ptr, step + 1, count, ragged, BLOCKS_PER_STEP)
        dq = _add_to_dq(
            q, grad, k_pointers, v_pointers, None, scale, log2_sum, along_out, dq, False
        )
    left = count - whole_steps * BLOCKS_PER_STEP
    if left > 0:
        k_pointers = _step_pointers(k_ptr, first, second, stride_kl, BLOCK_K, BLOCKS_PER_STEP, D)
        v_pointers = _step_pointers(v_ptr, first, second, stride_vl, BLOCK_K, BLOCKS_PER_STEP, D)
        exists = _step_exists(first, second, left, Lk, BLOCK_K, BLOCKS_PER_STEP)
        dq = _add_to_dq(
            q, grad, k_pointers, v_pointers, exists, scale, log2_sum, along_out, dq, True
        )

    dq_ptr = _head(dq_ptr, head, H, stride_db, stride_dh) + query_start * stride_dl
    offsets = _offsets(stride_dl, BLOCK_Q, D)
    dq *= scale * _LN2
    tl.store(dq_ptr + offsets, dq.to(dq_ptr.dtype.element_ty), query_exists[:, None])


@triton.jit
def _add_to_dkdv(
    k, v, q_ptr, grad_ptr, log2_sum_ptr, along_out_ptr, stride_ql, stride_gl, start, Lq, scale,
    dk, dv, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """STEP queries from row `start` on: dv += P^T dO and dk += dS^T q, the latter without scale."""
    D: tl.constexpr = k.shape[1]
    rows = start + tl.arange(0, STEP)
    exists = rows < Lq
    q = _load(q_ptr + start.to(tl.int64) * stride_ql + _offsets(stride_ql, STEP, D), exists, MASKED)
    log2_sum = tl.load(log2_sum_ptr + rows)
    weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale - log2_sum[None, :])
    grad_pointers = grad_ptr + start.to(tl.int64) * stride_gl + _offsets(stride_gl, STEP, D)
    grad = _load(grad_pointers, exists, MASKED)
    dv = tl.dot(weights.to(grad.dtype), grad, dv)
    along_out = tl.load(along_out_ptr + rows)
    grad_scores = weights * (tl.dot(v, tl.trans(grad)) - along_out[None, :])
    dk = tl.dot(grad_scores.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=_SIZES)
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, log2_sum_ptr, along_out_ptr,
    keepers_ptr, counts_ptr, order_ptr, dk_ptr, dv_ptr,
    H, Lq, Lk, query_blocks, scale,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh,
    stride_db, stride_dl, stride_dh,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    key_blocks, head = tl.num_programs(0), tl.program_id(1).to(tl.int64)
    key_block = tl.load(order_ptr + head * key_blocks + tl.program_id(0))
    row = head * key_blocks + key_block
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    grad_ptr = _head(grad_ptr, head, H, stride_gb, stride_gh)
    log2_sum_ptr += head * query_blocks * BLOCK_Q
    along_out_ptr += head * query_blocks * BLOCK_Q
    keepers_ptr += row * query_blocks
    count = tl.load(counts_ptr + row)

    key_start = key_block * BLOCK_K
    key_exists = key_start + tl.arange(0, BLOCK_K) < Lk
    k_ptr += key_start * stride_kl
    k = _load(k_ptr + _offsets(stride_kl, BLOCK_K, D), key_exists, True)
    v_ptr += key_start * stride_vl
    v = _load(v_ptr + _offsets(stride_vl, BLOCK_K, D), key_exists, True)
    dk = tl.zeros((BLOCK_K, D), tl.float32)
    dv = tl.zeros((BLOCK_K, D), tl.float32)

    # A list is ascending, so the ragged last query block ends it.
    last = tl.load(keepers_ptr + count - 1, count > 0, other=-1)
    whole = tl.where((last + 1) * BLOCK_Q > Lq, count - 1, count)
    STEPS: tl.constexpr = BLOCK_Q // STEP
    query_block = tl.load(keepers_ptr)
    for step in range(whole * STEPS):
        start = query_block * BLOCK_Q + step % STEPS * STEP
        # The list has a place for every query block, so there is one to read ahead.
        query_block = tl.load(keepers_ptr + tl.minimum((step + 1) // STEPS, query_blocks - 1))
        dk, dv = _add_to_dkdv(
            k, v, q_ptr, grad_ptr, log2_sum_ptr, along_out_ptr, stride_ql, stride_gl, start, Lq,
            scale, dk, dv, STEP, False,
        )  # fmt: skip
    if whole < count:
        for step in tl.range(STEPS, num_stages=1):
            start = last * BLOCK_Q + step * STEP
            dk, dv = _add_to_dkdv(
                k, v, q_ptr, grad_ptr, log2_sum_ptr, along_out_ptr, stride_ql, stride_gl, start,
                Lq, scale, dk, dv, STEP, True,
            )  # fmt: skip

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
    kv: torch.Tensor | None = None,
    k_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    feature_map: str = "softmax",
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, dim = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)
    launch = _launches(q, block_q).forward
    _forward_kernel[(indices.shape[2], batch * heads)](
        q, k, v, indices.contiguous(), _contiguous(counts),
        _contiguous(kv), _contiguous(k_sum), _contiguous(bias), out, lse,
        heads, length, k.shape[1], indices.shape[3], scale * _LOG2E.value,
        *_strides(q, k, v, out),
        D=dim, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCKS_PER_STEP=launch.step,
        FEATURE_MAP=feature_map, num_warps=_warps(launch, block_q), num_stages=launch.num_stages,
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

    dq = q.new_empty(q.shape)
    # Of each row what dK and dV need of it, whole blocks long: no masks there.
    log2_sum, along_out = lse.new_empty(2, batch, heads, query_blocks * block_q).unbind()
    _dq_kernel[(query_blocks, batch * heads)](
        q, k, v, out, grad, lse, indices.contiguous(), _contiguous(counts), log2_sum, along_out, dq,
        heads, length, k.shape[1], indices.shape[3], scale_log2,
        *_strides(q, k, v, out, grad, dq),
        **sizes, BLOCKS_PER_STEP=launch_dq.step,
        num_warps=_warps(launch_dq, block_q), num_stages=launch_dq.num_stages,
    )  # fmt: skip

    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    keepers, keeper_counts = inverse_indices(indices, counts, key_blocks)
    order = keeper_counts.argsort(dim=-1, descending=True)
    _dkdv_kernel[(key_blocks, batch * heads)](
        q, k, v, grad, log2_sum, along_out, keepers, keeper_counts, order, dk, dv,
        heads, length, k.shape[1], query_blocks, scale_log2,
        *_strides(q, k, v, grad, dk),
        **sizes, STEP=min(launch_dkdv.step, block_q),
        num_warps=_warps(launch_dkdv, block_k), num_stages=launch_dkdv.num_stages,
    )  # fmt: skip
    return dq, dk, dv


def _launches(x: torch.Tensor, block_q: int) -> Launches:
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    table = LARGE if major in (9, 10) else SMALL
    return table[64 if x.shape[-1] <= 64 else 128, max(64, block_q)]


def _warps(launch: Launch, rows: int) -> int:
    """A matrix product takes 16 rows of a warp at least."""
    return min(launch.num_warps, rows // 16)


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Of batch, length and heads, for each of the tensors (B, L, H, D)."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
