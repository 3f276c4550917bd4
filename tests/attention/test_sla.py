"""SLA against its definition with whole matrices, in float64."""

from __future__ import annotations

import pytest
import torch

from turbodit.attention.sla import SageSLA, SparseLinearAttention, marginal_attention
from turbodit.kernels.linear_attention import FEATURE_MAPS, linear_attention

BLOCKS = {"block_q": 16, "block_k": 16}


def tensors(
    length: int, dim: int = 8, *, heads: int = 2, batch: int = 2, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, length, heads, dim)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64).unbind())


def sla(dim: int = 8, kind: type = SparseLinearAttention, **settings) -> SparseLinearAttention:
    """With a projection that is not zero."""
    module = kind(dim, **{**BLOCKS, **settings})
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


# SLA's definition.


def block_map(q: torch.Tensor, k: torch.Tensor, ratio: float, block: int = 16) -> torch.Tensor:
    """(B, H, Mq, Mk): the best max(1, int(ratio * Mk)) scores of smoothed means."""
    smooth = k - k.mean(dim=1, keepdim=True)
    means_q, means_k = (
        torch.stack([rows.mean(dim=1) for rows in x.split(block, dim=1)], dim=2)
        for x in (q, smooth)
    )
    scores = means_q @ means_k.transpose(-1, -2)
    kept = max(1, int(ratio * scores.shape[-1]))
    return scores >= scores.topk(kept).values[..., -1:]


def per_token(blocks: torch.Tensor, rows: int, columns: int, block: int = 16) -> torch.Tensor:
    """A map of blocks as one of tokens: (B, H, Lq, Lk)."""
    tokens = blocks.repeat_interleave(block, -2).repeat_interleave(block, -1)
    return tokens[..., :rows, :columns]


def softmax_over(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.masked_fill(~kept, -torch.inf).softmax(-1), v)


def linear_over(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counted: torch.Tensor, feature_map: str
) -> torch.Tensor:
    """Linear attention from its weight phi(q).phi(k) for each pair."""
    maps = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: torch.nn.functional.elu(x) + 1}
    phi = {**maps, "relu": torch.relu}[feature_map]
    weights = torch.einsum("blhd,bmhd->bhlm", phi(q), phi(k)) * counted
    return torch.einsum("bhlm,bmhd->blhd", weights / (weights.sum(-1, keepdim=True) + 1e-5), v)


def by_definition(
    module: SparseLinearAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    kept = per_token(block_map(q, k, module.ratio), q.shape[1], k.shape[1])
    counted = ~kept if module.variant == "paper" else torch.ones_like(kept)
    linear = linear_over(q, k, v, counted, module.feature_map)
    weight, bias = (p.double() for p in (module.proj_l.weight, module.proj_l.bias))
    return softmax_over(q, k, v, kept) + linear @ weight.T + bias


def test_a_case_by_hand() -> None:
    """Two blocks of equal rows: what is kept is the first; relu; D = 2; W = (0 1; 2 0)."""
    k = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).repeat_interleave(16, 0)[None, :, None]
    v = torch.tensor([[1.0, 0.0], [0.0, 4.0]]).repeat_interleave(16, 0)[None, :, None]
    q = torch.tensor([[3.0, -1.0], [3.0, -1.0]]).repeat_interleave(8, 0)[None, :, None]
    module = SparseLinearAttention(2, ratio=0.5, feature_map="relu", **BLOCKS)
    with torch.no_grad():
        torch.testing.assert_close(module(q, k, v)[0, 0, 0], torch.tensor([1.0, 0.0]))
        module.proj_l.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        # phi(q) = (3, 0), so keys weigh 3 * 2 and 3 * 1: o_l = (2/3, 4/3), W o_l = (4/3, 4/3).
        torch.testing.assert_close(module(q, k, v)[0, 0, 0], torch.tensor([7 / 3, 4 / 3]))
        paper = SparseLinearAttention(2, 0.5, variant="paper", feature_map="relu", **BLOCKS)
        paper.load_state_dict(module.state_dict())
        # Of the linear branch only the second block is left: o_l = (0, 4), W o_l = (4, 0).
        torch.testing.assert_close(paper(q, k, v)[0, 0, 0], torch.tensor([5.0, 0.0]))


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("length", [16, 40, 112])
def test_it_is_its_definition(variant: str, feature_map: str, length: int) -> None:
    q, k, v = tensors(length, 64)
    module = sla(64, ratio=0.4, variant=variant, feature_map=feature_map)
    want = by_definition(module, q, k, v).detach()
    got = module(q, k, v)  # in training
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.detach(), want)
    with torch.no_grad():
        fused = module(q.float(), k.float(), v.float())
    assert relative_error(fused, want) <= 1e-6


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_queries_and_keys_of_different_lengths(variant: str) -> None:
    q, k, v = tensors(70)
    module = sla(ratio=0.4, variant=variant)
    got, want = module(q[:, :20], k, v), by_definition(module, q[:, :20], k, v)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_gradients(variant: str) -> None:
    """Of inputs and projection; the map is taken as given."""
    inputs = [x.requires_grad_() for x in tensors(20, 4, heads=1, batch=1)]
    module = sla(4, ratio=0.5, variant=variant).double()
    parameters = list(module.parameters())
    assert torch.autograd.gradcheck(lambda q, k, v, *_: module(q, k, v), (*inputs, *parameters))


