"""Block-sparse attention: the reference, and the kernels in the interpreter against it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.compile_only import assert_compiles

from turbodit.kernels import sparse_attention as ops
from turbodit.kernels.block_map import indices_from_map
from turbodit.kernels.linear_attention import FEATURE_MAPS, key_value_statistics
from turbodit.kernels.linear_attention.reference import linear_branch
from turbodit.kernels.sparse_attention import reference, sparse_attention, sparse_attention_forward

tma = pytest.importorskip("turbodit.kernels.tma")
triton = pytest.importorskip("turbodit.kernels.sparse_attention.triton")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["LARGE", "SMALL"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as launched on a GPU with much shared memory and TMA, and on another."""
    table = getattr(triton, request.param)
    monkeypatch.setattr(triton, "_launches", lambda x, block_q: table[64, max(64, block_q)])
    monkeypatch.setattr(triton, "can_describe", lambda *tensors: request.param == "LARGE")


@dataclass
class Problem:
    """Random q, k, v (float16, parts of larger tensors) and a random block map."""

    length_q: int
    length_k: int
    block_q: int = 16
    block_k: int = 16
    heads: int = 1
    dim: int = 16
    density: float = 0.5
    empty_rows: bool = False

    def __post_init__(self) -> None:
        def rows(length: int) -> torch.Tensor:
            return torch.randn(2, length, self.heads + 1, self.dim).half()[:, :, : self.heads]

        self.qkv = rows(self.length_q), rows(self.length_k), rows(self.length_k)
        query_blocks = -(-self.length_q // self.block_q)
        key_blocks = -(-self.length_k // self.block_k)
        self.map = torch.rand(2, self.heads, query_blocks, key_blocks) < self.density
        if self.empty_rows:
            self.map[:, :, 0] = False
        else:
            self.map.scatter_(-1, torch.randint(key_blocks, (*self.map.shape[:3], 1)), True)
        self.indices, self.counts = indices_from_map(self.map)
        # Any order is right, and what stands past the count does not matter.
        for row, count in zip(self.indices.flatten(0, 2), self.counts.flatten(), strict=True):
            row[:count] = row[:count][torch.randperm(int(count))]
            row[count:] = 10**6

    @property
    def blocks(self) -> tuple[torch.Tensor, torch.Tensor, int, int, float]:
        return self.indices, self.counts, self.block_q, self.block_k, 0.3

    def mask(self) -> torch.Tensor:
        """(B, H, Lq, Lk) bool: what each query sees."""
        wide = self.map.repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        return wide[:, :, : self.length_q, : self.length_k]

    def linear(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, k, v = self.qkv
        statistics = key_value_statistics(k, v, torch.randn(self.dim, self.dim), 16, "softmax")
        return statistics.means, statistics.k_sum, torch.randn(self.dim)

    def exact(self) -> torch.Tensor:
        q, k, v = (x.double().transpose(1, 2) for x in self.qkv)
        mask = self.mask()
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3).transpose(1, 2)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


# The reference.


@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1), (16, 33), (50, 17), (64, 64)])
def test_reference_is_attention_under_a_mask(length_q: int, length_k: int) -> None:
    problem = Problem(length_q, length_k, heads=3)
    q, k, v = (x.double() for x in problem.qkv)
    out, lse = sparse_attention_forward(
        q, k, v, problem.indices, problem.counts, block_q=16, block_k=16, scale=0.3
    )
    torch.testing.assert_close(out, problem.exact())
    scores = 0.3 * torch.einsum("blhd,bmhd->bhlm", q, k)
    torch.testing.assert_close(
        lse, scores.masked_fill(~problem.mask(), -torch.inf).logsumexp(dim=-1)
    )


def test_all_blocks_are_full_attention() -> None:
    q, k, v = torch.randn(3, 2, 40, 2, 8).unbind()
    indices = torch.arange(3, dtype=torch.int32).expand(2, 2, 2, 3)
    out = sparse_attention(q, k, v, indices, block_q=32, block_k=16)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(out, want.transpose(1, 2))


