"""Pooling, selection and conversion of block maps: reference, and kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.compile_only import assert_compiles

from turbodit.kernels import block_map as ops
from turbodit.kernels.block_map import reference

triton = pytest.importorskip("turbodit.kernels.block_map.triton")

LENGTHS = (1, 15, 16, 17, 50)
BLOCK = 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def rows(length: int, heads: int = 3, dim: int = 16) -> torch.Tensor:
    """(2, L, heads, dim) float16 with strides of a larger tensor, and means far from zero."""
    return (torch.randn(2, length, heads + 1, dim) + 3).half()[:, :, :heads]


def scores_with_ties(query_blocks: int, key_blocks: int) -> torch.Tensor:
    return torch.randn(2, 3, query_blocks, key_blocks).mul(2).round().div(2)


# The reference, against the definition.


@pytest.mark.parametrize("length", LENGTHS)
def test_pooled_rows_are_means_of_slices(length: int) -> None:
    x = rows(length)
    pooled = ops.pool(x, BLOCK)
    for i, block in enumerate(x.float().split(BLOCK, dim=1)):
        torch.testing.assert_close(pooled[:, :, i], block.mean(dim=1))
    assert pooled.shape[2] == i + 1


@pytest.mark.parametrize("smooth", [False, True])
def test_self_similarity_is_the_mean_cosine_of_all_pairs(smooth: bool) -> None:
    x = rows(40).float()
    mean = x.mean(dim=1) if smooth else None
    got = ops.self_similarity(x, BLOCK, mean)
    if smooth:
        x = x - x.mean(dim=1, keepdim=True)
    for i, block in enumerate(x.transpose(1, 2).split(BLOCK, dim=2)):
        cosine = F.cosine_similarity(block[:, :, None], block[:, :, :, None], dim=-1)
        torch.testing.assert_close(got[:, :, i], cosine.mean(dim=(2, 3)))


def test_topk_keeps_the_best_and_at_least_one() -> None:
    pooled_q, pooled_k = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 20, 16)
    scores = pooled_q @ pooled_k.transpose(2, 3)
    for ratio, kept in ((0.01, 1), (0.1, 2), (0.5, 10), (1.0, 20)):
        indices = ops.select_topk(pooled_q, pooled_k, ratio)
        assert indices.dtype == torch.int32
        torch.testing.assert_close(
            indices.long(), scores.topk(kept).indices.sort(dim=-1).values, rtol=0, atol=0
        )


def test_a_large_mean_of_the_keys_changes_no_selection() -> None:
    pooled_q, pooled_k = torch.randn(1, 1, 9, 16), torch.randn(1, 1, 40, 16)
    shifted = pooled_k.double() + 1000 * torch.randn(16, dtype=torch.float64)
    want = ops.select_topk(pooled_q.double(), shifted, 0.2)
    assert torch.equal(ops.select_topk(pooled_q, shifted.float(), 0.2), want)


def test_of_equal_scores_the_first_go_first() -> None:
    pooled = torch.ones(1, 1, 7, 16)
    assert ops.select_topk(pooled, pooled, 0.5).tolist() == [[[[0, 1, 2]] * 7]]


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.9, 1.0])
def test_cdf_keeps_the_fewest_blocks_that_reach_the_threshold(threshold: float) -> None:
    pooled_q, pooled_k = 4 * torch.randn(2, 2, 6, 16), torch.randn(2, 2, 9, 16)
    share = (pooled_q @ pooled_k.transpose(2, 3) / 4).softmax(dim=-1)
    indices, counts = ops.select_cdf(pooled_q, pooled_k, threshold)
    kept = ops.map_from_indices(indices, counts, 9)
    assert (counts >= 1).all()
    assert (torch.where(kept, share, 0).sum(-1) >= threshold - 1e-5).all()
    smallest = share.masked_fill(~kept, 2).amin(-1)
    assert (torch.where(kept, share, 0).sum(-1) - smallest <= threshold + 1e-6).all()
    assert (smallest > share.masked_fill(kept, -1).amax(-1)).all()


def test_cdf_keeps_what_is_always_kept() -> None:
    pooled_q, pooled_k = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 9, 16)
    always, always_queries = torch.rand(1, 2, 9) < 0.3, torch.rand(1, 2, 6) < 0.3
    indices, counts = ops.select_cdf(pooled_q, pooled_k, 0.4, always, always_queries)
    kept = ops.map_from_indices(indices, counts, 9)
    assert kept[always[:, :, None].expand_as(kept)].all()
    assert kept[always_queries].all() and not kept.all()
    # The share counts among the other blocks only.
    for head in range(2):
        others = ~always[0, head]
        alone = ops.select_cdf(
            pooled_q[:, head, None], pooled_k[:, head, None, others], 0.4, scale=0.25
        )
        want = ops.map_from_indices(*alone, int(others.sum()))[0, 0]
        rows = ~always_queries[0, head]
        # Centred over other keys, the scores of a row differ by one number.
        assert torch.equal(kept[0, head][rows][:, others], want[rows])
    everything = torch.ones(1, 2, 9, dtype=torch.bool)
    assert (ops.select_cdf(pooled_q, pooled_k, 0.4, everything)[1] == 9).all()


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_maps_and_indices_are_two_forms_of_one_thing(density: float) -> None:
    block_map = torch.rand(2, 3, 5, 7) < density
    indices, counts = ops.indices_from_map(block_map)
    assert torch.equal(counts, block_map.sum(-1).int())
    assert torch.equal(ops.map_from_indices(indices, counts, 7), block_map)
    assert (indices[torch.arange(7) >= counts[..., None]] == 0).all()
    alike = block_map[:1, :1, :1].expand_as(block_map)
    all_kept = ops.indices_from_map(alike)[0][..., : int(alike[0, 0, 0].sum())]
    assert torch.equal(ops.map_from_indices(all_kept, None, 7), alike)


def test_errors_say_what_is_expected() -> None:
    pooled = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 0"):
        ops.select_topk(pooled, pooled, 0.0)
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 1.5"):
        ops.select_cdf(pooled, pooled, 1.5)
    with pytest.raises(ValueError, match="pooled q and k must be"):
        ops.select_topk(pooled, pooled[:, :, :, :8], 0.5)
    with pytest.raises(ValueError, match="always must be bool"):
        ops.select_cdf(pooled, pooled, 0.5, torch.ones(1, 1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected \(B, L, H, D\)"):
        ops.pool(pooled[0], 16)
    with pytest.raises(ValueError, match="at least one row"):
        ops.pool(pooled, 0)
    with pytest.raises(ValueError, match="mean has shape"):
        ops.self_similarity(pooled, 16, torch.zeros(1, 16))
    with pytest.raises(ValueError, match="a block map is bool"):
        ops.indices_from_map(pooled)
    with pytest.raises(ValueError, match="block indices are int32"):
        ops.map_from_indices(torch.zeros(1, 1, 4, 2), None, 4)
    with pytest.raises(ValueError, match=r"counts of block indices \(1, 1, 4, 2\) are int32"):
        ops.map_from_indices(torch.zeros(1, 1, 4, 2).int(), torch.zeros(1, 1, 2).int(), 4)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (ops.pool, (rows(20), 16)),
        (ops.self_similarity, (rows(20), 16, torch.zeros(2, 3, 16))),
        (ops._select_topk, (torch.randn(2, 3, 4, 9), 2)),
        (ops._select_cdf, (torch.rand(2, 3, 4, 9), 0.5, torch.zeros(2, 3, 9).bool(), None)),
        (ops.indices_from_map, (torch.rand(2, 3, 4, 9) < 0.5,)),
        (ops.map_from_indices, (torch.zeros(2, 3, 4, 2).int(), None, 9)),
    ],
)
def test_ops_are_well_formed(op: object, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(op, arguments)


# The kernels, against the reference.


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("length", LENGTHS)
def test_pool_kernel(length: int) -> None:
    x = rows(length)
    torch.testing.assert_close(triton.pool(x, BLOCK), reference.pool(x, BLOCK))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_self_similarity_kernel(length: int, smooth: bool) -> None:
    x = rows(length)
    x[:, : length // 3] = 0  # rows without a direction
    mean = x.float().mean(dim=1) if smooth else None
    got, want = (f(x, BLOCK, mean) for f in (triton.self_similarity, reference.self_similarity))
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("query_blocks", "key_blocks", "kept"),
    [(1, 1, 1), (3, 7, 1), (5, 16, 16), (2, 33, 5), (7, 65, 64), (1, 3000, 300)],
)
def test_select_topk_kernel(query_blocks: int, key_blocks: int, kept: int) -> None:
    scores = scores_with_ties(query_blocks, key_blocks)
    scores[0, 0, 0, ::2] *= -0.0  # equal to +0
    want = reference.select_topk(scores, kept)
    assert torch.equal(triton.select_topk(scores, kept), want)
    infinite = scores.masked_fill(scores.abs() > 1, -torch.inf)
    assert torch.equal(triton.select_topk(infinite, kept), reference.select_topk(infinite, kept))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("query_blocks", "key_blocks"), [(1, 1), (3, 7), (2, 33)])
def test_select_cdf_kernel(query_blocks: int, key_blocks: int) -> None:
    # Halves, quarters, ... add up without rounding, in any order.
    weights = 2.0 ** -torch.arange(1, key_blocks + 1).clamp(max=20)
    weights = weights.expand(1, 2, query_blocks, -1)[..., torch.randperm(key_blocks)].contiguous()
    always = torch.rand(1, 2, key_blocks) < 0.2
    always_queries = torch.rand(1, 2, query_blocks) < 0.2
    for threshold in (0.5, 0.8, 1.0):
        for keep in ((None, None), (always, None), (always, always_queries)):
            got = triton.select_cdf(weights, threshold, *keep)
            want = reference.select_cdf(weights, threshold, *keep)
            assert all(map(torch.equal, got, want)), (threshold, keep)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("query_blocks", "key_blocks"), [(1, 1), (5, 7), (18, 33), (2, 150)])
def test_conversion_kernels(query_blocks: int, key_blocks: int) -> None:
    for density in (0.0, 0.3, 1.0):
        block_map = torch.rand(1, 2, query_blocks, key_blocks) < density
        indices, counts = triton.indices_from_map(block_map)
        assert all(map(torch.equal, (indices, counts), reference.indices_from_map(block_map)))
        assert torch.equal(triton.map_from_indices(indices, counts, key_blocks), block_map)
        got = triton.inverse_indices(indices, counts, key_blocks)
        want = reference.indices_from_map(block_map.transpose(2, 3).contiguous())
        assert all(map(torch.equal, got, want))
    one = torch.randint(key_blocks, (1, 2, query_blocks, 1), dtype=torch.int32)
    want = reference.map_from_indices(one, None, key_blocks)
    assert torch.equal(triton.map_from_indices(one, None, key_blocks), want)


STRIDES = {f"stride_{axis}": "i32:16" for axis in "blh"}
TILE = {"COLUMNS": 2048}
KERNELS = {
    "_pool_kernel": (
        {"x_ptr": "*bf16", "pooled_ptr": "*fp32", "H": "i32", "length": "i32", **STRIDES},
        {"D": 128, "BLOCK": 64},
    ),
    "_self_similarity_kernel": (
        {
            "x_ptr": "*bf16",
            "mean_ptr": "*fp32",
            "similarity_ptr": "*fp32",
            "H": "i32",
            "length": "i32",
            **STRIDES,
        },
        {"D": 128, "BLOCK": 128},
    ),
    "_select_topk_kernel": (
        {
            "scores_ptr": "*fp32",
            "indices_ptr": "*i32",
            **dict.fromkeys(("key_blocks", "kept_blocks"), "i32"),
        },
        TILE,
    ),
    "_select_cdf_kernel": (
        {
            "weights_ptr": "*fp32",
            "always_ptr": "*u8",
            "always_queries_ptr": "*u8",
            "indices_ptr": "*i32",
            "counts_ptr": "*i32",
            "threshold": "fp32",
            **dict.fromkeys(("query_blocks", "key_blocks"), "i32"),
        },
        TILE,
    ),
    "_indices_from_map_kernel": (
        {
            "map_ptr": "*u8",
            "indices_ptr": "*i32",
            "counts_ptr": "*i32",
            "key_blocks": "i32",
        },
        TILE,
    ),
    "_map_from_indices_kernel": (
        {
            "indices_ptr": "*i32",
            "counts_ptr": "*i32",
            "map_ptr": "*u8",
            **dict.fromkeys(("query_blocks", "width"), "i32"),
            **dict.fromkeys(("stride_head", "stride_q", "stride_k"), "i32"),
        },
        {"BLOCK": 128},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_for_every_architecture(kernel: str) -> None:
    assert_compiles("turbodit.kernels.block_map.triton", kernel, *KERNELS[kernel])
