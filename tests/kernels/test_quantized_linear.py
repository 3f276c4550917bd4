"""8-bit linear layers: the reference, and the kernels in the interpreter.

The interpreter's conversion to e4m3 rounds wrongly, so there fp8 is tested with values that
need no rounding; `tests/gpu` tests its rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.compile_only import ARCHITECTURES, assert_compiles

from turbodit.kernels import quantized_linear as ops
from turbodit.kernels.quantized_linear import FORMATS, Quantized, reference

triton = pytest.importorskip("turbodit.kernels.quantized_linear.triton")

EPS = 2.0**-24  # of rounding to float32
LARGEST = {"int8-block": 128, "int8-channel": 127, "fp8-channel": 448}
SHAPES = [(1, 128, 128), (127, 256, 40), (129, 130, 257), (5, 1000, 3), (2, 1, 1), (16, 48, 128)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def spread(rows: int, columns: int) -> torch.Tensor:
    """Rows and columns of very different size, in float32."""
    return torch.randn(rows, columns) * torch.randn(rows, 1).exp() * torch.randn(columns).exp()


def representable(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x that is e4m3 values times a power of two for each row, those values and those powers."""
    values = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8)
    values = values.view(torch.float8_e4m3fn).float() * torch.randn(rows, columns).sign()
    values[:, 0] = 448
    scale = 2.0 ** torch.randint(-20, 20, (rows, 1))
    return values * scale, values.to(torch.float8_e4m3fn), scale