@pytest.mark.parametrize("part", [1, 10**9])
def test_gradients(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_GATHERED_ELEMENTS", part)
    problem = Problem(37, 41, dim=3, heads=2)
    inputs = [x.double().requires_grad_() for x in problem.qkv]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        blocks = problem.indices, problem.counts
        return sparse_attention(q, k, v, *blocks, block_q=16, block_k=16)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_rows_without_blocks_are_zeros() -> None:
    problem = Problem(40, 40, empty_rows=True)
    inputs = [x.float().requires_grad_() for x in problem.qkv]
    sizes = {"block_q": 16, "block_k": 16}
    out, lse = sparse_attention_forward(*inputs, problem.indices, problem.counts, **sizes)
    assert (out[:, :16] == 0).all() and (lse[:, :, :16] == -torch.inf).all()
    assert not lse.requires_grad
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs) and (inputs[0].grad[:, :16] == 0).all()


def test_linear_branch_is_added() -> None:
    problem = Problem(40, 33)
    q, k, v = (x.float() for x in problem.qkv)
    means, k_sum, bias = problem.linear()
    means = means.float()
    blocks = problem.indices, problem.counts
    sizes = {"block_q": 16, "block_k": 16}
    for feature_map in FEATURE_MAPS:
        out = sparse_attention(
            q, k, v, *blocks, **sizes, linear=(means, k_sum, bias), feature_map=feature_map
        )
        want = sparse_attention(q, k, v, *blocks, **sizes)
        want = want + linear_branch(q, means, k_sum, bias, feature_map)
        torch.testing.assert_close(out, want)


