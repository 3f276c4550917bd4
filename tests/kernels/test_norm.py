"""Fused norms: the reference against its definition, and kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.kernels.compile_only import assert_compiles

from turbodit.kernels import norm as ops
from turbodit.kernels.norm import reference
from turbodit.kernels.quantized_linear import Quantized
from turbodit.kernels.quantized_linear.reference import dequantize

triton = pytest.importorskip("turbodit.kernels.norm.triton")

WIDTHS = (24, 600, 1000)  # one piece of a row, and two and three with a last one cut short
EPS = 1e-6
OPTIONS = ("plain", "affine", "modulated", "both")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def vectors(option: str, width: int, runs: int, batch: int = 2) -> list[torch.Tensor | None]:
    """weight, bias, shift, scale; the last two as slices of a table of six, as in the model."""
    weight = bias = shift = scale = None
    if option in ("affine", "both"):
        weight, bias = torch.randn(2, width).unbind()
    if option in ("modulated", "both"):
        shift, scale = torch.randn(batch, runs, 6, width).unbind(2)[:2]
    return [weight, bias, shift, scale]


def exact(x: torch.Tensor, vectors: list[torch.Tensor | None], runs: int) -> torch.Tensor:
    """LayerNorm and modulation token by token in float64."""
    weight, bias, shift, scale = vectors
    x = x.double()
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    if weight is not None and bias is not None:
        h = h * weight + bias
    if shift is not None and scale is not None:
        of = torch.arange(x.shape[1]) // (x.shape[1] // runs)
        h = h * (1 + scale[:, of]) + shift[:, of]
    return h


# The reference, against the definition.


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("runs", [1, 3, 12])
def test_norm_is_its_definition(option: str, runs: int) -> None:
    x = 3 * torch.randn(2, 12, 20) + 5
    given = vectors(option, 20, runs)
    names = dict(zip(("weight", "bias", "shift", "scale"), given, strict=True))
    got = ops.norm(x, **names, eps=EPS, out=torch.float32)
    torch.testing.assert_close(got.double(), exact(x, given, runs), rtol=1e-5, atol=1e-5)


def test_norm_is_taken_of_the_rounded_sum() -> None:
    x = torch.randn(2, 6, 20).bfloat16()
    update, gate = torch.randn(2, 6, 20).bfloat16(), torch.randn(2, 3, 20)
    y, h = ops.add_norm(x, update, gate, eps=EPS, out=torch.float32)
    wide = x.double() + update.double() * gate.double().repeat_interleave(2, 1)
    assert y.dtype == torch.bfloat16 and torch.equal(ops.gated_add(x, update, gate), y)
    torch.testing.assert_close(y.double(), wide, rtol=2**-8, atol=1e-6)
    none = [None] * 4
    torch.testing.assert_close(h.double(), exact(y, none, 1), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_formula() -> None:
    x, update = torch.randn(2, 2, 6, 8, dtype=torch.float64).unbind()
    gate, shift, scale = torch.randn(3, 2, 3, 8, dtype=torch.float64).unbind()
    weight, bias = torch.randn(2, 8, dtype=torch.float64).unbind()
    inputs = [x, update, gate, weight, bias, shift, scale]
    for tensor in inputs:
        tensor.requires_grad_()

    def run(x, update, gate, weight, bias, shift, scale):
        vectors = {"weight": weight, "bias": bias, "shift": shift, "scale": scale}
        return ops.add_norm(x, update, gate, **vectors, eps=EPS, out=torch.float64)

    assert torch.autograd.gradcheck(run, inputs)
    angles = torch.randn(2, 6, 2, dtype=torch.float64).unbind()
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, EPS, angles), [x, weight])


@pytest.mark.parametrize("format", ops.ROW_FORMATS)
def test_quantised_norm_is_the_norm_quantised(format: str) -> None:
    x = torch.randn(2, 6, 40)
    got = ops.norm(x, eps=EPS, out=format)
    want = ops.norm(x, eps=EPS, out=torch.float32)
    assert isinstance(got, Quantized) and got.scale.shape == (2, 6, 1)
    step = got.scale * (0.5 if format == "int8-channel" else 16)
    assert ((dequantize(*got, format) - want).abs() <= 1.001 * step).all()


# Kernels, against the reference.


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("stream", [torch.float32, torch.float16])
def test_add_norm_kernel(width: int, option: str, stream: torch.dtype, poisoned: None) -> None:
    runs = 3
    x = (2 * torch.randn(2, 6, width) + 5).to(stream)
    update, gate = torch.randn(2, 6, width).half(), torch.randn(2, runs, 6, width)[:, :, 1]
    given = vectors(option, width, runs)
    got = triton.add_norm(x, update, gate, *given, EPS, torch.float16, None)
    want = reference.add_norm(x, update, gate, *given, EPS, torch.float16, None)
    torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=2e-3, atol=4e-3)
    torch.testing.assert_close(triton.add(x, update, gate), got[0], rtol=0, atol=0)
    torch.testing.assert_close(triton.add(x, update, None), reference.add(x, update, None))
    alone = triton.norm(got[0], *given, EPS, torch.float16, None)[0]
    torch.testing.assert_close(alone, got[1], rtol=0, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("format", ops.ROW_FORMATS)
def test_quantising_norm_kernel(width: int, format: str, poisoned: None) -> None:
    x = torch.randn(2, 3, width) + 1
    x[1, 1] = 7.0  # a row without variance: zeros, not NaN
    given = vectors("modulated", width, 1)
    given[2] = torch.zeros_like(given[2])
    values, scales = triton.norm(x, *given, EPS, None, format)
    exact_values, exact_scales = reference.norm(x, *given, EPS, None, format)
    torch.testing.assert_close(scales[0], exact_scales[0], rtol=1e-5, atol=0)
    steps = (values.float() - exact_values.float()).abs()
    # The interpreter's cast to fp8 does not round to the nearest: up to two steps of 32.
    largest = 1 if format == "int8-channel" else 64
    assert steps[0].max() <= largest and steps[0].mean() < 0.05 * largest
    assert not values[1, 1].float().any() and scales[1, 1].isfinite().all()


def test_nan_reaches_the_output() -> None:
    x = torch.randn(1, 3, 24)
    x[0, 1, 3] = float("nan")
    for run in (triton, reference):
        out, scales = run.norm(x, None, None, None, None, EPS, None, "int8-channel")
        assert scales[0, 1].isnan() and scales[0, [0, 2]].isfinite().all()
        out, _ = run.norm(x, None, None, None, None, EPS, torch.float16, None)
        assert out[0, 1].isnan().all() and out[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize(("heads", "half"), [(1, 12), (3, 4), (5, 32)])
@pytest.mark.parametrize("rotated", [False, True])
def test_rms_norm_kernel(heads: int, half: int, rotated: bool, poisoned: None) -> None:
    width = 2 * heads * half
    x = (3 * torch.randn(2, 5, 3 * width)).half()[..., width : 2 * width]  # as out of one QKV
    weight = torch.randn(width)
    angles = torch.rand(5, half) * 6
    cos, sin = (angles.cos(), angles.sin()) if rotated else (None, None)
    got = triton.rms_norm(x, weight, EPS, cos, sin)
    want = reference.rms_norm(x, weight, EPS, cos, sin)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3)
    assert triton.rms_norm(x, weight, EPS, cos, sin, out=x) is x
    torch.testing.assert_close(x, got, rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_rms_norm_in_place(transposed: bool) -> None:
    x = torch.randn(2, 6, 8)
    x = x.mT.contiguous().mT if transposed else x
    before, weight = x.clone(), torch.randn(8)
    got = ops.rms_norm(x, weight, EPS, in_place=True)
    torch.testing.assert_close(got, reference.rms_norm(before, weight, EPS, None, None))
    assert (got is x) != transposed and torch.equal(x, before) == transposed
    x = before.clone()
    ops.rms_norm(x, weight.requires_grad_(), EPS, in_place=True).sum().backward()
    assert torch.equal(x, before) and weight.grad.any()


# The operators.


def test_more_rows_than_a_program_takes(poisoned: None) -> None:
    for length, gate_runs, runs in ((19, 1, 1), (36, 2, 3), (40, 1, 2)):
        x, update = torch.randn(2, 2, length, 24).unbind()
        gate = torch.randn(2, gate_runs, 24)
        given = vectors("both", 24, runs)
        got = triton.add_norm(x, update, gate, *given, EPS, torch.float32, None)
        want = reference.add_norm(x, update, gate, *given, EPS, torch.float32, None)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    x, update = torch.randn(2, 2, 6, 16).unbind()
    weight, bias, shift, scale = vectors("both", 16, 3)
    gate, angles = torch.randn(2, 3, 16), torch.randn(2, 6, 4).unbind()
    norm = torch.ops.turbodit
    for dtype, format in ((torch.bfloat16, None), (None, "int8-channel"), (None, "fp8-channel")):
        torch.library.opcheck(norm.norm, (x, weight, bias, shift, scale, EPS, dtype, format))
        torch.library.opcheck(
            norm.add_norm, (x, update, gate, weight, bias, None, None, EPS, dtype, format)
        )
    torch.library.opcheck(norm.gated_add, (x, update, None))
    torch.library.opcheck(norm.rms_norm, (x, weight, EPS, *angles))
    torch.library.opcheck(norm.rms_norm_in_place, (x.clone(), weight, EPS, *angles))


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(2, 6, 16), torch.randn(16, requires_grad=True)
    table = torch.randn(2, 4, 16)
    with pytest.raises(ValueError, match=r"must both be \(B, L, D\)"):
        ops.add_norm(x, x[:, :5], eps=EPS, out=torch.float32)
    with pytest.raises(ValueError, match=r"n dividing 6, got \(2, 4, 16\)"):
        ops.norm(x, shift=table, scale=table, eps=EPS, out=torch.float32)
    with pytest.raises(ValueError, match="come together"):
        ops.norm(x, weight=weight, eps=EPS, out=torch.float32)
    with pytest.raises(ValueError, match="int8-channel, fp8-channel; got 'int8-block'"):
        ops.norm(x, eps=EPS, out="int8-block")
    with pytest.raises(ValueError, match="has no gradient"):
        ops.norm(x, weight=weight, bias=weight, eps=EPS, out="int8-channel")
    with pytest.raises(ValueError, match=r"got \(6, 3\)"):
        ops.rms_norm(x, weight, EPS, tuple(torch.randn(2, 6, 3)))


@pytest.mark.parametrize("format", [None, "int8-channel", "fp8-channel"])
@pytest.mark.parametrize("width", [1536, 5120])
def test_norm_kernel_compiles_everywhere(format: str | None, width: int) -> None:
    out = {None: "*bf16", "int8-channel": "*i8", "fp8-channel": "*fp8e4nv"}[format]
    pointers = dict.fromkeys(
        ("gate_ptr", "shift_ptr", "scale_ptr", "weight_ptr", "bias_ptr"), "*fp32"
    )
    pointers |= {"x_ptr": "*bf16", "update_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": out}
    integers = ("length", "run", "gate_b", "gate_n", "stride_b", "stride_n")
    warps = triton._warps(width)
    constants = {"D": width, "WIDTH": triton._piece(warps), "ROWS": triton.ROWS}
    constants["FP8"] = format == "fp8-channel"
    if format is None:
        constants["out_scale_ptr"] = None
    else:
        pointers["out_scale_ptr"] = "*fp32"
    assert_compiles(
        "turbodit.kernels.norm.triton",
        "_norm_kernel",
        {**pointers, **dict.fromkeys(integers, "i32"), "eps": "fp32"},
        constants,
        architectures=(89, 90, 100, 120) if format == "fp8-channel" else (80, 86, 89, 90, 100, 120),
        num_warps=warps,
    )


@pytest.mark.parametrize("width", [1536, 5120])
def test_rms_norm_kernel_compiles_everywhere(width: int) -> None:
    pointers = {"x_ptr": "*bf16", "out_ptr": "*bf16"}
    pointers |= dict.fromkeys(("weight_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    integers = dict.fromkeys(("length", "stride_b", "stride_l", "out_b", "out_l"), "i32")
    padded = 1 << (width - 1).bit_length()
    assert_compiles(
        "turbodit.kernels.norm.triton",
        "_rms_norm_kernel",
        {**pointers, **integers, "eps": "fp32"},
        {"D": width, "HALF": 64, "WIDTH": padded},
        num_warps=triton._rms_warps(padded),
    )
