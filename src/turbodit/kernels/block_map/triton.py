"""The block map on a GPU; `reference` says what is computed.

Selecting needs no sort. Scores become integers that order as they do, and halving the range of
a row finds the largest integer that enough of the row reaches: at most 32 counts (or sums of
weights) of a row held in registers, and for counts about half as many, as they may stop where
exactly the wanted number is left. What is kept is then written in ascending order. A program
has one row, and if it can one warp, so that all of this passes through registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WARP_ELEMENTS = 512  # of a row that a warp holds in registers
_LOWEST = tl.constexpr(-0x80000000)


@triton.jit
def _rows_of_block(
    x_ptr, H, length, stride_b, stride_l, stride_h, D: tl.constexpr, BLOCK: tl.constexpr
):
    """The program's block of rows, float32 with zeros past the end, and how many there are."""
    head, start = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK
    x_ptr += (head // H).to(tl.int64) * stride_b + (head % H) * stride_h + start * stride_l
    rows = tl.arange(0, BLOCK)
    count = tl.minimum(length - start, BLOCK).to(tl.int32)
    offsets = rows[:, None] * stride_l + tl.arange(0, D)[None, :]
    return tl.load(x_ptr + offsets, rows[:, None] < count, other=0.0).to(tl.float32), count


@triton.jit
def _pool_kernel(
    x_ptr, pooled_ptr, H, length, stride_b, stride_l, stride_h,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x, count = _rows_of_block(x_ptr, H, length, stride_b, stride_l, stride_h, D, BLOCK)
    out = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(pooled_ptr + out * D + tl.arange(0, D), tl.sum(x, axis=0) / count)


@triton.jit
def _self_similarity_kernel(
    x_ptr, mean_ptr, similarity_ptr, H, length, stride_b, stride_l, stride_h,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x, count = _rows_of_block(x_ptr, H, length, stride_b, stride_l, stride_h, D, BLOCK)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + tl.program_id(0) * D + tl.arange(0, D))
        x = tl.where(tl.arange(0, BLOCK)[:, None] < count, x - mean[None, :], 0.0)
    norm = tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True))
    direction = tl.sum(x / tl.maximum(norm, 1e-12), axis=0) / count
    out = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(similarity_ptr + out, tl.sum(direction * direction, axis=0))


@triton.jit
def _ordered_bits(x):
    """int32 that orders as the float32 x does; -0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _row(values_ptr, row, key_blocks, COLUMNS: tl.constexpr):
    """A row's values, their `_ordered_bits` (lowest past its end), columns and which exist."""
    columns = tl.arange(0, COLUMNS)
    inside = columns < key_blocks
    values = tl.load(values_ptr + row * key_blocks + columns, inside, other=0.0)
    return values, tl.where(inside, _ordered_bits(values), _LOWEST), columns, inside


@triton.jit
def _largest_reached(bits, inside, weights, total, target, enough):
    """(The largest t for which the weights with bits >= t reach `target`, their sum).

    The smallest of the bits, with the sum `total` of all, if none does. Any t that gives a sum
    of `enough` will do.
    """
    reached = tl.min(tl.where(inside, bits, 0x7FFFFFFF), axis=0)
    missed = tl.max(bits, axis=0) + 1
    middle = (reached & missed) + ((reached ^ missed) >> 1)  # no overflow
    while (middle != reached) & (total != enough):
        candidate = tl.sum(tl.where(bits >= middle, weights, 0), axis=0)
        reaches = candidate >= target
        reached = tl.where(reaches, middle, reached)
        missed = tl.where(reaches, missed, middle)
        total = tl.where(reaches, candidate, total)
        middle = (reached & missed) + ((reached ^ missed) >> 1)
    return reached, total


@triton.jit
def _store_kept(kept, columns, indices_ptr):
    """Columns that are kept, ascending."""
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(indices_ptr + place, columns, kept)