def test_sparsity_is_faster_on_a_cpu() -> None:
    q, k, v = torch.randn(3, 1, 2048, 2, 64).unbind()
    indices = torch.randperm(32)[:3].int().expand(1, 2, 32, 3)

    def seconds(run: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def sparse() -> torch.Tensor:
        return sparse_attention(q, k, v, indices, block_q=64, block_k=64)

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

    times = [(seconds(sparse), seconds(dense)) for _ in range(7)]
    assert min(t for t, _ in times) < min(t for _, t in times)


def test_errors_say_what_is_expected() -> None:
    q = torch.randn(1, 40, 2, 8)
    indices = torch.zeros(1, 2, 3, 1, dtype=torch.int32)
    good = {"q": q, "k": q, "v": q, "indices": indices, "block_q": 16, "block_k": 16}
    assert sparse_attention(**good).shape == q.shape
    linear = (torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8), torch.zeros(8))
    for change, message in (
        ({"v": q[:, :39]}, "q, k and v must be"),
        ({"k": q[:, :0], "v": q[:, :0]}, "with L > 0"),
        ({"k": q.double()}, "one dtype"),
        ({"block_k": 128}, r"blocks of 16 queries and 128 keys; supported"),
        ({"block_q": 32}, r"block indices have shape \(1, 2, 3, 1\), expected \(1, 2, 2, 'N'\)"),
        ({"indices": indices.expand(1, 2, 3, 4)}, "with N from 1 to 3"),
        ({"indices": indices.long()}, "block indices are int32"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"linear": (*linear[:2], torch.zeros(7))}, "linear must be"),
        ({"linear": (linear[0].half(), *linear[1:])}, "linear must be"),
        ({"feature_map": "gelu"}, "unknown feature map 'gelu'; supported: softmax, elu, relu"),
        ({"q": q.clone().requires_grad_(), "linear": linear}, "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_attention(**(good | change))


def test_ops_are_well_formed() -> None:
    problem = Problem(40, 33)
    q, k, v = (x.float().requires_grad_() for x in problem.qkv)
    torch.library.opcheck(
        ops._sparse_attention, (q, k, v, *problem.blocks, None, None, None, "softmax")
    )
    out, lse = reference.forward(q, k, v, *problem.blocks)
    grad, *saved = (x.detach() for x in (torch.ones_like(out), q, k, v, out, lse))
    torch.library.opcheck(ops._sparse_attention_backward, (grad, *saved, *problem.blocks))


def test_compiles_without_graph_breaks() -> None:
    problem = Problem(40, 33)
    inputs = [x.float().requires_grad_() for x in problem.qkv]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        blocks = problem.indices, problem.counts
        return sparse_attention(q, k, v, *blocks, block_q=16, block_k=16)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for f in (attend, compiled):
        out = f(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


# The kernels, against the reference.

SIZES = [(1, 1, 16, 16), (50, 70, 16, 16), (15, 64, 32, 16), (100, 65, 64, 32), (129, 111, 32, 64)]


def plain_attention(problem: Problem, dtype: torch.dtype, grad: torch.Tensor) -> list[torch.Tensor]:
    """out, dq, dk, dv of attention under a mask, each operation in `dtype`."""
    inputs = [x.to(dtype).requires_grad_() for x in problem.qkv]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    mask = problem.mask()
    seen = mask.any(dim=-1, keepdim=True)
    weights = (0.3 * q @ k.mT).masked_fill(~mask & seen, -torch.inf).softmax(dim=-1)
    out = (torch.where(seen, weights, 0) @ v).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


def assert_kernels_agree(problem: Problem) -> None:
    """Both passes err at most twice as much as plain float16 does (and one rounding of it)."""
    out, lse = triton.forward(*problem.qkv, *problem.blocks)
    want_lse = reference.forward(*problem.qkv, *problem.blocks)[1]
    torch.testing.assert_close(lse, want_lse)
    grad = torch.randn(out.shape).half()
    got = out, *triton.backward(grad, *problem.qkv, out, lse, *problem.blocks)
    exact = plain_attention(problem, torch.float64, grad)
    plain = plain_attention(problem, torch.float16, grad)
    for mine, theirs, want in zip(got, plain, exact, strict=True):
        assert mine.dtype == torch.float16 and mine.isfinite().all()
        assert (mine - want).norm() <= 2 * (theirs - want).norm() + 1e-3


@pytest.mark.usefixtures("poisoned", "launches")
@pytest.mark.parametrize(("length_q", "length_k", "block_q", "block_k"), SIZES)
def test_kernels(length_q: int, length_k: int, block_q: int, block_k: int) -> None:
    assert_kernels_agree(Problem(length_q, length_k, block_q, block_k))


@pytest.mark.usefixtures("poisoned", "launches")
def test_kernels_at_rows_without_blocks() -> None:
    problem = Problem(40, 40, empty_rows=True)
    assert_kernels_agree(problem)
    out, lse = triton.forward(*problem.qkv, *problem.blocks)
    assert (out[:, :16] == 0).all() and (lse[:, :, :16] == -torch.inf).all()


@pytest.mark.usefixtures("poisoned", "launches")
def test_kernels_where_all_indices_count() -> None:
    problem = Problem(40, 70, density=0)
    problem.indices, problem.counts = problem.indices[..., :1], None
    assert_kernels_agree(problem)


@pytest.mark.usefixtures("poisoned", "launches")
def test_kernels_at_scores_far_from_zero() -> None:
    """Hidden keys score 0: they must not matter where all others are far below."""
    problem = Problem(20, 20, density=1)
    q, k, v = problem.qkv
    problem.qkv = 5 + q, -5 + k, v
    assert_kernels_agree(problem)


@pytest.mark.usefixtures("poisoned", "launches")
def test_kernels_do_not_read_past_the_end() -> None:
    problem = Problem(20, 37, density=1)
    want = triton.forward(*problem.qkv, *problem.blocks)[0]
    padded = [F.pad(x, (0, 0, 0, 0, 0, 12), value=torch.nan) for x in problem.qkv]
    problem.qkv = tuple(x[:, :-12] for x in padded)
    assert torch.equal(triton.forward(*problem.qkv, *problem.blocks)[0], want)
    assert_kernels_agree(problem)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(4))
def test_kernels_at_random_sizes(seed: int) -> None:
    draw = random.Random(seed)
    problem = Problem(
        length_q=draw.randint(1, 150), length_k=draw.randint(1, 150),
        block_q=draw.choice(ops.BLOCKS_Q), block_k=draw.choice(ops.BLOCKS_K),
        density=draw.random(), empty_rows=draw.random() < 0.3,
    )  # fmt: skip
    assert_kernels_agree(problem)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_branch_kernel(feature_map: str, dim: int) -> None:
    problem = Problem(20, 33, dim=dim, heads=2)
    linear = problem.linear()
    if feature_map == "relu":
        linear[0][:, :, 3], linear[1][:, :, 3] = 0, 0  # a feature that no key has
    got, _ = triton.forward(*problem.qkv, *problem.blocks, *linear, feature_map)
    want, _ = reference.forward(*problem.qkv, *problem.blocks, *linear, feature_map)
    assert relative_error(got, want) <= 1e-3


@pytest.mark.usefixtures("poisoned")
def test_linear_branch_kernel_does_not_overflow() -> None:
    """Sums over a long sequence exceed float16's range."""
    problem = Problem(16, 16)
    means, k_sum, bias = problem.linear()
    linear = means, 1e6 * k_sum, bias
    got, _ = triton.forward(*problem.qkv, *problem.blocks, *linear, "elu")
    want, _ = reference.forward(*problem.qkv, *problem.blocks, *linear, "elu")
    assert relative_error(got, want) <= 1e-3


def test_tma_needs_aligned_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 40, 3, 16).half()
    assert not tma.can_describe(x)  # not on a GPU that has it
    monkeypatch.setattr(tma, "is_large", lambda x: True)
    assert tma.can_describe(x, x[:, :, :2], x[:, 1:], x.transpose(1, 2))
    for odd in (x[..., 1:9], torch.zeros(2, 40, 3, 17).half()[..., :16], x[:, :1].expand_as(x)):
        assert not tma.can_describe(x, odd)


