"""Norms with their tangents: the reference, kernels in the interpreter, and the DiT with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.kernels.compile_only import assert_compiles
from torch.autograd import forward_ad

from turbodit.config import TransformerConfig
from turbodit.kernels import norm as plain_ops
from turbodit.kernels import norm_jvp as ops
from turbodit.kernels.forward_ad import unpack
from turbodit.kernels.norm import reference as plain
from turbodit.kernels.norm_jvp import reference
from turbodit.model.wan import WanModel

triton = pytest.importorskip("turbodit.kernels.norm_jvp.triton")

EPS = 1e-6
# What there is besides x: as in Wan, and everything at once.
USES = {
    "first": ("modulation",),
    "after-self-attention": ("update", "gate", "affine"),
    "after-cross-attention": ("update", "modulation"),
    "all": ("update", "gate", "affine", "modulation"),
    "plain": (),
}

Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The kernels run, in the interpreter, as they would on a GPU; how often which did."""
    calls = {"add_norm": 0, "rms_norm": 0}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return getattr(triton, name)(*args)

        return call

    module = SimpleNamespace(**{name: counted(name) for name in calls})
    monkeypatch.setattr(ops, "has_kernel", lambda x: x.dtype in ops.DTYPES)
    monkeypatch.setattr(ops, "implementation", lambda package, x: module)
    return calls


@dataclass
class Problem:
    """A norm's inputs and their tangents; tables are slices of one of six, as in the model."""

    width: int
    use: str = "all"
    length: int = 3
    gate_runs: int = 3
    runs: int = 3
    stream: torch.dtype = torch.float32
    values: list[torch.Tensor | None] = field(init=False)  # x, update, gate, shift, scale
    tangents: list[torch.Tensor | None] = field(init=False)
    weights: list[torch.Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        self.values, self.tangents = self._tensors(offset=5.0), self._tensors(offset=-2.0)
        self.weights = [None, None]
        if "affine" in USES[self.use]:
            self.weights = list(torch.randn(2, self.width).unbind())

    def _tensors(self, offset: float) -> list[torch.Tensor | None]:
        has, size = USES[self.use], (2, self.length, self.width)
        x = (2 * torch.randn(size) + offset).to(self.stream)
        update = torch.randn(size).half() if "update" in has else None
        gate = shift = scale = None
        if "gate" in has:
            gate = torch.randn(2, self.gate_runs, 6, self.width)[:, :, 2]
        if "modulation" in has:
            shift, scale = torch.randn(2, self.runs, 6, self.width).unbind(2)[:2]
        return [x, update, gate, shift, scale]

    def arguments(self, dtype: torch.dtype | None, double: bool = False) -> list[Any]:
        """Of the operator."""
        pairs = [t for pair in zip(self.values, self.tangents, strict=True) for t in pair]
        tensors = [*pairs[:6], *self.weights, *pairs[6:]]
        if double:
            tensors = [None if t is None else t.double() for t in tensors]
        return [*tensors, EPS, dtype]

    def by_pytorch(self, dtype: torch.dtype, double: bool = False) -> list[torch.Tensor]:
        """y and its tangent, h and its tangent as PyTorch differentiates the plain norm."""
        chosen = [i for i, value in enumerate(self.values) if value is not None]

        def cast(tensors: list[Any]) -> list[Any]:
            return [t if t is None or not double else t.double() for t in tensors]

        weight, bias = cast(self.weights)

        def run(*some: torch.Tensor) -> tuple[torch.Tensor, ...]:
            inputs: list[Any] = [None] * 5
            for i, value in zip(chosen, some, strict=True):
                inputs[i] = value
            x, update, gate, shift, scale = inputs
            if update is None:
                return plain.norm(x, weight, bias, shift, scale, EPS, dtype, None)[:1]
            return plain.add_norm(
                x, update, gate, weight, bias, shift, scale, EPS, dtype, None
            )[:2]  # fmt: skip

        primals, tangents = (
            tuple(cast([tensors[i] for i in chosen])) for tensors in (self.values, self.tangents)
        )
        outs, along = torch.func.jvp(run, primals, tangents)
        return [t for pair in zip(outs, along, strict=True) for t in pair]


def assert_as_exact(
    got: list[torch.Tensor], theirs: list[torch.Tensor], exact: list[torch.Tensor]
) -> None:
    """Errors are at most twice those of PyTorch's rules in the same precision."""
    for mine, other, want in zip(got, theirs, exact, strict=True):
        assert mine.dtype == other.dtype and mine.shape == want.shape
        assert mine.is_contiguous() and mine.isfinite().all()
        assert (mine - want).norm() <= 2 * (other - want).norm() + 1e-6 * want.norm()


# The reference.


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("gate_runs", "runs"), [(1, 1), (3, 12), (4, 6)])
def test_reference_is_the_derivative(use: str, gate_runs: int, runs: int) -> None:
    problem = Problem(20, use, 12, gate_runs, runs)
    got = reference.add_norm(*problem.arguments(torch.float64, double=True))
    want = problem.by_pytorch(torch.float64, double=True)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rotated", [False, True])