@triton.jit
def _store_kept_and_zeros(kept, columns, indices_ptr, count_ptr, width):
    """Columns that are kept, ascending, then zeros up to `width`; and how many are kept."""
    _store_kept(kept, columns, indices_ptr)
    count = tl.sum(kept.to(tl.int32), axis=0)
    zeros = tl.zeros(kept.shape, tl.int32)
    tl.store(indices_ptr + columns, zeros, (columns >= count) & (columns < width))
    tl.store(count_ptr, count)


# A size of 1 would become a constant, and its type another.
@triton.jit(do_not_specialize=["key_blocks", "kept_blocks"])
def _select_topk_kernel(
    scores_ptr, indices_ptr, key_blocks, kept_blocks, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _, bits, columns, inside = _row(scores_ptr, row, key_blocks, COLUMNS)
    ones = tl.full((COLUMNS,), 1, tl.int32)
    last, count = _largest_reached(bits, inside, ones, key_blocks, kept_blocks, kept_blocks)
    kept = bits >= last
    if count > kept_blocks:  # of equal ones the first
        equal = (bits == last).to(tl.int32)
        room = kept_blocks - (count - tl.sum(equal, axis=0))
        kept = (bits > last) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= room))
    _store_kept(kept, columns, indices_ptr + row * kept_blocks)