def test_equal_inputs_give_equal_bits() -> None:
    problem = Problem(50, 40)
    first, second = (triton.forward(*problem.qkv, *problem.blocks) for _ in range(2))
    assert all(map(torch.equal, first, second))


# Every architecture.


def signature(kernel: str, dtype: str, constants: dict[str, object]) -> dict[str, str]:
    """Types of all arguments that are not constants."""
    rows = constants["STEP" if kernel == "_dkdv_kernel" else "BLOCK_K"]
    tiles = f"tensordesc<{dtype}[1, 1, {rows}, {constants['D']}]>"
    types = {"H": "i32", "Lq": "i32", "Lk": "i32", "width": "i32", "query_blocks": "i32"}
    types |= dict.fromkeys(("indices_ptr", "counts_ptr", "keepers_ptr"), "*i32")
    types |= dict.fromkeys(("k_sum_ptr", "bias_ptr"), "*fp32")
    types |= dict.fromkeys(("lse_ptr", "log2_sum_ptr", "along_out_ptr"), "*fp32")
    types |= {"scale": "fp32", "order_ptr": "*i64"}
    types |= dict.fromkeys(("q", "k", "v", "grad"), tiles if constants["TMA"] else f"*{dtype}")
    statistics = f"tensordesc<fp32[1, {rows}]>" if constants["TMA"] else "*fp32"
    types |= dict.fromkeys(("log2_sum", "along_out"), statistics)
    names = getattr(triton, kernel).arg_names
    return {
        name: types.get(name, "i32:16" if name.startswith("stride") else f"*{dtype}")
        for name in names
        if name not in constants
    }


# All architectures at the size that needs most, and one of each table at the others.
EVERYWHERE = [("LARGE", 128, 128, (90, 100)), ("SMALL", 128, 128, (80, 86, 89, 120))]
OTHER_SIZES = [
    (table, dim, block_q, architectures)
    for table, architectures in (("LARGE", (90,)), ("SMALL", (86,)))
    for dim, block_q in ((64, 64), (64, 128), (128, 64))
]


@pytest.mark.slow
@pytest.mark.parametrize(("table", "dim", "block_q", "architectures"), EVERYWHERE + OTHER_SIZES)
@pytest.mark.parametrize("kernel", ["forward", "linear", "dq", "dkdv"])
def test_kernels_compile(
    kernel: str, table: str, dim: int, block_q: int, architectures: tuple[int, ...]
) -> None:
    launches = getattr(triton, table)[dim, block_q]
    launch = {**launches._asdict(), "linear": launches.forward}[kernel]
    constants: dict[str, object] = {"D": dim, "BLOCK_Q": block_q, "BLOCK_K": 64}
    constants["TMA"] = table == "LARGE"
    if kernel == "dkdv":
        constants["STEP"] = launch.step
    else:
        constants["counts_ptr"] = None
    if kernel in ("forward", "linear"):
        constants["FEATURE_MAP"] = "softmax"
    if kernel == "forward":
        constants |= dict.fromkeys(("means_ptr", "k_sum_ptr", "bias_ptr"))
    name = "_forward_kernel" if kernel == "linear" else f"_{kernel}_kernel"
    assert_compiles(
        "turbodit.kernels.sparse_attention.triton", name, signature(name, "bf16", constants),
        constants, architectures, launch.num_warps, launch.num_stages, launch.registers,
    )  # fmt: skip
