from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from turbodit.attention.block_map import indices_from_map, map_from_indices, topk_block_map
from turbodit.attention.block_sparse import block_sparse_attn


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("dim", "scale"), [(8, None), (64, None), (72, 0.5)])
@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (1, 3, 1, 4), (2, 4), (4,)])
def test_is_attention_under_the_map(shape: tuple[int, ...], dim: int, scale: float | None) -> None:
    q, k, v = torch.randn(2, 50, 3, dim), torch.randn(2, 60, 3, dim), torch.randn(2, 60, 3, dim)
    block_map = torch.rand(shape) < 0.5
    block_map[..., 1] = True
    wide = block_map.expand(2, 3, 2, 4).repeat_interleave(32, 2).repeat_interleave(16, 3)
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), wide[:, :, :50, :60], scale=scale
    )
    got = block_sparse_attn(q, k, v, block_map, block_q=32, block_k=16, scale=scale)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_gradients_reach_only_what_is_seen() -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 40, 1, 8).unbind())
    block_map = torch.tensor([[True, False, False], [False, True, False], [False] * 3])
    out = block_sparse_attn(q, k, v, block_map, block_q=16, block_k=16)
    assert (out[:, 32:] == 0).all()
    (out**2).sum().backward()
    for x in (k, v):
        assert (x.grad[:, :32] != 0).all() and (x.grad[:, 32:] == 0).all()


def test_a_map_that_does_not_fit_is_refused() -> None:
    q = torch.randn(1, 40, 2, 8)
    with pytest.raises(ValueError, match=r"shape \(3, 2\), expected .* \(1, 2, 3, 3\)"):
        block_sparse_attn(q, q, q, torch.ones(3, 2, dtype=torch.bool), block_q=16, block_k=16)
    with pytest.raises(ValueError, match="a block map is bool"):
        block_sparse_attn(q, q, q, torch.ones(3, 3), block_q=16, block_k=16)
    wide = torch.randn(1, 40, 2, 136)
    with pytest.raises(ValueError, match="up to 128"):
        block_sparse_attn(wide, wide, wide, torch.ones(1, 1, dtype=torch.bool))


def test_topk_block_map_keeps_the_share_asked_for() -> None:
    q, k = torch.randn(1, 100, 2, 24), torch.randn(1, 320, 2, 24)
    kept = topk_block_map(q, k, 0.25, block_q=32, block_k=16)
    assert kept.shape == (1, 2, 4, 20) and (kept.sum(-1) == 5).all()
    pooled_k = k.transpose(1, 2).unflatten(2, (20, 16)).mean(3)
    scores = q[:, :32].mean(1)[:, :, None] @ pooled_k.transpose(2, 3)
    assert (
        scores.masked_fill(~kept[:, :, :1], torch.inf).amin(-1)
        > scores.masked_fill(kept[:, :, :1], -torch.inf).amax(-1)
    ).all()
    indices, counts = indices_from_map(kept)
    assert torch.equal(map_from_indices(indices, counts, 20), kept)
