"""Block-sparse attention with its tangent: the reference, the kernel interpreted, and SLA."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tests.attention.test_sla import by_definition, sla
from tests.kernels.compile_only import assert_compiles

from turbodit.kernels import attention_jvp as ops
from turbodit.kernels.attention_jvp import attention_jvp, reference, sparse_attention_jvp
from turbodit.kernels.block_map import map_from_indices

triton = pytest.importorskip("turbodit.kernels.attention_jvp.triton")

ALL, ONLY_Q, NONE = (True, True, True), (True, False, False), (False, False, False)
# Which of q, k and v have a tangent.
GIVEN = [ALL, ONLY_Q, (False, True, False), (False, False, True), (False, True, True)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["tma", "pointers"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that blocks are taken in parts, read through TMA or through pointers."""
    monkeypatch.setattr(triton, "_sparse_launch", lambda x: triton.Launch(32, 16, 4, 2))
    monkeypatch.setattr(triton, "can_describe", lambda *tensors: request.param == "tma")


@dataclass
class Problem:
    """Random q, k, v and tangents (float16, parts of larger tensors); every query block keeps the
    same number of key blocks, in any order."""

    length_q: int
    length_k: int
    block_q: int = 16
    block_k: int = 16
    given: tuple[bool, ...] = ALL
    heads: int = 1
    dim: int = 16
    kept: int = 2

    def __post_init__(self) -> None:
        lengths = (self.length_q, self.length_k, self.length_k)
        self.qkv = [self.rows(length) for length in lengths]
        pairs = zip(lengths, self.given, strict=True)
        self.tangents = [self.rows(length) if given else None for length, given in pairs]
        self.key_blocks = -(-self.length_k // self.block_k)
        rows = 2, self.heads, -(-self.length_q // self.block_q)
        order = torch.rand(*rows, self.key_blocks).argsort(dim=-1)
        self.indices = order[..., : self.kept].int()

    def rows(self, length: int) -> torch.Tensor:
        return torch.randn(2, length, self.heads + 1, self.dim).half()[:, :, : self.heads]

    def inputs(self, dtype: torch.dtype = torch.float16) -> list[torch.Tensor | None]:
        return [None if x is None else x.to(dtype) for x in (*self.qkv, *self.tangents)]

    @property
    def settings(self) -> tuple[torch.Tensor, int, int, float]:
        return self.indices, self.block_q, self.block_k, 0.3

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        return triton.sparse_attention_jvp(*self.inputs(), *self.settings)

    def reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.sparse_attention_jvp(*self.inputs(dtype), *self.settings)

    def hidden(self) -> torch.Tensor:
        """(B, H, Lq, Lk) bool: what each query does not see."""
        kept = map_from_indices(self.indices, None, self.key_blocks)
        wide = kept.repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        return ~wide[:, :, : self.length_q, : self.length_k]


def masked_attention(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's derivative of attention under a mask as four operations, each in `dtype`."""
    hidden = problem.hidden()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (0.3 * q @ k.mT).masked_fill(hidden, -torch.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    q, k, v, *tangents = problem.inputs(dtype)
    zeros = map(torch.zeros_like, (q, k, v))
    filled = [z if x is None else x for z, x in zip(zeros, tangents, strict=True)]
    return torch.func.jvp(attend, (q, k, v), tuple(filled))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


# The reference.


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("gathered", [2000, 10**9])
def test_reference_is_the_derivative_of_masked_attention(
    gathered: int, given: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_GATHERED", gathered)
    problem = Problem(45, 71, 16, 32, given, heads=3, dim=7)
    got = problem.reference(torch.float64)
    for mine, theirs in zip(got, masked_attention(problem, torch.float64), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1), (16, 33), (50, 17), (64, 64)])
def test_reference_at_other_lengths(length_q: int, length_k: int) -> None:
    problem = Problem(length_q, length_k, heads=2)
    got = problem.reference(torch.float64)
    for mine, theirs in zip(got, masked_attention(problem, torch.float64), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_all_blocks_are_dense_attention() -> None:
    problem = Problem(40, 37, heads=2, kept=3)
    inputs = problem.inputs(torch.float64)
    got = sparse_attention_jvp(*inputs, indices=problem.indices, block_q=16, block_k=16)
    for mine, theirs in zip(got, attention_jvp(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_without_tangents_it_does_not_move() -> None:
    problem = Problem(40, 37, heads=2, given=NONE)
    _, tangent = problem.reference(torch.float32)
    assert (tangent == 0).all()


def test_errors_say_what_is_expected() -> None:
    q = torch.randn(1, 40, 2, 8)
    indices = torch.zeros(1, 2, 3, 1, dtype=torch.int32)
    good = {"q": q, "k": q, "v": q, "indices": indices, "block_q": 16, "block_k": 16}
    assert sparse_attention_jvp(**good)[0].shape == q.shape
    for change, message in (
        ({"v": q[:, :39]}, "q, k and v must be"),
        ({"k_tangent": q[:, 1:]}, r"tangent of k must be \(1, 40, 2, 8\), got \(1, 39, 2, 8\)"),
        ({"q_tangent": q.double()}, "one dtype"),
        ({"block_k": 8}, r"blocks of 16 queries and 8 keys; supported: \(16, 32, 64, 128\)"),
        ({"block_q": 32}, r"block indices have shape \(1, 2, 3, 1\), expected \(1, 2, 2, 'N'\)"),
        ({"indices": indices.expand(1, 2, 3, 4)}, "with N from 1 to 3"),
        ({"indices": indices.long()}, "block indices are int32"),
        ({"scale": 0.0}, "scale must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_attention_jvp(**(good | change))


def test_op_is_well_formed() -> None:
    problem = Problem(40, 33)
    arguments = (*problem.inputs(torch.float32), *problem.settings)
    torch.library.opcheck(ops._sparse_attention_jvp, arguments)


# The kernel.


def assert_kernel_agrees(problem: Problem) -> None:
    """It errs at most twice as much as plain float16 does (and one rounding of it)."""
    got, exact = problem.kernel(), problem.reference(torch.float64)
    plain = masked_attention(problem, torch.float16)
    for mine, theirs, want in zip(got, plain, exact, strict=True):
        assert mine.dtype == torch.float16 and mine.isfinite().all()
        assert (mine - want).norm() <= 2 * (theirs - want).norm() + 1e-3


@pytest.mark.usefixtures("poisoned", "tiles")
@pytest.mark.parametrize(
    ("length_q", "length_k", "block_q", "block_k"),
    [(1, 1, 16, 16), (50, 70, 16, 16), (15, 64, 32, 16), (100, 65, 64, 32), (129, 71, 128, 64)],
)
def test_kernel(length_q: int, length_k: int, block_q: int, block_k: int) -> None:
    assert_kernel_agrees(Problem(length_q, length_k, block_q, block_k))


@pytest.mark.usefixtures("poisoned", "tiles")
def test_kernel_where_the_ragged_block_comes_first() -> None:
    """Of its four steps three have no key."""
    problem = Problem(20, 130, 16, 64, heads=2)
    problem.indices = torch.tensor([2, 0], dtype=torch.int32).expand_as(problem.indices)
    assert_kernel_agrees(problem)
    problem.indices = problem.indices[..., :1]
    assert_kernel_agrees(problem)


@pytest.mark.usefixtures("poisoned", "tiles")
@pytest.mark.parametrize("given", [*GIVEN, NONE])
def test_kernel_without_some_tangents(given: tuple[bool, ...]) -> None:
    problem = Problem(40, 37, given=given, heads=2)
    assert_kernel_agrees(problem)
    if given == NONE:
        assert (problem.kernel()[1] == 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("table", ["SPARSE_LARGE", "SPARSE_SMALL"])
def test_kernel_as_launched(dim: int, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_sparse_launch", lambda x: getattr(triton, table)[dim])
    monkeypatch.setattr(triton, "can_describe", lambda *tensors: table == "SPARSE_LARGE")
    assert_kernel_agrees(Problem(70, 150, 64, 64, dim=dim))


@pytest.mark.usefixtures("poisoned", "tiles")
@pytest.mark.parametrize("seed", range(2))
def test_kernel_at_random_sizes(seed: int) -> None:
    draw = random.Random(seed)
    assert_kernel_agrees(
        Problem(
            draw.randint(1, 120), draw.randint(1, 120),
            draw.choice(ops.BLOCKS), draw.choice(ops.BLOCKS),
            given=tuple(draw.random() < 0.6 for _ in range(3)), kept=draw.randint(1, 3),
        )
    )  # fmt: skip


@pytest.mark.usefixtures("poisoned", "tiles")
def test_kernel_at_scores_far_from_zero() -> None:
    """Rows that do not exist score 0: they must not matter where all others are far below."""
    problem = Problem(20, 20)
    q, k, v = problem.qkv
    problem.qkv = [5 + q, -5 + k, v]
    assert_kernel_agrees(problem)


@pytest.mark.usefixtures("poisoned", "tiles")
def test_kernel_does_not_read_past_the_end() -> None:
    problem = Problem(20, 37, kept=3)
    want = problem.kernel()

    def followed_by_nan(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, 12), value=torch.nan)[:, :-12]

    problem.qkv = [followed_by_nan(x) for x in problem.qkv]
    problem.tangents = [followed_by_nan(x) for x in problem.tangents if x is not None]
    assert all(map(torch.equal, problem.kernel(), want))


@pytest.mark.usefixtures("poisoned", "tiles")
def test_kernel_takes_any_strides() -> None:
    problem = Problem(20, 37, heads=2)
    q, k, v = problem.qkv
    one = torch.ones(()).half()
    problem.tangents = [one.expand(q.shape), k.mT.contiguous().mT, v[:, :1].expand(v.shape)]
    # Contiguous, these are what they were.
    problem.indices = problem.indices.transpose(2, 3).contiguous().transpose(2, 3)
    assert_kernel_agrees(problem)


# SLA.


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("length", [16, 40, 112])
def test_sla_passes_tangents_on(variant: str, length: int) -> None:
    """Against PyTorch's derivative of SLA's definition with whole matrices."""
    primals, tangents = (torch.randn(3, 2, length, 2, 8).double().unbind() for _ in range(2))
    module = sla(ratio=0.4, variant=variant).double()
    got = torch.func.jvp(module, primals, tangents)
    want = torch.func.jvp(lambda *qkv: by_definition(module, *qkv), primals, tangents)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_sla_in_half_precision(variant: str) -> None:
    primals, tangents = (torch.randn(3, 2, 100, 2, 64).bfloat16().unbind() for _ in range(2))
    module = sla(64, ratio=0.3, variant=variant)
    got = torch.func.jvp(module, primals, tangents)
    exact = ([x.double() for x in some] for some in (primals, tangents))
    want = torch.func.jvp(module.double(), *map(tuple, exact))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.bfloat16 and relative_error(mine, theirs) <= 1e-2


def test_sla_with_one_tangent() -> None:
    q, k, v, direction = torch.randn(4, 2, 40, 2, 8).double().unbind()
    module = sla(ratio=0.5).double()
    got = torch.func.jvp(lambda v: module(q, k, v), (v,), (direction,))
    want = torch.func.jvp(lambda v: by_definition(module, q, k, v), (v,), (direction,))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach())


# Every architecture.


def signature(constants: dict[str, object]) -> dict[str, str]:
    """Types of all arguments that are not constants."""
    tile = f"tensordesc<bf16[1, 1, {constants['KEYS']}, {constants['D']}]>"
    types = dict.fromkeys(("k", "dk", "v", "dv"), tile if constants["TMA"] else "*bf16")
    types |= dict.fromkeys(("H", "Lq", "Lk", "kept"), "i32")
    types |= {"indices": "*i32", "scale_log2": "fp32", "scale": "fp32"}
    return {
        name: types.get(name, "i32:16" if name.startswith("stride") else "*bf16")
        for name in triton._sparse_kernel.arg_names
        if name not in constants
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "dim", "block", "given", "architectures"),
    [
        ("SPARSE_LARGE", 128, 64, ALL, (90,)),
        ("SPARSE_SMALL", 128, 64, ALL, (80,)),
        ("SPARSE_LARGE", 64, 16, ONLY_Q, (90,)),
    ],
)
def test_kernel_compiles(
    table: str, dim: int, block: int, given: tuple[bool, ...], architectures: tuple[int, ...]
) -> None:
    launch = getattr(triton, table)[dim]
    rows, keys = min(launch.block_q, block), min(launch.block_k, block)
    constants: dict[str, object] = {
        "D": dim, "BLOCK_Q": block, "BLOCK_K": block, "ROWS": rows, "KEYS": keys,
        "TMA": table == "SPARSE_LARGE",
    }  # fmt: skip
    names = zip(("dq", "dk", "dv"), given, strict=True)
    constants |= {name: None for name, is_given in names if not is_given}
    assert_compiles(
        "turbodit.kernels.attention_jvp.triton", "_sparse_kernel", signature(constants),
        constants, architectures, min(launch.num_warps, rows // 16), launch.num_stages,
    )  # fmt: skip