def exact(
    x: Quantized, weight: Quantized, bias: torch.Tensor | None, format: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float64, and the sum of the magnitudes of what is added up in float32."""
    a, b = (side.values.double().flatten(0, -2) for side in (x, weight))
    y = magnitude = torch.zeros(len(a), len(b), dtype=torch.float64)
    if format == "int8-block":
        for k, (rows, columns) in enumerate(zip(a.split(128, 1), b.split(128, 1), strict=True)):
            of_x, of_w = (
                side.scale.double()[:, k].repeat_interleave(128)[: len(values)]
                for side, values in ((x, a), (weight, b))
            )
            term = rows @ columns.t() * of_x[:, None] * of_w
            y, magnitude = y + term, magnitude + term.abs()
    else:
        scale = x.scale.double().reshape(-1, 1) * weight.scale.double().reshape(-1)
        y = a @ b.t() * scale
        # Integers add up without rounding.
        magnitude = a.abs() @ b.t().abs() * scale if format == "fp8-channel" else y.abs()
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return y, magnitude


def assert_exact(
    y: torch.Tensor,
    x: Quantized,
    weight: Quantized,
    bias: torch.Tensor | None,
    format: str,
    roundings: float = 0,
) -> None:
    """y float32 is the definition, but for rounding when blocks of K and the bias are added."""
    want, magnitude = exact(x, weight, bias, format)
    blocks = x.scale.shape[-1] if format == "int8-block" else 1
    assert y.dtype == torch.float32 and y.shape == (*x.values.shape[:-1], len(weight.values))
    error = (y.flatten(0, -2).double() - want).abs()
    assert (error <= (2 * blocks + 4 + roundings) * EPS * magnitude).all()


def operands(m: int, k: int, n: int, format: str) -> tuple[Quantized, Quantized, torch.Tensor]:
    x, weight = (Quantized(*reference.quantize(spread(rows, k), format)) for rows in (m, n))
    return x, weight, torch.randn(n)


# The reference, against the definition.


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (127, 100), (129, 257), (256, 128)])
def test_values_times_scales_are_x_but_for_rounding(rows: int, columns: int, format: str) -> None:
    x = spread(rows, columns)
    values, scale = ops.quantize_activation(x, format)
    assert values.shape == x.shape and values.dtype == ops.DTYPES[format]
    assert scale.shape == ops.scale_shape(x.shape, format) and scale.dtype == torch.float32
    error = (reference.dequantize(values, scale, format) - x).abs()
    if format == "fp8-channel":
        # Half a unit of three bits, or of the smallest value.
        assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()
        return
    unit = reference.dequantize(torch.ones_like(values), scale, format)
    # int8-block has no 128: what rounds to it loses up to one unit.
    halves = torch.where((x / unit > 127) & (format == "int8-block"), 2, 1)
    assert (error <= unit * halves * 0.5 * (1 + 1e-5)).all()
    assert values.abs().max() >= 127


@pytest.mark.parametrize("format", FORMATS)
def test_a_scale_is_the_largest_magnitude_over_a_constant(format: str) -> None:
    x = spread(300, 260)
    scale = ops.quantize_activation(x, format).scale
    height, width = (128, 128) if format == "int8-block" else (1, 260)
    assert scale.shape == (-(-300 // height), -(-260 // width))
    for i, rows in enumerate(x.split(height)):
        for j, block in enumerate(rows.split(width, dim=1)):
            want = block.abs().max().item() / LARGEST[format]
            assert scale[i, j].item() == pytest.approx(want, rel=2 * EPS)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_what_is_almost_zero_have_scale_one(format: str) -> None:
    for x in (torch.zeros(130, 140), torch.full((130, 140), 1e-31), torch.zeros(0, 140)):
        values, scale = ops.quantize_activation(x, format)
        assert (scale == 1).all() and (values.float() == 0).all()
    x = torch.full((3, 5), 1e-29)
    values, scale = ops.quantize_activation(x, format)
    torch.testing.assert_close(reference.dequantize(values, scale, format), x, rtol=0.01, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_lost(bad: float, format: str) -> None:
    x = torch.randn(130, 140)
    x[3, 133] = bad
    activation = ops.quantize_activation(x, format)
    weight = ops.quantize_weight(torch.randn(7, 140), format)
    y = ops.quantized_linear(activation, weight, None, format, torch.float32)
    touched = 128 if format == "int8-block" else 1
    first = 0 if format == "int8-block" else 3
    assert not y[first : first + touched].isfinite().any()
    assert y[first + touched :].isfinite().all() and y[:first].isfinite().all()


def test_gelu_is_taken_in_float32_before_quantising() -> None:
    x = torch.randn(20, 30).half()
    for format in FORMATS:
        got = ops.quantize_activation(x, format, "gelu")
        want = ops.quantize_activation(F.gelu(x.float(), approximate="tanh"), format)
        assert torch.equal(got.values.float(), want.values.float())
        assert torch.equal(got.scale, want.scale)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "k", "n"), [*SHAPES, (300, 2100, 140)])
def test_linear_is_exact(
    m: int, k: int, n: int, format: str, vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not vnni:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    x, weight, bias = operands(m, k, n, format)
    for b in (None, bias, bias.bfloat16()):
        y = ops.quantized_linear(x, weight, b, format, torch.float32)
        assert_exact(y, x, weight, b, format, roundings=16)


@pytest.mark.parametrize("format", ["int8-block", "int8-channel"])
def test_the_largest_sums_are_exact(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = torch.full((3, 16384), -128, dtype=torch.int8)
    shape = ops.scale_shape(lowest.shape, format)
    side = Quantized(lowest, torch.ones(shape))
    for vnni in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: vnni)
        y = ops.quantized_linear(side, side, None, format, torch.float32)
        assert (y == 128 * 128 * 16384).all()


@pytest.mark.parametrize("format", FORMATS)
def test_leading_dimensions_and_dtypes(format: str) -> None:
    x = torch.randn(2, 3, 70, 140)
    weight = ops.quantize_weight(torch.randn(50, 140).double(), format)
    activation = ops.quantize_activation(x.transpose(1, 2), format)
    flat = ops.quantize_activation(x.transpose(1, 2).reshape(-1, 140), format)
    want = ops.quantized_linear(flat, weight, None, format, torch.float32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        y = ops.quantized_linear(activation, weight, None, format, dtype)
        assert y.shape == (2, 70, 3, 50)
        assert torch.equal(y.reshape(-1, 50), want.to(dtype))
    one = ops.quantize_activation(x[0, 0, 0], format)
    assert ops.quantized_linear(one, weight, None, format, torch.float32).shape == (50,)
    empty = ops.quantize_activation(x[:0], format)
    assert ops.quantized_linear(empty, weight, None, format, torch.float32).shape == (0, 3, 70, 50)


def test_errors_say_what_is_expected() -> None:
    x, weight, bias = operands(5, 16, 8, "int8-channel")
    other = operands(5, 16, 8, "fp8-channel")[1]
    f32 = torch.float32
    with pytest.raises(ValueError, match="unknown 8-bit format 'int4'; supported: int8-block"):
        ops.quantize_weight(bias, "int4")
    with pytest.raises(ValueError, match=r"a weight is floating \(N, K\)"):
        ops.quantize_weight(bias, "int8-block")
    with pytest.raises(ValueError, match="NaN or infinite"):
        ops.quantize_weight(torch.full((2, 2), 1e300, dtype=torch.float64), "int8-block")
    with pytest.raises(ValueError, match="unknown activation 'relu'; supported: none, gelu"):
        ops.quantize_activation(bias, "int8-block", "relu")
    with pytest.raises(ValueError, match=r"activations are \(\.\.\., K\).*got torch.int64"):
        ops.quantize_activation(torch.zeros(2, 2).long(), "int8-block")
    with pytest.raises(ValueError, match="x has K = 12, and the weight K = 16"):
        short = Quantized(x.values[:, :12], x.scale)
        ops.quantized_linear(short, weight, bias, "int8-channel", f32)
    with pytest.raises(ValueError, match=r"weight has torch\.float8_e4m3fn"):
        ops.quantized_linear(x, other, bias, "int8-channel", f32)
    with pytest.raises(ValueError, match=r"have scales \(1, 1\), x has \(5, 1\)"):
        ops.quantized_linear(x, weight, bias, "int8-block", f32)
    with pytest.raises(ValueError, match=r"a bias is floating \(8,\)"):
        ops.quantized_linear(x, weight, bias[:3], "int8-channel", f32)
    with pytest.raises(ValueError, match=r"expected x \(\.\.\., K\) and weight \(N, K\)"):
        ops.quantized_linear(x, Quantized(bias.char(), bias), bias, "int8-channel", f32)
    with pytest.raises(ValueError, match=r"the output is one of float32.*got torch\.int32"):
        ops.quantized_linear(x, weight, bias, "int8-channel", torch.int32)
    with pytest.raises(ValueError, match="implementation='triton' is for GPUs"):
        ops.quantized_linear(x, weight, bias, "int8-channel", f32, "triton")


@pytest.mark.parametrize("format", FORMATS)
def test_ops_are_well_formed(format: str) -> None:
    x, weight, bias = operands(5, 140, 8, format)
    # The others compare values of e4m3, which PyTorch cannot.
    checks = ("test_faketensor", "test_autograd_registration")
    if format != "fp8-channel":
        checks += ("test_schema", "test_aot_dispatch_dynamic")
    for activation in ops.ACTIVATIONS:
        arguments = (spread(6, 140).view(3, 2, 140).transpose(0, 1), format, activation)
        torch.library.opcheck(ops._quantize_activation, arguments, test_utils=checks)
    for b in (bias, None):
        arguments = (*x, *weight, b, format, torch.float16, None)
        torch.library.opcheck(ops._quantized_linear, arguments, test_utils=checks)
        if format == "fp8-channel":
            arguments = (*x, *weight, b, torch.float16, None)
            torch.library.opcheck(ops._gelu_linear, arguments, test_utils=checks)


# A product that ends with GELU.


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("m", "k", "n"), [(1, 128, 64), (127, 48, 100), (2, 1, 1)])
def test_gelu_linear_is_the_definition(m: int, k: int, n: int) -> None:
    x, weight, bias = operands(m, k, n, "fp8-channel")
    for b in (bias, bias.bfloat16(), None):
        values, scale = ops.gelu_linear(x, weight, b, torch.float32)
        y, magnitude = exact(x, weight, b, "fp8-channel")
        h = F.gelu(y, approximate="tanh")
        assert values.shape == (m, n) and values.dtype == torch.float8_e4m3fn
        largest = h.abs().amax(-1, keepdim=True)
        # What GELU makes of a rounding of y is at most 1.13 times as large.
        rounding = 20 * EPS * magnitude * 1.13 + 2 * EPS
        assert scale.shape == (m, 1) and scale.dtype == torch.float32
        assert ((scale * 448 - largest).abs() <= rounding.amax(-1, keepdim=True) * 2).all()
        step = torch.maximum(h.abs() / 16, scale / 1024)
        assert ((values.double() * scale - h).abs() <= step * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_linear_on_a_cpu_is_its_two_parts(dtype: torch.dtype) -> None:
    x, weight, bias = operands(60, 40, 70, "fp8-channel")
    x = Quantized(x.values.view(2, 30, 40), x.scale.view(2, 30, 1))
    got = ops.gelu_linear(x, weight, bias, dtype)
    y = ops.quantized_linear(x, weight, bias, "fp8-channel", dtype)
    want = ops.quantize_activation(y, "fp8-channel", "gelu")
    assert got.values.shape == (2, 30, 70) and torch.equal(got.scale, want.scale)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gelu_linear_keeps_what_is_not_finite(bad: float) -> None:
    x, weight, bias = operands(5, 40, 70, "fp8-channel")
    x.scale[3] = bad
    got = ops.gelu_linear(x, weight, bias, torch.bfloat16)
    assert got.scale.isfinite().flatten().tolist() == [True, True, True, False, True]
    assert got.values[[0, 1, 2, 4]].float().isfinite().all()


def test_gelu_linear_refuses_what_it_cannot_do() -> None:
    x, weight, bias = operands(5, 40, 70, "int8-channel")
    with pytest.raises(ValueError, match=r"fp8-channel has torch.float8_e4m3fn values and float32"):
        ops.gelu_linear(x, weight, bias, torch.float32)
    x, weight, bias = operands(5, 40, 70, "fp8-channel")
    with pytest.raises(ValueError, match=r"a bias is floating \(70,\), got"):
        ops.gelu_linear(x, weight, bias[:3], torch.float32)
    with pytest.raises(ValueError, match="the output is one of"):
        ops.gelu_linear(x, weight, bias, torch.float64)
    with pytest.raises(ValueError, match="implementation='hopper' is for GPUs"):
        ops.gelu_linear(x, weight, bias, torch.float32, "hopper")


# The kernels, against the reference and the definition.
# In NumPy, which the interpreter computes with, infinities and NaN are worth a warning.
numpy = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 100, 256, 1000, 1536, 8960, 16384])
def test_quantize_rows_kernel(columns: int, dtype: torch.dtype) -> None:
    wide = spread(4, columns + 8).to(dtype)
    wide[2] = 0
    for x in (wide[:, :columns], wide[:, :columns].t().contiguous().t(), wide[:1, :columns]):
        got = triton.quantize_activation(x, "int8-channel", "none")
        want = reference.quantize(x, "int8-channel")
        assert all(map(torch.equal, got, want))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("columns", [1, 100, 300, 1000])
def test_quantize_rows_kernel_in_fp8(columns: int) -> None:
    x, values, scale = representable(4, columns)
    got_values, got_scale = triton.quantize_activation(x, "fp8-channel", "none")
    assert torch.equal(got_scale, scale)
    # -0 and 0 are equal.
    assert torch.equal(got_values.float(), values.float())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (127, 128), (129, 130), (128, 300)])
def test_quantize_blocks_kernel(rows: int, columns: int) -> None:
    x = spread(rows, columns + 8)[:, :columns]
    x[:, 128:256] = 0
    got = triton.quantize_activation(x, "int8-block", "none")
    assert all(map(torch.equal, got, reference.quantize(x, "int8-block")))


@numpy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("format", ["int8-block", "int8-channel"])
def test_gelu_in_kernels(format: str) -> None:
    x = torch.randn(130, 300) * torch.randn(130, 1).exp()
    got = triton.quantize_activation(x, format, "gelu")
    want = reference.quantize_activation(x, format, "gelu")
    torch.testing.assert_close(got[1], want[1], rtol=4 * EPS, atol=0)
    # Where x / s lies between two integers, another rounding of GELU chooses the other one.
    difference = (got[0].int() - want[0].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


@numpy
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_the_scale(bad: float, format: str) -> None:
    x = torch.randn(130, 140)
    x[3, 133] = bad
    scale = triton.quantize_activation(x, format, "none")[1]
    want = reference.quantize(x, format)[1]
    torch.testing.assert_close(scale, want, rtol=0, atol=0, equal_nan=True)
    assert (~scale.isfinite()).sum() == 1


def test_tiny_rows_in_kernels() -> None:
    for size in (0.0, 1e-31, 1e-29):
        x = torch.full((3, 5), size)
        for format in FORMATS:
            got, want = triton.quantize_activation(x, format, "none"), reference.quantize(x, format)
            assert torch.equal(got[0].float(), want[0].float()) and torch.equal(got[1], want[1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_matmul_kernel(m: int, k: int, n: int, format: str) -> None:
    x, weight, bias = operands(m, k, n, format)
    tile = triton.Tile(32, 64, 128, 4, 2, group=2)
    for b in (bias, None):
        y = triton.multiply(*x, *weight, b, format, torch.float32, tile)
        assert_exact(y, x, weight, b, format, roundings=16)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.skipif(triton.TensorDescriptor is None, reason="needs Triton 3.4")
@pytest.mark.parametrize("format", FORMATS)
def test_matmul_kernel_with_tma(format: str) -> None:
    for m, k, n in ((150, 208, 140), (3, 16, 5)):
        x, weight, bias = operands(m, k, n, format)
        tile = triton.Tile(64, 32, 128, 4, 2, tma=True, group=2)
        y = triton.multiply(*x, *weight, bias, format, torch.float32, tile)
        assert_exact(y, x, weight, bias, format, roundings=16)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("format", FORMATS)
def test_linear_on_a_gpu_with_leading_dimensions_and_dtypes(format: str) -> None:
    x = Quantized(*reference.quantize(spread(60, 40).view(2, 30, 40), format))
    weight = Quantized(*reference.quantize(spread(70, 40), format))
    bias = torch.randn(70).half()
    want = reference.quantized_linear(*x, *weight, bias, format, torch.float32)
    for dtype in (torch.float32, torch.float16):
        y = triton.quantized_linear(*x, *weight, bias, format, dtype)
        assert y.dtype == dtype and y.shape == (2, 30, 70)
        error = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, want.to(dtype), rtol=error, atol=error * want.std().item())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("m", "k", "n"), [(17, 16, 8), (130, 1000, 264)])
def test_int_mm_and_its_epilogue(m: int, k: int, n: int) -> None:
    x, weight, bias = operands(m, k, n, "int8-channel")
    for b in (bias, None):
        y = triton.quantized_linear(*x, *weight, b, "int8-channel", torch.float32, "int_mm")
        assert_exact(y, x, weight, b, "int8-channel")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("n", "k"), [(1, 1), (20, 300), (8, 256), (64, 48)])
def test_gelu_bound(n: int, k: int) -> None:
    weight = Quantized(*reference.quantize(spread(n, k), "fp8-channel"))
    rows = reference.dequantize(*weight, "fp8-channel").double().abs().sum(1)
    for bias in (torch.randn(n), -torch.rand(n).bfloat16(), torch.zeros(n).half()):
        got = triton.gelu_bound(*weight, bias)
        want = torch.stack([rows.max(), bias.double().abs().max()])
        assert got.dtype == torch.float32 and got.shape == (2,)
        torch.testing.assert_close(got.double(), want, rtol=k * EPS, atol=0)


@numpy
def test_gelu_bound_keeps_what_is_not_finite() -> None:
    weight, bias = Quantized(*reference.quantize(spread(20, 30), "fp8-channel")), torch.randn(20)
    for bad in (torch.nan, torch.inf):
        weight.scale[13], bias[2] = bad, -bad
        got = triton.gelu_bound(*weight, bias)
        torch.testing.assert_close(got, torch.tensor([bad, bad]), equal_nan=True)


@numpy
@pytest.mark.usefixtures("poisoned")
def test_gelu_linear_in_two_passes() -> None:
    x, weight, bias = operands(30, 40, 70, "fp8-channel")
    x, scale = x.values.view(2, 15, 40), x.scale.view(2, 15, 1)
    for b in (bias, None):
        got = triton.gelu_linear(x, scale, *weight, b, torch.float16)
        y = triton.quantized_linear(x, scale, *weight, b, "fp8-channel", torch.float16)
        want = triton.quantize_activation(y, "fp8-channel", "gelu")
        assert got[0].shape == (2, 15, 70) and torch.equal(got[1], want[1])
        assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))


@pytest.mark.parametrize("implementation", [None, "hopper"])
def test_gelu_linear_hands_over_to_hopper(
    implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arguments: rows, contiguous, and the bound that keeps its values from overflowing."""
    hopper = pytest.importorskip("turbodit.kernels.quantized_linear.hopper")
    monkeypatch.setattr(triton, "_why_not_hopper", lambda *_: None)
    monkeypatch.setattr(triton, "_choice", lambda *_: triton.CHOICES[90, "fp8-channel"])
    x, weight, bias = operands(30, 48, 64, "fp8-channel")
    x = Quantized(x.values.view(2, 15, 48), x.scale.view(2, 15, 1))
    z = reference.dequantize(*x, "fp8-channel") @ reference.dequantize(*weight, "fp8-channel").t()
    h = F.gelu(z + bias, approximate="tanh")

    def in_pytorch(rows, x_scale, w, w_scale, b, bound):
        assert rows.shape == (30, 48) and all(t.is_contiguous() for t in (rows, x_scale, w, b))
        scale = x_scale.view(-1, 1) * bound[0] + bound[1] / 448
        return (h.view(30, 64) / scale).to(torch.float8_e4m3fn), scale

    monkeypatch.setattr(hopper, "gelu_linear", in_pytorch)
    given = (x.values.transpose(0, 1).contiguous().transpose(0, 1), x.scale, *weight)
    values, scale = triton.gelu_linear(*given, bias, torch.bfloat16, implementation)
    assert values.shape == (2, 15, 64) and scale.shape == (2, 15, 1)
    assert (h.abs() <= 448 * scale).all()
    assert ((values.float() * scale - h).abs() <= torch.maximum(h.abs() / 16, scale / 1000)).all()


# Which implementation.


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> torch.device:
    """A GPU of the compute capability that the test asks for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return torch.device("cuda")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_choice_for_its_formats(architecture: int) -> None:
    formats = {format for known, format in triton.CHOICES if known == architecture}
    assert formats == set(FORMATS) - ({"fp8-channel"} if architecture < 89 else set())
    for format in formats:
        choice = triton.CHOICES[architecture, format]
        assert choice.implementation in triton.IMPLEMENTATIONS
        if format == "int8-block":
            assert choice.tile.k == 128 and max(choice.tile.m, choice.tile.n) <= 128


@pytest.mark.parametrize(
    ("device", "known"), [((8, 7), 86), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)],
    indirect=["device"],
)  # fmt: skip
def test_a_device_takes_the_last_choice_that_is_not_newer(device: torch.device, known: int) -> None:
    choice = triton._choice(device, "int8-channel")
    assert choice is triton.CHOICES[known, "int8-channel"]


@pytest.mark.parametrize("device", [(7, 5)], indirect=True)
def test_old_devices_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"need compute capability 8.0, a GPU has 7.5"):
        triton._choice(device, "int8-channel")


@pytest.mark.parametrize("device", [(8, 6)], indirect=True)
def test_fp8_needs_hardware(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"needs compute capability 8.9.*int8-channel and int8"):
        triton._check_fp8(device)


def test_implementations_say_what_they_cannot_do() -> None:
    def why_not(implementation: str, m: int, k: int, n: int, format: str, dtype=torch.bfloat16):
        x, weight = torch.empty(m, k, device="meta"), torch.empty(n, k, device="meta")
        return triton._why_not(implementation, x, weight, format, dtype) or ""

    assert why_not("scaled_mm", 1, 64, 32, "fp8-channel") == ""
    assert "not int8-block" in why_not("scaled_mm", 32, 64, 32, "int8-block")
    assert "not torch.float16" in why_not("scaled_mm", 32, 64, 32, "fp8-channel", torch.float16)
    assert "got 1000 and 32" in why_not("scaled_mm", 32, 1000, 32, "fp8-channel")
    assert why_not("int_mm", 17, 64, 32, "int8-channel") == ""
    assert "got 16, 64 and 32" in why_not("int_mm", 16, 64, 32, "int8-channel")
    assert "not fp8-channel" in why_not("int_mm", 32, 64, 32, "fp8-channel")
    assert "supported: triton, scaled_mm, int_mm" in why_not("cuda", 32, 64, 32, "int8-block")
    x, weight, bias = operands(5, 16, 8, "int8-channel")
    with pytest.raises(ValueError, match=r"'int_mm' needs more than 16 rows.*; use another"):
        triton.quantized_linear(*x, *weight, bias, "int8-channel", torch.float32, "int_mm")


def test_only_hopper_ends_a_product_with_gelu() -> None:
    found = {key for key, choice in triton.CHOICES.items() if choice.gelu != "separate"}
    assert found == {(90, "fp8-channel")} and triton.INTERPRETER.gelu == "separate"


@pytest.mark.parametrize("device", [(9, 0)], indirect=True)
def test_the_hopper_kernel_says_what_it_cannot_do(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGPU(torch.Tensor):
        """Data of a CPU that says it is on the GPU."""

        is_cuda = True

    def why_not(k: int, n: int, *, bias: bool = True, at: int = 0) -> str:
        x = torch.empty(3 * k + 32, dtype=torch.uint8)
        x = x[-x.data_ptr() % 16 + at :][: 3 * k].view(3, k).as_subclass(OnGPU)
        weight = torch.empty(n * k + 16, dtype=torch.uint8)
        weight = weight[-weight.data_ptr() % 16 :][: n * k].view(n, k)
        return triton._why_not_hopper(x, weight, torch.empty(n) if bias else None) or ""

    monkeypatch.setattr(triton, "TRITON_VERSION", (3, 6))
    assert why_not(16, 64) == why_not(1536, 128) == ""
    assert "got 24 and 64" in why_not(24, 64) and "got 32 and 96" in why_not(32, 96)
    assert "a bias" in why_not(16, 64, bias=False)
    assert "16 bytes" in why_not(16, 64, at=8)
    monkeypatch.setattr(triton, "TRITON_VERSION", (3, 5))
    assert "needs Triton 3.6" in why_not(16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "capability 9.0" in why_not(16, 64)
    x, weight, bias = operands(5, 16, 64, "fp8-channel")
    with pytest.raises(ValueError, match=r"'hopper' needs a GPU of.* 9.0; use 'separate', or"):
        triton.gelu_linear(*x, *weight, bias, torch.float32, "hopper")
    with pytest.raises(ValueError, match=r"unknown implementation 'fast'; supported: separate, h"):
        triton.gelu_linear(*x, *weight, bias, torch.float32, "fast")


# For every architecture.

INPUTS = {"x_ptr": "*bf16", "scale_ptr": "*fp32"}
SCALES = {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
SIZES = {"M": "i32", "N": "i32:16", "K": "i32:16"}
MODULE = "turbodit.kernels.quantized_linear.triton"


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1000, 13824])
def test_quantize_rows_kernel_compiles(columns: int) -> None:
    width, warps = triton._piece(columns)
    for kind, architectures in (("i8", ARCHITECTURES), ("fp8e4nv", (89, 90, 100, 120))):
        signature = {**INPUTS, "values_ptr": f"*{kind}", "stride": "i32:16"}
        constants = {"K": columns, "WIDTH": width, "GELU": True, "FP8": kind != "i8"}
        assert_compiles(
            MODULE, "_quantize_rows_kernel", signature, constants, architectures, num_warps=warps
        )


@pytest.mark.slow
def test_other_kernels_compile() -> None:
    signature = {**INPUTS, "values_ptr": "*i8", "M": "i32", "K": "i32:16", "stride": "i32:16"}
    assert_compiles(MODULE, "_quantize_blocks_kernel", signature, {"GELU": True}, num_warps=8)
    signature = {"sums_ptr": "*i32", **SCALES, "M": "i32", "N": "i32:16"}
    assert_compiles(MODULE, "_scale_sums_kernel", signature, {"BLOCK_M": 16, "BLOCK_N": 256})


@pytest.mark.slow
def test_bound_kernel_compiles() -> None:
    signature = {
        "w_ptr": "*fp8e4nv", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16", "bound_ptr": "*i32",
        "N": "i32:16", "K": "i32:16",
    }  # fmt: skip
    constants = {"ROWS": triton.BOUND_ROWS, "WIDTH": triton.BOUND_WIDTH}
    assert_compiles(MODULE, "_bound_kernel", signature, constants, (90,))


def tiles() -> dict[tuple[str, object], tuple[int, ...]]:
    """The tiles of each format, as they are and for what TMA cannot read: their architectures."""
    found: dict[tuple[str, object], tuple[int, ...]] = {}
    for (architecture, format), choice in triton.CHOICES.items():
        tile = choice.tile
        for key in {(format, tile), (format, tile._replace(tma=False))}:
            found[key] = (*found.get(key, ()), architecture)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("format", "tile"), tiles())
def test_matmul_kernel_compiles(format: str, tile: triton.Tile) -> None:
    kind = "fp8e4nv" if format == "fp8-channel" else "i8"
    matrices = {"x": f"*{kind}", "w": f"*{kind}"}
    if tile.tma:
        matrices = {
            name: f"tensordesc<{kind}[{rows}, {tile.k}]>"
            for name, rows in (("x", tile.m), ("w", tile.n))
        }
    constants = {
        "FORMAT": format, "TMA": tile.tma, "EVEN_K": tile.tma,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group,
    }  # fmt: skip
    assert_compiles(
        MODULE, "_matmul_kernel", {**matrices, **SCALES, **SIZES}, constants,
        tiles()[format, tile], tile.warps, tile.stages,
    )  # fmt: skip
