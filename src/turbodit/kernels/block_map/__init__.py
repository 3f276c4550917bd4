"""Block maps: which key blocks each block of queries attends to, found from means of blocks.

A map is bool (B, H, Mq, Mk). What sparse kernels read are its block indices: for each query
block the list of its kept key blocks, ascending. Selecting writes them at once; the map itself
is only for people, and for masks that come from elsewhere.

`reference` holds the formulas. Nothing here is differentiable.

Shapes: B batch, L length, H heads, D head dimension, M blocks (Mq of queries, Mk of keys),
N kept blocks. q and k are (B, L, H, D) with any strides but for a contiguous last dimension,
float16 or bfloat16 on a GPU, where D is a power of two; on a CPU of any floating dtype.
"""

from __future__ import annotations

import torch

from turbodit.kernels import custom_op, implementation, wide

__all__ = [
    "indices_from_map",
    "map_from_indices",
    "pool",
    "select_cdf",
    "select_topk",
    "self_similarity",
]


@custom_op("turbodit::pool_blocks")
def pool(x: torch.Tensor, block: int) -> torch.Tensor:
    """Mean over each block's rows, a ragged last block's over its own: one pass over x.

    Args:
        x: (B, L, H, D), queries or keys.
        block: rows of a block; on a GPU a power of two.

    Returns:
        (B, H, M, D) float32, M = ceil(L / block).

    Raises:
        ValueError: x or the block size does not fit.
    """
    _check_rows(x, block)
    return implementation(__name__, x).pool(x, block)


@custom_op("turbodit::self_similarity")
def self_similarity(x: torch.Tensor, block: int, mean: torch.Tensor | None = None) -> torch.Tensor:
    """How alike the rows of each block are (SpargeAttention, arXiv:2502.18137, section 3.2).

    Args:
        x: (B, L, H, D), queries or keys.
        block: rows of a block; on a GPU a power of two.
        mean: (B, H, D) float32, taken from each row first: that of the keys, to smooth them.

    Returns:
        (B, H, M) float32 in [0, 1]: the mean cosine of all pairs of rows. Their mean stands
        for rows well where this is near 1.

    Raises:
        ValueError: x, mean or the block size does not fit.
    """
    _check_rows(x, block)
    expected = (x.shape[0], x.shape[2], x.shape[3])
    if mean is not None and mean.shape != expected:
        raise ValueError(f"mean has shape {tuple(mean.shape)}, expected {expected}")
    return implementation(__name__, x).self_similarity(x, block, mean)


def select_topk(
    pooled_q: torch.Tensor,
    pooled_k: torch.Tensor,
    ratio: float,
    mean_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best-scored key blocks of each query block (SLA, arXiv:2509.24006, section 4).

    Scores are pooled_q pooled_k^T. Smoothing the keys by their mean adds the same number to all
    scores of a query block, so it cannot change their order; a mean is taken off here for the
    precision that is lost where it is large.

    Args:
        pooled_q: (B, H, Mq, D) float32.
        pooled_k: (B, H, Mk, D) float32.
        ratio: share of key blocks to keep, in (0, 1]; at least one is kept.
        mean_k: (B, H, D) float32, that mean if it is known; else that of pooled_k.

    Returns:
        (B, H, Mq, N) int32, N = max(1, int(ratio * Mk)), ascending in each row. Of equal scores
        the first block goes first.

    Raises:
        ValueError: the ratio is not in (0, 1], or the shapes do not fit.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"the top-k ratio must be in (0, 1], got {ratio}")
    scores = _scores(pooled_q, pooled_k, mean_k)
    return _select_topk(scores, max(1, int(ratio * scores.shape[-1])))


