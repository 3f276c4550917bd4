"""Block-sparse attention with its tangent on a GPU, at sizes the interpreter is too slow for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from turbodit.attention.sla import SparseLinearAttention
from turbodit.kernels.attention_jvp import BLOCKS, has_kernel, reference, sparse_attention_jvp
from turbodit.kernels.block_map import map_from_indices

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
HALF = (torch.float16, torch.bfloat16)
ALL, ONLY_Q = (True, True, True), (True, False, False)
# Lengths of queries and keys, rows of their blocks, kept blocks.
SIZES = [
    (1, 1, 16, 16, 1),
    (576, 576, 16, 16, 3),
    (63, 200, 32, 16, 4),
    (1111, 1111, 64, 64, 3),
    (4097, 1111, 128, 64, 9),
    (2048, 2048, 64, 128, 2),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()  # an error belongs to the test that made it


@dataclass
class Problem:
    """Random q, k, v and tangents, parts of wider tensors; every query block keeps the same number
    of key blocks, in any order."""

    length_q: int
    length_k: int
    block_q: int = 64
    block_k: int = 64
    kept: int = 3
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    given: tuple[bool, ...] = ALL
    batch: int = 8

    def __post_init__(self) -> None:
        lengths = (self.length_q, self.length_k, self.length_k)
        self.qkv = [self.rows(length) for length in lengths]
        pairs = zip(lengths, self.given, strict=True)
        self.tangents = [self.rows(length) if given else None for length, given in pairs]
        self.key_blocks = -(-self.length_k // self.block_k)
        rows = self.batch, 3, -(-self.length_q // self.block_q)
        order = torch.rand(*rows, self.key_blocks, device=CUDA).argsort(dim=-1)
        self.indices = order[..., : self.kept].int()

    def rows(self, length: int) -> torch.Tensor:
        wide = (self.batch, length, 4, 2 * self.dim)
        return torch.randn(wide, device=CUDA, dtype=self.dtype)[:, :, 1:, self.dim :]

    @property
    def settings(self) -> dict[str, object]:
        return {"indices": self.indices, "block_q": self.block_q, "block_k": self.block_k}

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse_attention_jvp(*self.qkv, *self.tangents, **self.settings)

    def masked_attention(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """PyTorch's derivative of attention under a mask as four operations, each in `dtype`."""
        kept = map_from_indices(self.indices, None, self.key_blocks)
        wide = kept.repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        hidden = ~wide[:, :, : self.length_q, : self.length_k]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            scores = (self.dim**-0.5 * q @ k.mT).masked_fill(hidden, -torch.inf)
            return (scores.softmax(dim=-1) @ v).transpose(1, 2)

        primals = tuple(x.to(dtype) for x in self.qkv)
        pairs = zip(primals, self.tangents, strict=True)
        return torch.func.jvp(
            attend,
            primals,
            tuple(torch.zeros_like(x) if dx is None else dx.to(dtype) for x, dx in pairs),
        )


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm()).item()


def assert_as_exact_as_pytorch(problem: Problem) -> None:
    """Output and tangent err at most twice as much as PyTorch in the same precision."""
    got, plain = problem.kernel(), problem.masked_attention(problem.dtype)
    exact = problem.masked_attention(torch.float64)
    for mine, theirs, want in zip(got, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.isfinite().all()
        assert (mine - want).norm() <= 2 * (theirs - want).norm() + 1e-2


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("length_q", "length_k", "block_q", "block_k", "kept"), SIZES)
def test_kernel(
    length_q: int, length_k: int, block_q: int, block_k: int, kept: int, dim: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    batch = 8 if length_q <= 1111 else 1
    problem = Problem(length_q, length_k, block_q, block_k, kept, dim, dtype, batch=batch)
    assert_as_exact_as_pytorch(problem)


@pytest.mark.parametrize("block_q", BLOCKS)
@pytest.mark.parametrize("block_k", BLOCKS)
@pytest.mark.parametrize("dim", [64, 128])
def test_blocks_of_any_size(block_q: int, block_k: int, dim: int) -> None:
    assert_as_exact_as_pytorch(Problem(300, 333, block_q, block_k, 2, dim))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "given", [ONLY_Q, (False, True, False), (False, False, True), (True, True, False)]
)
def test_kernel_without_some_tangents(given: tuple[bool, ...], dim: int) -> None:
    assert_as_exact_as_pytorch(Problem(576, 500, 16, 16, 3, dim, given=given))


def test_kernel_through_pointers() -> None:
    """Rows at distances that TMA cannot take, and a tangent that is one number in all places."""
    problem = Problem(1111, 1000)
    problem.qkv, problem.tangents = (
        [torch.nn.functional.pad(x, (0, 1))[..., :-1] for x in some if x is not None]
        for some in (problem.qkv, problem.tangents)
    )
    problem.tangents[0] = problem.tangents[0][:, :1, :1, :1].expand_as(problem.qkv[0])
    assert_as_exact_as_pytorch(problem)


def test_long_sequence() -> None:
    """A tenth of the blocks of a sequence whose score matrix would not fit."""
    problem = Problem(32_760, 32_760, kept=51, batch=1)
    inputs = [x.float() for x in (*problem.qkv, *problem.tangents) if x is not None]
    want = reference.sparse_attention_jvp(*inputs, *problem.settings.values(), 128**-0.5)
    for mine, theirs in zip(problem.kernel(), want, strict=True):
        assert relative_error(mine, theirs) <= 1e-2


def test_equal_inputs_give_equal_bits() -> None:
    problem = Problem(1111, 1111)
    assert all(map(torch.equal, problem.kernel(), problem.kernel()))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_sla(variant: str, dim: int, dtype: torch.dtype) -> None:
    """Of any width, against float64 on the CPU."""
    primals, tangents = (
        torch.randn(3, 2, 570, 3, dim, device=CUDA, dtype=dtype).unbind() for _ in range(2)
    )
    assert has_kernel(primals[0]) == (dim == 64)
    module = SparseLinearAttention(dim, 0.1, variant=variant, block_q=16, block_k=16)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    got = torch.func.jvp(module.to(CUDA), primals, tangents)
    # Means that nearly tie might be ordered otherwise there.
    indices = module.block_indices(*primals[:2]).cpu()
    module.block_indices = lambda q, k: indices  # type: ignore[method-assign]
    exact = [tuple(x.double().cpu() for x in some) for some in (primals, tangents)]
    want = torch.func.jvp(module.to("cpu", torch.float64), *exact)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == dtype and relative_error(mine, theirs) <= 1e-2