@triton.jit
def _select_cdf_kernel(
    weights_ptr, always_ptr, always_queries_ptr, indices_ptr, counts_ptr,
    query_blocks, key_blocks, threshold, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weights, bits, columns, inside = _row(weights_ptr, row, key_blocks, COLUMNS)
    total = tl.sum(weights, axis=0)
    # No sum is enough: weights that are zero do not count, but change no sum either.
    last, _ = _largest_reached(bits, inside, weights, total, threshold, -1.0)
    kept = bits >= last
    if always_ptr is not None:
        always = always_ptr + row // query_blocks * key_blocks + columns
        kept |= tl.load(always, inside, other=0) != 0
    if always_queries_ptr is not None:
        kept |= tl.load(always_queries_ptr + row) != 0
    kept &= inside
    indices_ptr += row * key_blocks
    _store_kept_and_zeros(kept, columns, indices_ptr, counts_ptr + row, key_blocks)


@triton.jit
def _indices_from_map_kernel(
    map_ptr, indices_ptr, counts_ptr, key_blocks, COLUMNS: tl.constexpr
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    kept = tl.load(map_ptr + row * key_blocks + columns, columns < key_blocks, other=0) != 0
    indices_ptr += row * key_blocks
    _store_kept_and_zeros(kept, columns, indices_ptr, counts_ptr + row, key_blocks)


@triton.jit
def _map_from_indices_kernel(
    indices_ptr, counts_ptr, map_ptr, query_blocks, width, stride_head, stride_q, stride_k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    head, query = tl.program_id(1).to(tl.int64), tl.program_id(0)
    row = head * query_blocks + query
    count = width
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)
    map_ptr += head * stride_head + query * stride_q
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        key = tl.load(indices_ptr + row * width + place, place < count, other=0)
        one = tl.full((BLOCK,), 1, tl.uint8)
        tl.store(map_ptr + key * stride_k, one, place < count)


def pool(x: torch.Tensor, block: int) -> torch.Tensor:
    batch, length, heads, dim = x.shape
    pooled = x.new_empty(batch, heads, triton.cdiv(length, block), dim, dtype=torch.float32)
    _pool_kernel[_block_grid(pooled)](
        x, pooled, heads, length, *x.stride()[:3], D=dim, BLOCK=block,
        num_warps=max(1, block // 64),
    )  # fmt: skip
    return pooled


def self_similarity(x: torch.Tensor, block: int, mean: torch.Tensor | None) -> torch.Tensor:
    batch, length, heads, dim = x.shape
    similarity = x.new_empty(batch, heads, triton.cdiv(length, block), dtype=torch.float32)
    mean = None if mean is None else mean.contiguous()
    _self_similarity_kernel[_block_grid(similarity)](
        x, mean, similarity, heads, length, *x.stride()[:3], D=dim, BLOCK=block
    )  # fmt: skip
    return similarity


def select_topk(scores: torch.Tensor, kept: int) -> torch.Tensor:
    indices = scores.new_empty(*scores.shape[:3], kept, dtype=torch.int32)
    grid, sizes = _row_grid(scores)
    _select_topk_kernel[grid](scores.contiguous(), indices, scores.shape[-1], kept, **sizes)
    return indices


def select_cdf(
    weights: torch.Tensor,
    threshold: float,
    always: torch.Tensor | None,
    always_queries: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    indices, counts = _room_for_indices(weights)
    query_blocks, key_blocks = weights.shape[2:]
    grid, sizes = _row_grid(weights)
    _select_cdf_kernel[grid](
        weights.contiguous(), _bytes(always), _bytes(always_queries), indices, counts,
        query_blocks, key_blocks, threshold, **sizes,
    )  # fmt: skip
    return indices, counts


def indices_from_map(block_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    indices, counts = _room_for_indices(block_map)
    grid, sizes = _row_grid(block_map)
    _indices_from_map_kernel[grid](_bytes(block_map), indices, counts, block_map.shape[-1], **sizes)
    return indices, counts


def map_from_indices(
    indices: torch.Tensor, counts: torch.Tensor | None, key_blocks: int
) -> torch.Tensor:
    block_map = indices.new_zeros(*indices.shape[:3], key_blocks, dtype=torch.bool)
    _mark_kept(indices, counts, block_map)
    return block_map


def inverse_indices(
    indices: torch.Tensor, counts: torch.Tensor | None, key_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each key block the query blocks that keep it.

    indices (B,H,Mq,N), counts (B,H,Mq) -> (B,H,key_blocks,Mq) int32 ascending, then zeros, and
    counts (B,H,key_blocks) int32. Sizes depend on shapes alone, so the host need not wait.
    """
    batch, heads, query_blocks, _ = indices.shape
    keepers = indices.new_zeros(batch, heads, key_blocks, query_blocks, dtype=torch.bool)
    _mark_kept(indices, counts, keepers.transpose(2, 3))
    return indices_from_map(keepers)


def _mark_kept(indices: torch.Tensor, counts: torch.Tensor | None, block_map: torch.Tensor) -> None:
    """Sets the kept entries of a zero (B,H,Mq,Mk) map, of any strides within a head."""
    batch, heads, query_blocks, width = indices.shape
    _map_from_indices_kernel[(query_blocks, batch * heads)](
        indices.contiguous(), counts if counts is None else counts.contiguous(),
        block_map.view(torch.uint8), query_blocks, width, *block_map.stride()[1:], BLOCK=128,
    )  # fmt: skip


def _room_for_indices(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        rows.new_empty(rows.shape, dtype=torch.int32),
        rows.new_empty(rows.shape[:3], dtype=torch.int32),
    )


def _bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    """A bool tensor as the bytes that it is stored in."""
    return None if x is None else x.contiguous().view(torch.uint8)


def _block_grid(out: torch.Tensor) -> tuple[int, int]:
    """(B * H, M) of a (B, H, M, ...) output: heads, which lie side by side in memory, first."""
    return out.shape[0] * out.shape[1], out.shape[2]


def _row_grid(rows: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """A program for each row of (B, H, Mq, Mk), and its size."""
    columns = max(16, triton.next_power_of_2(rows.shape[-1]))
    num_warps = min(16, max(1, columns // _WARP_ELEMENTS))
    # Four warps, and so four rows, for each of a multiprocessor's schedulers.
    launch = {"num_warps": num_warps, "maxnreg": 128}
    return (rows[..., 0].numel(),), {"COLUMNS": columns, **launch}