def test_reference_of_rms_norm_is_the_derivative(rotated: bool) -> None:
    x, dx = torch.randn(2, 2, 6, 24, dtype=torch.float64).unbind()
    weight, angles = torch.randn(24).double(), torch.randn(2, 6, 4).double().unbind()
    cos, sin = angles if rotated else (None, None)
    got = reference.rms_norm(x, dx, weight, EPS, cos, sin)
    want = torch.func.jvp(lambda x: plain.rms_norm(x, weight, EPS, cos, sin), (x,), (dx,))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


# Kernels.


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(  # one piece of a row, and three and two with a last one cut short
    ("width", "stream"), [(24, torch.float32), (600, torch.float32), (1000, torch.float16)]
)
def test_kernel(width: int, stream: torch.dtype, use: str) -> None:
    problem = Problem(width, use, stream=stream)
    got = triton.add_norm(*problem.arguments(torch.float16))
    theirs, exact = (problem.by_pytorch(torch.float16), problem.by_pytorch(torch.float64, True))
    assert_as_exact(got, theirs, exact)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("length", "gate_runs", "runs"), [(11, 1, 1), (12, 2, 3), (10, 1, 2)])
def test_more_rows_than_a_program_takes(length: int, gate_runs: int, runs: int) -> None:
    problem = Problem(24, "all", length, gate_runs, runs)
    got = triton.add_norm(*problem.arguments(torch.float32))
    exact = problem.by_pytorch(torch.float64, double=True)
    assert_as_exact(got, problem.by_pytorch(torch.float32), exact)
    alone = problem.arguments(None)
    alone[6:12] = [None] * 6
    assert all(map(torch.equal, triton.add_norm(*alone), got[:2]))


@pytest.mark.usefixtures("poisoned")
def test_kernel_takes_tangents_of_any_strides() -> None:
    problem = Problem(24)
    want = triton.add_norm(*problem.arguments(torch.float32))
    problem.tangents = [None if t is None else t.mT.contiguous().mT for t in problem.tangents]
    assert all(map(torch.equal, triton.add_norm(*problem.arguments(torch.float32)), want))
    x, dx, weight = torch.randn(2, 5, 24), torch.ones(()).expand(2, 5, 24), torch.randn(24)
    got = triton.rms_norm(x, dx, weight, EPS, None, None)
    want = triton.rms_norm(x, dx.contiguous(), weight, EPS, None, None)
    assert all(map(torch.equal, got, want))


@pytest.mark.usefixtures("poisoned")
def test_row_without_variance_is_finite() -> None:
    problem = Problem(24, "plain")
    problem.values[0] = torch.full_like(problem.values[0], 7.0)
    h, h_tangent = triton.add_norm(*problem.arguments(torch.float32))
    assert not h.any() and h_tangent.isfinite().all() and h_tangent.any()


def test_nan_stays_in_its_row() -> None:
    problem = Problem(24)
    problem.tangents[0][0, 1, 3] = float("nan")
    y, y_tangent, h, h_tangent = triton.add_norm(*problem.arguments(torch.float32))
    assert y.isfinite().all() and h.isfinite().all() and h_tangent[0, 1].isnan().all()
    h_tangent[0, 1] = y_tangent[0, 1] = 0
    assert y_tangent.isfinite().all() and h_tangent.isfinite().all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("heads", "half"), [(1, 12), (3, 4), (5, 32)])