def test_a_new_module_is_sparse_attention_alone() -> None:
    q, k, v = tensors(64)
    module = SparseLinearAttention(8, ratio=0.3, **BLOCKS)
    want = softmax_over(q, k, v, per_token(block_map(q, k, 0.3), 64, 64))
    torch.testing.assert_close(module(q, k, v).detach(), want)
    grads = torch.autograd.grad(module(q, k, v).square().sum(), module.parameters())
    assert all(grad.abs().sum() > 0 for grad in grads), "it must learn from zero"


def test_a_whole_map_leaves_nothing_to_the_papers_linear_branch() -> None:
    q, k, v = tensors(48)
    module = sla(ratio=1.0, variant="paper")
    torch.nn.init.zeros_(module.proj_l.bias)
    want = softmax_over(q, k, v, torch.ones(48, 48, dtype=torch.bool))
    torch.testing.assert_close(module(q, k, v).detach(), want)


def test_marginal_attention_over_all_blocks_is_linear_attention() -> None:
    q, k, v = tensors(50)
    everything = torch.ones(2, 2, 4, 4, dtype=torch.bool)
    got = marginal_attention(q, k, v, everything, "elu", **BLOCKS)
    torch.testing.assert_close(got, linear_attention(q, k, v, "elu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sage_costs_little_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors(300, 64))
    exact = sla(64, ratio=0.2)
    module = sla(64, SageSLA, ratio=0.2)
    module.load_state_dict(exact.state_dict())
    with torch.no_grad():
        want = by_definition(exact, *(x.double() for x in (q, k, v)))
        assert relative_error(module(q, k, v), want) <= 0.04
        assert relative_error(exact(q, k, v), want) <= 2 * torch.finfo(dtype).eps


def test_sage_refuses_gradients() -> None:
    q, k, v = (x.float().requires_grad_() for x in tensors(32))
    with pytest.raises(ValueError, match="gradient"):
        sla(kind=SageSLA)(q, k, v)


def test_sage_trains_its_projection() -> None:
    q, k, v = (x.float() for x in tensors(40))
    exact, module = sla(), sla(kind=SageSLA)
    module.load_state_dict(exact.state_dict())
    for x, y in zip(
        *(torch.autograd.grad(m(q, k, v).sum(), m.parameters()) for m in (exact, module)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_blocks_of_released_inference_are_sages_default() -> None:
    module = SageSLA(128)
    assert (module.block_q, module.block_k, module.ratio) == (128, 64, 0.1)


def test_parameters_are_those_of_the_files() -> None:
    for module in (SparseLinearAttention(64), SageSLA(64)):
        shapes = {name: (p.shape, p.dtype) for name, p in module.named_parameters()}
        assert shapes == {
            "proj_l.weight": ((64, 64), torch.float32),
            "proj_l.bias": ((64,), torch.float32),
        }
        assert all((p == 0).all() for p in module.parameters())


@pytest.mark.parametrize("kind", [SparseLinearAttention, SageSLA])
def test_autocast_changes_nothing(kind: type) -> None:
    q, k, v = (x.float() for x in tensors(40))
    module = sla(kind=kind, ratio=0.5)
    with torch.no_grad():
        want = module(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(q, k, v), want)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_compiles_without_graph_breaks(variant: str) -> None:
    q, k, v = (x.float() for x in tensors(40))
    module = sla(ratio=0.5, variant=variant)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), module(q, k, v))


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"up to 128.*got 160"):
        SparseLinearAttention(160)(*tensors(16, 160))
    with pytest.raises(ValueError, match=r"'old'.*released, paper"):
        SparseLinearAttention(64, variant="old")
    with pytest.raises(ValueError, match=r"'exp'.*softmax, elu, relu"):
        SparseLinearAttention(64, feature_map="exp")
    for ratio in (0, 1.5):
        with pytest.raises(ValueError, match=f"got {ratio}"):
            SageSLA(64, ratio)
