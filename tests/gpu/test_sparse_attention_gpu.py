"""Block maps and block-sparse attention on a GPU, at sizes the interpreter is too slow for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from turbodit.kernels import block_map as maps
from turbodit.kernels.block_map import reference as map_reference
from turbodit.kernels.linear_attention import FEATURE_MAPS, key_value_statistics
from turbodit.kernels.sparse_attention import (
    reference,
    sparse_attention,
    sparse_attention_forward,
)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
HALF = (torch.float16, torch.bfloat16)
LENGTHS = [(1, 1), (63, 200), (200, 63), (1111, 1111), (1, 4097), (4097, 1111), (4096, 4096)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN, or the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()  # an error belongs to the test that made it


def rows(length: int, dim: int, dtype: torch.dtype, heads: int = 3) -> torch.Tensor:
    """(2, L, H, D) as a part of a wider tensor."""
    return torch.randn(2, length, heads + 1, 2 * dim, device=CUDA, dtype=dtype)[:, :, 1:, dim:]


@dataclass
class Problem:
    """Random q, k, v and a random block map; block indices in any order."""

    length_q: int
    length_k: int
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    block_q: int = 128
    block_k: int = 64
    density: float = 0.3

    def __post_init__(self) -> None:
        sizes = self.dim, self.dtype
        self.qkv = tuple(rows(n, *sizes) for n in (self.length_q, self.length_k, self.length_k))
        blocks = -(-self.length_q // self.block_q), -(-self.length_k // self.block_k)
        shuffled = torch.rand(2, 3, *blocks, device=CUDA).argsort(dim=-1)
        self.counts = (torch.rand(2, 3, blocks[0], device=CUDA) * blocks[1] * self.density).int()
        self.counts[:, :, 1:] += 1  # the first query block may keep none
        self.counts.clamp_(max=blocks[1])
        self.indices = shuffled.int()
        self.map = maps.map_from_indices(self.indices, self.counts, blocks[1])
        self.blocks = {"block_q": self.block_q, "block_k": self.block_k, "scale": 0.1}

    def masked_attention(self, dtype: torch.dtype, grad: torch.Tensor) -> list[torch.Tensor]:
        """out, dq, dk, dv of attention under a mask, each operation in `dtype`."""
        inputs = [x.to(dtype).requires_grad_() for x in self.qkv]
        q, k, v = (x.transpose(1, 2) for x in inputs)
        wide = self.map.repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        mask = wide[:, :, : self.length_q, : self.length_k]
        seen = mask.any(dim=-1, keepdim=True)
        weights = (0.1 * q @ k.mT).masked_fill(~mask & seen, -torch.inf).softmax(dim=-1)
        out = (torch.where(seen, weights, 0) @ v).transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


def assert_as_exact_as_pytorch(problem: Problem) -> None:
    """Both passes err at most twice as much as PyTorch in the same precision."""
    points = [x.detach().requires_grad_() for x in problem.qkv]
    out = sparse_attention(*points, problem.indices, problem.counts, **problem.blocks)
    grad = torch.randn_like(out)
    got = out, *torch.autograd.grad(out, points, grad)
    plain = problem.masked_attention(problem.dtype, grad)
    exact = problem.masked_attention(torch.float64, grad)
    for mine, theirs, want in zip(got, plain, exact, strict=True):
        assert mine.dtype == problem.dtype and mine.isfinite().all()
        assert (mine - want).norm() <= 2 * (theirs - want).norm() + 1e-3


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("length_q", "length_k"), LENGTHS)
def test_sparse_attention(length_q: int, length_k: int, dim: int, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(Problem(length_q, length_k, dim, dtype))


@pytest.mark.parametrize("block_q", [16, 32, 64, 128])
@pytest.mark.parametrize("block_k", [16, 32, 64])
@pytest.mark.parametrize("dim", [64, 128])
def test_sparse_attention_with_blocks_of_any_size(block_q: int, block_k: int, dim: int) -> None:
    assert_as_exact_as_pytorch(Problem(300, 333, dim, block_q=block_q, block_k=block_k))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("dim", [64, 128])
def test_linear_branch(dim: int, feature_map: str, dtype: torch.dtype) -> None:
    problem = Problem(1111, 1111, dim, dtype)
    weight = torch.randn(dim, dim, device=CUDA) / dim**0.5
    statistics = key_value_statistics(*problem.qkv[1:], weight, 64, feature_map)
    linear = statistics.means, statistics.k_sum, torch.randn(dim, device=CUDA)
    arguments = problem.indices, problem.counts
    out, lse = sparse_attention_forward(
        *problem.qkv, *arguments, **problem.blocks, linear=linear, feature_map=feature_map
    )
    blocks = *(x.cpu() for x in arguments), *problem.blocks.values()

    inputs = [x.cpu() for x in (*problem.qkv, *linear)]
    want, want_lse = reference.forward(*inputs[:3], *blocks, *inputs[3:], feature_map)
    inputs = [x.double() for x in inputs]
    exact, _ = reference.forward(*inputs[:3], *blocks, *inputs[3:], feature_map)
    torch.testing.assert_close(lse.cpu(), want_lse, rtol=1e-4, atol=1e-4)
    assert (out.cpu() - exact).norm() <= 2 * (want - exact).norm()


def test_gradients_are_the_same_bits_every_time() -> None:
    problem = Problem(2000, 2000)
    results = []
    for _ in range(2):
        points = [x.detach().requires_grad_() for x in problem.qkv]
        out = sparse_attention(*points, problem.indices, problem.counts, **problem.blocks)
        results.append([out, *torch.autograd.grad(out.square().sum(), points)])
    assert all(map(torch.equal, *results))


def test_gradients_of_a_sum() -> None:
    """Their strides are all 0."""
    problem = Problem(100, 100)
    points = [x.detach().requires_grad_() for x in problem.qkv]
    out = sparse_attention(*points, problem.indices, problem.counts, **problem.blocks)
    got = torch.autograd.grad(out.sum(), points, retain_graph=True)
    want = torch.autograd.grad(out, points, torch.ones_like(out))
    assert all(map(torch.equal, got, want))


def test_offsets_beyond_32_bits() -> None:
    """2^31 elements lie between the first and the last row."""
    problem = Problem(257, 257)
    stride = 2**31 // 256 + 128
    size, strides = (1, 257, 1, 128), (0, stride, 128, 1)
    spread = torch.empty_strided(size, strides, device=CUDA, dtype=torch.bfloat16)
    assert spread.stride(1) * 256 > 2**31
    qkv = [x[:1, :, :1] for x in problem.qkv]
    arguments = problem.indices[:1, :1], problem.counts[:1, :1]
    want = sparse_attention(*qkv, *arguments, **problem.blocks)
    for i in range(3):
        wide = spread.copy_(qkv[i])
        got = sparse_attention(*qkv[:i], wide, *qkv[i + 1 :], *arguments, **problem.blocks)
        assert torch.equal(got, want)


def test_captured_in_a_cuda_graph_and_compiled() -> None:
    """Nothing waits for the device, and nothing breaks the graph."""
    problem = Problem(1111, 1111)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        indices = maps.select_topk(maps.pool(q, 128), maps.pool(k, 64), 0.2)
        points = [x.detach().requires_grad_() for x in (q, k, v)]
        out = sparse_attention(*points, indices, block_q=128, block_k=64)
        return [out, *torch.autograd.grad(out.square().sum(), points)]

    want = run(*problem.qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(*problem.qkv)
    for x in got:
        x.detach().fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, got, want))

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        indices = maps.select_topk(maps.pool(q, 128), maps.pool(k, 64), 0.2)
        return sparse_attention(q, k, v, indices, block_q=128, block_k=64)

    torch.compiler.reset()
    assert torch.equal(torch.compile(forward, fullgraph=True)(*problem.qkv), want[0])


# Block maps.


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("length", [1, 63, 200, 4097])
@pytest.mark.parametrize(("block", "dim"), [(64, 128), (128, 64), (16, 128)])
def test_pooling(block: int, dim: int, length: int, dtype: torch.dtype) -> None:
    x = rows(length, dim, dtype) + 2
    torch.testing.assert_close(maps.pool(x, block), map_reference.pool(x, block))
    for mean in (None, x.mean(dim=1, dtype=torch.float32)):
        torch.testing.assert_close(
            maps.self_similarity(x, block, mean), map_reference.self_similarity(x, block, mean)
        )


@pytest.mark.parametrize("key_blocks", [1, 16, 100, 512, 1182, 5000, 20000])
def test_selection(key_blocks: int) -> None:
    # Few values, so that many are equal.
    scores = torch.randn(2, 3, 50, key_blocks, device=CUDA).mul(64).round()
    for kept in {1, max(1, key_blocks // 10), key_blocks}:
        assert torch.equal(maps._select_topk(scores, kept), map_reference.select_topk(scores, kept))
    weights = scores.div(64).softmax(dim=-1)
    always = torch.rand(2, 3, key_blocks, device=CUDA) < 0.1
    always_queries = torch.rand(2, 3, 50, device=CUDA) < 0.1
    for threshold in (0.3, 0.9):
        indices, counts = maps._select_cdf(weights, threshold, always, always_queries)
        kept_map = maps.map_from_indices(indices, counts, key_blocks)
        assert kept_map.masked_select(always[:, :, None].expand_as(kept_map)).all()
        assert kept_map[always_queries].all()
        selected = maps.map_from_indices(
            *maps._select_cdf(weights, threshold, None, None), key_blocks
        )
        assert torch.equal(kept_map, selected | always[:, :, None] | always_queries[..., None])
        mass = weights.double().where(selected, 0).sum(dim=-1)
        last = weights.masked_fill(~selected, 2).amin(dim=-1)
        without_last = weights.double().where(selected & (weights > last[..., None]), 0).sum(-1)
        assert (mass >= threshold - 1e-5).all() and (without_last < threshold + 1e-5).all()


@pytest.mark.parametrize("key_blocks", [1, 100, 1182])
def test_conversion(key_blocks: int) -> None:
    block_map = torch.rand(2, 3, 77, key_blocks, device=CUDA) < 0.2
    got = maps.indices_from_map(block_map)
    assert all(map(torch.equal, got, map_reference.indices_from_map(block_map)))
    assert torch.equal(maps.map_from_indices(*got, key_blocks), block_map)
    from turbodit.kernels.block_map.triton import inverse_indices

    inverse = inverse_indices(*got, key_blocks)
    want = map_reference.indices_from_map(block_map.transpose(2, 3).contiguous())
    assert all(map(torch.equal, inverse, want))