@pytest.mark.parametrize("rotated", [False, True])
def test_rms_norm_kernel(heads: int, half: int, rotated: bool) -> None:
    width = 2 * heads * half
    x = (3 * torch.randn(2, 5, 3 * width)).half()[..., width : 2 * width]  # as out of one QKV
    dx, weight = torch.randn(2, 5, width).half(), torch.randn(width)
    angles = torch.rand(5, half) * 6
    cos, sin = (angles.cos(), angles.sin()) if rotated else (None, None)
    got = triton.rms_norm(x, dx, weight, EPS, cos, sin)

    def by_pytorch(dtype: torch.dtype) -> Pair:
        pair = (x.to(dtype),), (dx.to(dtype),)
        return torch.func.jvp(lambda x: plain.rms_norm(x, weight, EPS, cos, sin), *pair)

    assert_as_exact(list(got), list(by_pytorch(torch.float16)), list(by_pytorch(torch.float64)))


# The operators and their callers.


def test_opcheck() -> None:
    torch.library.opcheck(ops._add_norm_jvp, Problem(16, "first").arguments(torch.bfloat16))
    alone = Problem(16).arguments(None)
    alone[6:12] = [None] * 6
    torch.library.opcheck(ops._add_norm_jvp, alone)
    x, dx = torch.randn(2, 2, 6, 16).unbind()
    angles = torch.randn(2, 6, 4).unbind()
    torch.library.opcheck(ops._rms_norm_jvp, (x, dx, torch.randn(16), EPS, *angles))