def select_cdf(
    pooled_q: torch.Tensor,
    pooled_k: torch.Tensor,
    threshold: float,
    always: torch.Tensor | None = None,
    always_queries: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest key blocks whose share of attention reaches a threshold (arXiv:2502.18137, eq. 5).

    The share is softmax(scale * pooled_q pooled_k^T) over the blocks that are not in `always`.

    Args:
        pooled_q: (B, H, Mq, D) float32.
        pooled_k: (B, H, Mk, D) float32.
        threshold: mass to reach, in (0, 1].
        always: (B, H, Mk) bool, key blocks that every query block keeps beside the selected
            ones.
        always_queries: (B, H, Mq) bool, query blocks that keep every key block.
        scale: of the scores; 1/sqrt(D) if not given.

    Returns:
        indices (B, H, Mq, Mk) int32: the kept blocks of each row, ascending, then zeros;
        counts (B, H, Mq) int32: how many are kept, at least one. Blocks whose share equals the
        last one's are kept too.

    Raises:
        ValueError: the threshold is not in (0, 1], or the shapes do not fit.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be in (0, 1], got {threshold}")
    scores = _scores(pooled_q, pooled_k) * (pooled_q.shape[-1] ** -0.5 if scale is None else scale)
    _check_bool("always", always, (*scores.shape[:2], scores.shape[3]))
    _check_bool("always_queries", always_queries, tuple(scores.shape[:3]))
    if always is not None:
        # Finite, so that a row without any other block has weights too.
        scores = scores.masked_fill(always[:, :, None], torch.finfo(scores.dtype).min)
    return _select_cdf(scores.softmax(dim=-1), threshold, always, always_queries)


@custom_op("turbodit::indices_from_map")
def indices_from_map(block_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block indices of a block map.

    Args:
        block_map: (B, H, Mq, Mk) bool.

    Returns:
        indices (B, H, Mq, Mk) int32: the kept key blocks of each row, ascending, then zeros;
        counts (B, H, Mq) int32: how many are kept.

    Raises:
        ValueError: another dtype or number of dimensions.
    """
    if block_map.ndim != 4 or block_map.dtype != torch.bool:
        raise ValueError(
            f"a block map is bool (B, H, Mq, Mk), got {block_map.dtype} {tuple(block_map.shape)}"
        )
    return implementation(__name__, block_map).indices_from_map(block_map)


@custom_op("turbodit::map_from_indices")
def map_from_indices(
    indices: torch.Tensor, counts: torch.Tensor | None, key_blocks: int
) -> torch.Tensor:
    """The block map of block indices.

    Args:
        indices: (B, H, Mq, N) int32, each less than `key_blocks`.
        counts: (B, H, Mq) int32, how many of each row are kept; None: all N.
        key_blocks: Mk.

    Returns:
        (B, H, Mq, Mk) bool.

    Raises:
        ValueError: other dtypes or shapes.
    """
    check_indices(indices, counts)
    return implementation(__name__, indices).map_from_indices(indices, counts, key_blocks)


def check_indices(indices: torch.Tensor, counts: torch.Tensor | None) -> None:
    """Raises ValueError unless indices are (B,H,Mq,N) and counts (B,H,Mq) or None, int32."""
    if indices.ndim != 4 or indices.dtype != torch.int32:
        raise ValueError(
            f"block indices are int32 (B, H, Mq, N), got {indices.dtype} {tuple(indices.shape)}"
        )
    if counts is not None and (counts.shape != indices.shape[:3] or counts.dtype != torch.int32):
        raise ValueError(
            f"counts of block indices {tuple(indices.shape)} are int32 "
            f"{tuple(indices.shape[:3])}, got {counts.dtype} {tuple(counts.shape)}"
        )


@custom_op("turbodit::select_topk")
def _select_topk(scores: torch.Tensor, kept: int) -> torch.Tensor:
    return implementation(__name__, scores).select_topk(scores, kept)


@custom_op("turbodit::select_cdf")
def _select_cdf(
    weights: torch.Tensor,
    threshold: float,
    always: torch.Tensor | None,
    always_queries: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return implementation(__name__, weights).select_cdf(weights, threshold, always, always_queries)


@pool.register_fake
def _(x: torch.Tensor, block: int) -> torch.Tensor:
    blocks = (x.shape[1] + block - 1) // block
    return x.new_empty(x.shape[0], x.shape[2], blocks, x.shape[3], dtype=wide(x.dtype))


@self_similarity.register_fake
def _(x: torch.Tensor, block: int, mean: torch.Tensor | None = None) -> torch.Tensor:
    blocks = (x.shape[1] + block - 1) // block
    return x.new_empty(x.shape[0], x.shape[2], blocks, dtype=wide(x.dtype))


@_select_topk.register_fake
def _(scores: torch.Tensor, kept: int) -> torch.Tensor:
    return scores.new_empty(*scores.shape[:3], kept, dtype=torch.int32)


@_select_cdf.register_fake
def _(
    weights: torch.Tensor,
    threshold: float,
    always: torch.Tensor | None,
    always_queries: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_indices(weights)


@indices_from_map.register_fake
def _(block_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_indices(block_map)


@map_from_indices.register_fake
def _(indices: torch.Tensor, counts: torch.Tensor | None, key_blocks: int) -> torch.Tensor:
    return indices.new_empty(*indices.shape[:3], key_blocks, dtype=torch.bool)


def _fake_indices(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    indices = rows.new_empty(rows.shape, dtype=torch.int32)
    return indices, rows.new_empty(rows.shape[:3], dtype=torch.int32)


def _scores(
    pooled_q: torch.Tensor, pooled_k: torch.Tensor, mean_k: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, H, Mq, Mk), less a number for each row."""
    if pooled_q.shape[:2] != pooled_k.shape[:2] or pooled_q.shape[3] != pooled_k.shape[3]:
        raise ValueError(
            "pooled q and k must be (B, H, Mq, D) and (B, H, Mk, D), got "
            f"{tuple(pooled_q.shape)} and {tuple(pooled_k.shape)}"
        )
    if mean_k is None:
        mean_k = pooled_k.mean(dim=2)
    # Rounded by autocast, they would choose other blocks.
    with torch.autocast(pooled_q.device.type, enabled=False):
        return pooled_q @ (pooled_k - mean_k[:, :, None]).transpose(2, 3)


def _check_rows(x: torch.Tensor, block: int) -> None:
    if x.ndim != 4 or x.shape[1] == 0:
        raise ValueError(f"expected (B, L, H, D) with L > 0, got {tuple(x.shape)}")
    if block < 1:
        raise ValueError(f"a block must have at least one row, got {block}")
    if x.is_cuda and (
        x.dtype not in (torch.float16, torch.bfloat16)
        or x.stride(-1) != 1
        or any(size & (size - 1) for size in (x.shape[-1], block))
    ):
        raise ValueError(
            "on a GPU block maps take float16 or bfloat16, a contiguous last dimension, and "
            "powers of two as head dimension and block size; got "
            f"{x.dtype}, {tuple(x.shape)}, strides {x.stride()}, blocks of {block}"
        )


def _check_bool(name: str, x: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if x is not None and (x.dtype != torch.bool or x.shape != shape):
        raise ValueError(f"{name} must be bool {shape}, got {x.dtype} {tuple(x.shape)}")
