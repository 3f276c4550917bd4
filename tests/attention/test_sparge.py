"""Training-free sparse attention against exact attention over the same blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from turbodit.attention.sparge import sparge, sparge_attn_cdf, sparge_attn_topk
from turbodit.config import TransformerConfig
from turbodit.model.wan import WanModel

BLOCKS = {"block_q": 16, "block_k": 16}
QUANTISATION = 0.04  # relative error of 8-bit products on Gaussian inputs


def tensors(length: int = 96, dim: int = 64, *, heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, 1, length, heads, dim, generator=generator).unbind())


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def clustered(groups: int = 6) -> list[torch.Tensor]:
    """Each block of 16 rows has a direction of its own; queries look for that of the same block."""
    generator = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(groups, 64, generator=generator), dim=-1)
    rows = direction.repeat_interleave(16, 0)[None, :, None]
    noise = 0.02 * torch.randn(2, *rows.shape, generator=generator)
    v = torch.randn(rows.shape, generator=generator)
    return [9 * (rows + noise[0]), 9 * (rows + noise[1]), v]


def test_a_ratio_of_one_is_sage() -> None:
    q, k, v = tensors(70)
    assert relative_error(sparge_attn_topk(q, k, v, 1.0, **BLOCKS), exact(q, k, v)) <= QUANTISATION


def test_top_k_keeps_the_blocks_that_matter() -> None:
    q, k, v = clustered()
    got = sparge_attn_topk(q, k, v, ratio=1 / 6, **BLOCKS)
    own_block = torch.block_diag(*[torch.ones(16, 16, dtype=torch.bool)] * 6)
    assert relative_error(got, exact(q, k, v, own_block)) <= QUANTISATION
    assert relative_error(got, exact(q, k, v)) <= QUANTISATION


@pytest.mark.parametrize("attend", [sparge_attn_topk, sparge_attn_cdf])
def test_faint_blocks_are_left_out_on_request(attend) -> None:
    q, k, v = clustered()
    every = attend(q, k, v, 1.0, **BLOCKS)
    # Scores of the own block are about 10 here, and of others about 0.
    assert 0 < relative_error(attend(q, k, v, 1.0, pv_threshold=5.0, **BLOCKS), every) < 0.01
    assert torch.equal(attend(q, k, v, 1.0, pv_threshold=30.0, **BLOCKS), every)


@pytest.mark.parametrize("attend", [sparge_attn_topk, sparge_attn_cdf])
def test_other_head_dimensions(attend) -> None:
    q, k, v = tensors(40, 24)
    got = attend(q, k, v, 1.0, **BLOCKS)
    assert got.shape == q.shape and relative_error(got, exact(q, k, v)) <= QUANTISATION
    with pytest.raises(ValueError, match="up to 128"):
        attend(*tensors(40, 136))


def test_the_default_keeps_half() -> None:
    q, k, v = tensors()
    torch.testing.assert_close(
        sparge_attn_topk(q, k, v, **BLOCKS), sparge_attn_topk(q, k, v, 0.5, **BLOCKS)
    )


def test_cdf_keeps_what_holds_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = clustered()
    got = sparge_attn_cdf(q, k, v, 0.9, **BLOCKS)
    assert relative_error(got, exact(q, k, v)) <= QUANTISATION
    # Only each query's own block is read: other values make no difference.
    kept = kept_blocks(monkeypatch, q, k, v, threshold=0.9)
    assert torch.equal(kept, torch.eye(6, dtype=torch.bool))
    assert kept_blocks(monkeypatch, q, k, v, threshold=1.0).all()


def test_blocks_of_unlike_rows_are_always_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = clustered()
    generator = torch.Generator().manual_seed(1)
    k[:, 16:32] = torch.randn(16, 64, generator=generator)[None, :, None]
    q[:, 48:64] = torch.randn(16, 64, generator=generator)[None, :, None]
    kept = kept_blocks(monkeypatch, q, k, v, threshold=0.9)
    assert kept[:, 1].all() and kept[3].all()
    assert not kept[0, 2:].any(), "others are chosen by their mass"


def kept_blocks(monkeypatch: pytest.MonkeyPatch, q, k, v, **settings) -> torch.Tensor:
    """(Mq, Mk) of the first head, as given to the kernel."""
    from turbodit.attention import sparge as module

    seen = {}
    plain = module.quantized_attention

    def spy(*args, indices: torch.Tensor, counts: torch.Tensor, **others) -> torch.Tensor:
        seen["rows"] = [row[:n] for row, n in zip(indices[0, 0], counts[0, 0], strict=True)]
        return plain(*args, indices=indices, counts=counts, **others)

    with monkeypatch.context() as patch:
        patch.setattr(module, "quantized_attention", spy)
        sparge_attn_cdf(q, k, v, **settings, **BLOCKS)
    kept = torch.zeros(len(seen["rows"]), k.shape[1] // 16, dtype=torch.bool)
    for row, blocks in zip(kept, seen["rows"], strict=True):
        row[blocks.long()] = True
    return kept


@pytest.mark.parametrize("attend", [sparge_attn_topk, sparge_attn_cdf])
def test_autocast_changes_nothing(attend) -> None:
    q, k, v = tensors()
    k = k + 20  # scores whose differences bfloat16 would round away
    want = attend(q, k, v, 0.5, **BLOCKS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k, v, 0.5, **BLOCKS), want)


@pytest.mark.parametrize("attend", [sparge_attn_topk, sparge_attn_cdf])
def test_gradients_are_refused(attend) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(32))
    with pytest.raises(ValueError, match="gradient"):
        attend(q, k, v, **BLOCKS)


# Whole models.

TINY = TransformerConfig(
    dim=64, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=5
)


def model_and_inputs() -> tuple[WanModel, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = WanModel(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, (torch.randn(1, 4, 3, 12, 12), torch.tensor([0.7]), torch.randn(1, 5, 8))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"ratio": 1.0}, {"threshold": 1.0}])
def test_a_model_made_sparse(settings: dict[str, float]) -> None:
    model, inputs = model_and_inputs()
    dense = model(*inputs)
    cross = [block.cross_attn.attn_op.local_attn for block in model.blocks]
    sparge(model, **settings, **BLOCKS)
    assert relative_error(model(*inputs), dense) <= QUANTISATION
    assert cross == [block.cross_attn.attn_op.local_attn for block in model.blocks]


@torch.no_grad()
def test_a_smaller_ratio_changes_more() -> None:
    model, inputs = model_and_inputs()
    dense = model(*inputs)
    errors = []
    for ratio in (0.75, 0.2):
        sparge(model, ratio=ratio, **BLOCKS)
        errors.append(relative_error(model(*inputs), dense))
    assert QUANTISATION / 10 < errors[0] < errors[1]


def test_errors_say_what_is_wrong() -> None:
    model, _ = model_and_inputs()
    with pytest.raises(ValueError, match="either"):
        sparge(model)
    with pytest.raises(ValueError, match="either"):
        sparge(model, ratio=0.5, threshold=0.9)
    with pytest.raises(ValueError, match="Linear without blocks"):
        sparge(torch.nn.Linear(2, 2), ratio=0.5)
    trained = WanModel(TINY, "sla")
    with pytest.raises(ValueError, match="SparseLinearAttention"):
        sparge(trained, ratio=0.5)