@pytest.mark.parametrize("given", [(0,), (1, 2), (3,), (0, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("api", ["func", "dual_level"])
def test_norms_pass_tangents_on(
    kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch, api: str, given: tuple[int, ...]
) -> None:
    """Whichever of x, update, gate, shift and scale has one."""
    problem = Problem(24)
    weight, bias = problem.weights
    angles = torch.randn(2, 3, 4).unbind()

    def run(*some: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = list(problem.values)
        for i, value in zip(given, some, strict=True):
            inputs[i] = value
        x, update, gate, shift, scale = inputs
        names = {"weight": weight, "bias": bias, "shift": shift, "scale": scale}
        y, h = plain_ops.add_norm(x, update, gate, **names, eps=EPS, out=torch.float32)
        z = plain_ops.gated_add(y, h, gate)
        h = plain_ops.norm(z, **names, eps=EPS, out=torch.float32)
        return y, z, h, plain_ops.rms_norm(h, weight, EPS, angles)

    primals = tuple(problem.values[i] for i in given)
    tangents = tuple(problem.tangents[i] for i in given)

    def jvp() -> list[torch.Tensor]:
        if api == "func":
            outs, along = torch.func.jvp(run, primals, tangents)
            return [*outs, *along]
        with forward_ad.dual_level():
            pairs = map(unpack, run(*map(forward_ad.make_dual, primals, tangents)))
            outs, along = zip(*pairs, strict=True)
            return [t.clone() for t in (*outs, *along)]

    with torch.no_grad():
        got = jvp()
        assert kernels == {"add_norm": 3, "rms_norm": 1}
        monkeypatch.setattr(ops, "has_kernel", lambda x: False)
        want = jvp()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moving", ["gradient", "weight"])
def test_what_kernels_lack_the_reference_has(kernels: dict[str, int], moving: str) -> None:
    """Gradients of what has a tangent, and tangents of weights."""
    x, dx, weight, dweight = torch.randn(4, 2, 6, 16).unbind()
    weight, dweight = weight[0, 0], dweight[0, 0]
    x.requires_grad_(moving == "gradient")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, dx)
        if moving == "weight":
            weight = forward_ad.make_dual(weight, dweight)
        got = unpack(plain_ops.rms_norm(dual, weight, EPS))
        want = unpack(plain.rms_norm(dual, weight, EPS, None, None))
        assert all(map(torch.equal, got, want)) and not kernels["rms_norm"]
        if moving == "gradient":
            got[1].square().sum().backward()
            assert x.grad is not None and x.grad.any()


def test_kernels_are_for_gpus() -> None:
    assert not ops.has_kernel(torch.zeros(2, 6, 16))


# The whole model.


@torch.no_grad()
@pytest.mark.parametrize(("autocast", "per_frame"), [(False, True), (True, False)])
def test_whole_model(
    kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch, autocast: bool, per_frame: bool
) -> None:
    """As exact as without kernels; with float32 weights and products in half precision, too, as
    training has them. (The interpreter truncates to bfloat16 instead of rounding: float16.)"""
    config = TransformerConfig(
        dim=24, ffn_dim=40, num_heads=2, num_layers=1, text_dim=12, text_len=7, freq_dim=32
    )
    model = WanModel(config)
    for name, p in model.named_parameters():
        is_scale = "norm" in name and "weight" in name
        torch.nn.init.normal_(p, mean=1.0 if is_scale else 0.0, std=0.2)
    latents, direction = torch.randn(2, 2, 16, 2, 2, 6).unbind()
    t, t_tangent = torch.tensor([0.9, 0.3]), torch.tensor([0.02, -0.04])
    if per_frame:
        t, t_tangent = t[:, None].repeat(1, 2), t_tangent[:, None].repeat(1, 2)
        t[:, 0], t_tangent[:, 0] = 0, 0
    context = torch.randn(2, 7, 12)

    def jvp(dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.float16, enabled=autocast), forward_ad.dual_level():
            x = forward_ad.make_dual(latents.to(dtype), direction.to(dtype))
            out = model(x, forward_ad.make_dual(t, t_tangent), context.to(dtype))
            return [part.clone() for part in forward_ad.unpack_dual(out)]

    got = jvp(torch.float32, autocast)
    # Three norms, an addition, q and k, q of cross attention; and the head's norm.
    assert kernels == {"add_norm": 4 + 1, "rms_norm": 3}
    monkeypatch.setattr(ops, "has_kernel", lambda x: False)
    theirs = jvp(torch.float32, autocast)
    model.double()
    exact = jvp(torch.float64, autocast=False)
    for mine, other, want in zip(got, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - want).norm() <= 2 * (other - want).norm() + 1e-6 * want.norm()
        assert (mine - want).norm() <= 0.01 * want.norm()


# Every architecture.


@pytest.mark.parametrize("width", [1536, 5120])
def test_kernel_compiles(width: int) -> None:
    """With all that there can be."""
    tables = ("gate", "dgate", "weight", "bias", "shift", "dshift", "scale", "dscale")
    pointers = dict.fromkeys((f"{name}_ptr" for name in tables), "*fp32")
    pointers |= dict.fromkeys(("x_ptr", "dx_ptr", "y_ptr", "dy_ptr"), "*fp32")
    pointers |= dict.fromkeys(("update_ptr", "dupdate_ptr", "out_ptr", "dout_ptr"), "*bf16")
    integers = ("length", "run", "gate_b", "gate_n", "stride_b", "stride_n")
    warps = triton._warps(width)
    assert_compiles(
        "turbodit.kernels.norm_jvp.triton",
        "_add_norm_kernel",
        {**pointers, **dict.fromkeys(integers, "i32"), "eps": "fp32"},
        {"D": width, "WIDTH": triton._piece(warps), "ROWS": triton.ROWS},
        architectures=(80, 90),
        num_warps=warps,
    )


def test_rms_norm_kernel_compiles_everywhere() -> None:
    pointers = dict.fromkeys(("x_ptr", "dx_ptr", "out_ptr", "dout_ptr"), "*bf16")
    pointers |= dict.fromkeys(("weight_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    integers = ("length", "stride_b", "stride_l", "dx_b", "dx_l")
    assert_compiles(
        "turbodit.kernels.norm_jvp.triton",
        "_rms_norm_kernel",
        {**pointers, **dict.fromkeys(integers, "i32"), "eps": "fp32"},
        {"D": 1536, "HALF": 64, "WIDTH": 2048},
        num_warps=triton._rms_warps(2048),
    )
