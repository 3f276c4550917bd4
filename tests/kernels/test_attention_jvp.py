"""Attention with its tangent: the reference, and the kernel in the interpreter against it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.compile_only import assert_compiles
from torch.autograd import forward_ad

from turbodit.attention import dense
from turbodit.attention.jvp import sdpa_with_tangent
from turbodit.kernels import attention_jvp as ops
from turbodit.kernels.attention_jvp import attention_jvp, reference

tma = pytest.importorskip("turbodit.kernels.tma")
triton = pytest.importorskip("turbodit.kernels.attention_jvp.triton")

ALL, ONLY_Q = (True, True, True), (True, False, False)
# Which of q, k and v have a tangent: self attention, cross attention, and all else.
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
    """Small tiles, read through TMA or through pointers."""
    monkeypatch.setattr(triton, "_launch", lambda x: triton.Launch(32, 16, 4, 2))
    monkeypatch.setattr(triton, "can_describe", lambda *tensors: request.param == "tma")


@dataclass
class Problem:
    """Random q, k, v and tangents (float16, parts of larger tensors)."""

    length_q: int
    length_k: int
    given: tuple[bool, ...] = ALL
    heads: int = 1
    dim: int = 16

    def __post_init__(self) -> None:
        lengths = (self.length_q, self.length_k, self.length_k)
        self.qkv = [self.rows(length) for length in lengths]
        pairs = zip(lengths, self.given, strict=True)
        self.tangents = [self.rows(length) if given else None for length, given in pairs]

    def rows(self, length: int) -> torch.Tensor:
        return torch.randn(2, length, self.heads + 1, self.dim).half()[:, :, : self.heads]

    def inputs(self, dtype: torch.dtype = torch.float16) -> list[torch.Tensor | None]:
        return [None if x is None else x.to(dtype) for x in (*self.qkv, *self.tangents)]

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        return triton.attention_jvp(*self.inputs(), 0.3)

    def reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.attention_jvp(*self.inputs(dtype), 0.3)


def plain_attention(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's derivative of attention as three operations, each in `dtype`."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ((0.3 * q @ k.mT).softmax(dim=-1) @ v).transpose(1, 2)

    q, k, v, *tangents = problem.inputs(dtype)
    zeros = map(torch.zeros_like, (q, k, v))
    filled = [z if x is None else x for z, x in zip(zeros, tangents, strict=True)]
    return torch.func.jvp(attend, (q, k, v), tuple(filled))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


# The reference.


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("scores", [1, 100, 10**9])
def test_reference_is_the_derivative_of_attention(
    scores: int, given: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_SCORES", scores)
    problem = Problem(13, 19, given, heads=3, dim=7)
    got = problem.reference(torch.float64)
    for mine, theirs in zip(got, plain_attention(problem, torch.float64), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_reference_is_that_of_finite_differences() -> None:
    problem = Problem(13, 19, heads=2)
    primals = [x.double() for x in problem.qkv]
    tangents = [x.double() for x in problem.tangents if x is not None]

    def at(step: float) -> torch.Tensor:
        q, k, v = (x + step * dx for x, dx in zip(primals, tangents, strict=True))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    out, tangent = attention_jvp(*primals, *tangents)
    torch.testing.assert_close(out, at(0))
    assert relative_error(tangent, (at(1e-6) - at(-1e-6)) / 2e-6) <= 1e-8


def test_without_tangents_it_does_not_move() -> None:
    q, k, v = (x.float() for x in Problem(13, 19, heads=2).qkv)
    for tangents in ((None,) * 3, tuple(map(torch.zeros_like, (q, k, v)))):
        out, tangent = attention_jvp(q, k, v, *tangents)
        torch.testing.assert_close(out, dense.sdpa(q, k, v))
        assert (tangent == 0).all()


def test_errors_say_what_is_expected() -> None:
    q = torch.randn(1, 40, 2, 8)
    for inputs, message in (
        ((q, q[:, :0], q[:, :0]), "with L > 0"),
        ((q, q, q[:, 1:]), r"q, k and v must be .* got \(1, 40, 2, 8\)"),
        ((q, q, q, None, q[:, 1:]), r"tangent of k must be \(1, 40, 2, 8\), got \(1, 39, 2, 8\)"),
        ((q, q, q, q.double()), "one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_jvp(*inputs)
    with pytest.raises(ValueError, match="scale must be positive"):
        attention_jvp(q, q, q, scale=0.0)


def test_op_is_well_formed() -> None:
    problem = Problem(13, 19)
    torch.library.opcheck(ops._attention_jvp, (*problem.inputs(torch.float32), 0.3))


# The back-end: attention that passes tangents on.


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("api", ["func", "dual_level"])
def test_backend_passes_tangents_on(given: tuple[bool, ...], api: str) -> None:
    problem = Problem(13, 19, given, heads=2)
    q, k, v, *tangents = problem.inputs(torch.float64)
    chosen = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def attend(*some: torch.Tensor) -> torch.Tensor:
        inputs = [q, k, v]
        for i, x in zip(chosen, some, strict=True):
            inputs[i] = 2 * x
        return sdpa_with_tangent(*inputs)

    primals = tuple((q, k, v)[i] / 2 for i in chosen)
    directions = tuple(tangents[i] / 2 for i in chosen)
    if api == "func":
        got = torch.func.jvp(attend, primals, directions)
    else:
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, primals, directions)
            got = tuple(x.clone() for x in forward_ad.unpack_dual(attend(*duals)))
    want = attention_jvp(q, k, v, *tangents)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_backend_without_tangents_is_sdpa() -> None:
    inputs = [x.float().requires_grad_() for x in Problem(13, 19, heads=2).qkv]
    results = []
    for attend in (sdpa_with_tangent, dense.sdpa):
        out = attend(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert all(map(torch.equal, *results))


def test_backend_compiles_without_graph_breaks() -> None:
    inputs = [x.float() for x in Problem(13, 19, heads=2).qkv]
    compiled = torch.compile(sdpa_with_tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), dense.sdpa(*inputs))


def test_backend_refuses_the_gradient_of_a_tangent() -> None:
    inputs = tuple(x.float() for x in Problem(13, 19).qkv)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    _, tangent = torch.func.jvp(sdpa_with_tangent, leaves, inputs)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        tangent.sum().backward()


# The kernel.


def assert_kernel_agrees(problem: Problem) -> None:
    """It errs at most twice as much as plain float16 does (and one rounding of it)."""
    got, exact = problem.kernel(), problem.reference(torch.float64)
    plain = plain_attention(problem, torch.float16)
    for mine, theirs, want in zip(got, plain, exact, strict=True):
        assert mine.dtype == torch.float16 and mine.isfinite().all()
        assert (mine - want).norm() <= 2 * (theirs - want).norm() + 1e-3


@pytest.mark.usefixtures("poisoned", "tiles")
@pytest.mark.parametrize(
    ("length_q", "length_k"), [(1, 1), (32, 16), (63, 111), (111, 63), (20, 7), (5, 257)]
)
def test_kernel(length_q: int, length_k: int) -> None:
    assert_kernel_agrees(Problem(length_q, length_k))


@pytest.mark.usefixtures("poisoned", "tiles")
@pytest.mark.parametrize("given", [*GIVEN, (False, False, False)])
def test_kernel_without_some_tangents(given: tuple[bool, ...]) -> None:
    problem = Problem(40, 37, given, heads=2)
    assert_kernel_agrees(problem)
    if not any(given):
        assert (problem.kernel()[1] == 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("table", ["LARGE", "SMALL"])
def test_kernel_as_launched(dim: int, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_launch", lambda x: getattr(triton, table)[dim])
    monkeypatch.setattr(triton, "can_describe", lambda *tensors: table == "LARGE")
    assert_kernel_agrees(Problem(70, 90, dim=dim))


@pytest.mark.usefixtures("poisoned", "tiles")
@pytest.mark.parametrize("seed", range(3))
def test_kernel_at_random_sizes(seed: int) -> None:
    draw = random.Random(seed)
    given = tuple(draw.random() < 0.6 for _ in range(3))
    assert_kernel_agrees(Problem(draw.randint(1, 120), draw.randint(1, 120), given))


@pytest.mark.usefixtures("poisoned", "tiles")
def test_kernel_at_scores_far_from_zero() -> None:
    """Rows that do not exist score 0: they must not matter where all others are far below."""
    problem = Problem(20, 20)
    q, k, v = problem.qkv
    problem.qkv = [5 + q, -5 + k, v]
    assert_kernel_agrees(problem)


@pytest.mark.usefixtures("poisoned", "tiles")
def test_kernel_does_not_read_past_the_end() -> None:
    problem = Problem(20, 37)
    want = problem.kernel()

    def followed_by_nan(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, 12), value=torch.nan)[:, :-12]

    problem.qkv = [followed_by_nan(x) for x in problem.qkv]
    problem.tangents = [followed_by_nan(x) for x in problem.tangents if x is not None]
    assert all(map(torch.equal, problem.kernel(), want))


@pytest.mark.usefixtures("poisoned", "tiles")
def test_kernel_takes_tangents_of_any_strides() -> None:
    problem = Problem(20, 37, heads=2)
    q, k, v = problem.qkv
    one = torch.ones(()).half()
    problem.tangents = [one.expand(q.shape), k.mT.contiguous().mT, v[:, :1].expand(v.shape)]
    assert_kernel_agrees(problem)


def test_tma_needs_aligned_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 40, 3, 16).half()
    assert not tma.can_describe(x)  # not on a GPU that has it
    monkeypatch.setattr(tma, "is_large", lambda x: True)
    assert tma.can_describe(x, None, x[:, :, :2], x[:, 1:], x.transpose(1, 2))
    for odd in (x[..., 1:9], torch.zeros(2, 40, 3, 17).half()[..., :16], x[:, :1].expand_as(x)):
        assert not tma.can_describe(x, odd)


# Every architecture.


def signature(dtype: str, constants: dict[str, object]) -> dict[str, str]:
    """Types of all arguments that are not constants."""
    tile = f"tensordesc<{dtype}[1, 1, {constants['BLOCK_K']}, {constants['D']}]>"
    types = dict.fromkeys(("k", "dk", "v", "dv"), tile if constants["TMA"] else f"*{dtype}")
    types |= dict.fromkeys(("H", "Lq", "Lk"), "i32")
    types |= dict.fromkeys(("scale_log2", "scale"), "fp32")
    return {
        name: types.get(name, "i32:16" if name.startswith("stride") else f"*{dtype}")
        for name in triton._kernel.arg_names
        if name not in constants
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "dim", "given", "architectures"),
    [
        ("LARGE", 128, ALL, (90, 100)),
        ("SMALL", 128, ALL, (80, 86, 89, 120)),
        ("LARGE", 64, ONLY_Q, (90,)),
        ("SMALL", 64, ONLY_Q, (86,)),
    ],
)
def test_kernel_compiles(
    table: str, dim: int, given: tuple[bool, ...], architectures: tuple[int, ...]
) -> None:
    launch = getattr(triton, table)[dim]
    constants: dict[str, object] = {
        "D": dim, "BLOCK_Q": launch.block_q, "BLOCK_K": launch.block_k, "TMA": table == "LARGE",
    }  # fmt: skip
    names = zip(("dq", "dk", "dv"), given, strict=True)
    constants |= {name: None for name, is_given in names if not is_given}
    assert_compiles(
        "turbodit.kernels.attention_jvp.triton", "_kernel", signature("bf16", constants),
        constants, architectures, launch.num_warps, launch.num_stages,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_kernel_compiles(dtype: str) -> None:
    hopper = pytest.importorskip("turbodit.kernels.attention_jvp.hopper")
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"
    tile = f"tensordesc<{dtype}[1, 1, {hopper.ROWS}, {hopper.D}],{layout}>"
    names = ("q_desc", "dq_desc", "k_desc", "dk_desc", "v_desc", "dv_desc")
    signature = dict.fromkeys(names, tile)
    signature |= dict.fromkeys(("out_ptr", "along_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("heads", "length_q", "length_k"), "i32")
    signature |= dict.fromkeys(("factor", "scale"), "fp32")
    constants = {"COMPUTE": hopper.COMPUTE, "COPY": hopper.COPY}
    assert_compiles(hopper.__name__, "_kernel", signature, constants, (90,), maxnreg=hopper.START)
