"""8-bit linear layers on a GPU, at sizes of Wan's layers, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from turbodit.kernels import quantized_linear as ops
from turbodit.kernels.quantized_linear import FORMATS, Quantized, reference

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
IMPLEMENTATIONS = {
    "int8-block": (None, "triton"),
    "int8-channel": (None, "triton", "int_mm"),
    "fp8-channel": (None, "triton", "scaled_mm"),
}
CASES = [(format, which) for format in FORMATS for which in IMPLEMENTATIONS[format]]
# M, K, N: of the 1.3B and the 14B, and of nothing.
SIZES = [(32760, 1536, 8960), (32760, 8960, 1536), (4097, 5120, 5120), (1000, 13824, 5120)]
ODD_SIZES = [
    (m, k, n) for m in (1, 2, 16, 17, 127, 128, 129) for k, n in ((1536, 256), (1000, 300))
]
# fp8 tensor cores of 8.9 and 9.0 add with about 14 bits: of a sum of magnitudes. Our kernel moves
# its sums into float32 after every tile of K, torch._scaled_mm does not.
FP8_SUM = {"triton": 2.0**-12, "scaled_mm": 2.0**-10, None: 2.0**-10}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN, or the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def skip_without_fp8(format: str) -> None:
    if format == "fp8-channel" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")


def can_compute(which: str | None, m: int, k: int, n: int) -> bool:
    if which == "scaled_mm":
        return k % 16 == n % 16 == 0
    return which != "int_mm" or (m > 16 and k % 8 == n % 8 == 0)


def check(m: int, k: int, n: int, format: str, which: str | None, dtype: torch.dtype) -> None:
    """Quantise, multiply, and compare sampled rows with float64."""
    x = torch.randn(m, k, device=CUDA, dtype=torch.bfloat16)
    x *= torch.randn(m, 1, device=CUDA).exp()
    bias = torch.randn(n, device=CUDA, dtype=torch.bfloat16)
    weight = ops.quantize_weight(torch.randn(n, k, device=CUDA) / k**0.5, format)
    activation = ops.quantize_activation(x, format)
    y = ops.quantized_linear(activation, weight, bias, format, dtype, which)
    assert y.dtype == dtype and y.shape == (m, n) and y.isfinite().all()
    rows = torch.cat([torch.tensor([0, m - 1]), torch.randint(m, (30,))]).to(CUDA)
    scale = activation.scale[rows] if format != "int8-block" else activation.scale[rows // 128]
    if format == "int8-block":
        scale = scale.repeat_interleave(128, 1)[:, :k]
    a = activation.values[rows].double() * scale
    b = reference.dequantize(*weight, format).double()
    want = a @ b.t() + bias.double()
    magnitude = a.abs() @ b.abs().t() + bias.double().abs()
    of_sums = FP8_SUM[which] if format == "fp8-channel" else k * 2.0**-31
    error = (y[rows].double() - want).abs()
    assert (error <= torch.finfo(dtype).eps * want.abs() + of_sums * magnitude).all()


@pytest.mark.parametrize(("format", "which"), CASES)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_layers_of_wan(m: int, k: int, n: int, format: str, which: str | None) -> None:
    skip_without_fp8(format)
    check(m, k, n, format, which, torch.bfloat16)


@pytest.mark.parametrize(("format", "which"), CASES)
def test_any_size(format: str, which: str | None) -> None:
    skip_without_fp8(format)
    for m, k, n in ODD_SIZES:
        if can_compute(which, m, k, n):
            check(m, k, n, format, which, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        if which != "scaled_mm":
            check(130, 1536, 264, format, which, dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_tiles_without_tma_and_in_other_groups(format: str) -> None:
    skip_without_fp8(format)
    from turbodit.kernels.quantized_linear import triton

    weight = ops.quantize_weight(torch.randn(1000, 1536, device=CUDA), format)
    activation = ops.quantize_activation(torch.randn(3000, 1536, device=CUDA), format)
    arguments = (*activation, *weight, None, format, torch.float32)
    tile = triton._choice(CUDA, format).tile
    want = triton.multiply(*arguments, tile)
    for change in ({"tma": False}, {"tma": True}, {"group": 3}):
        if change.get("tma") and torch.cuda.get_device_capability() < (9, 0):
            continue
        other = triton.multiply(*arguments, tile._replace(**change))
        # One order of summation, whatever the way to the data.
        torch.testing.assert_close(other, want, rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("columns", [1, 1000, 1536, 5120, 8960, 13824, 16384])
def test_quantised_activations_are_those_of_a_cpu(
    columns: int, activation: str, format: str
) -> None:
    skip_without_fp8(format)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = (torch.randn(300, columns + 8) * torch.randn(300, 1).exp()).to(dtype)
        x[5] = 0
        got = ops.quantize_activation(x.to(CUDA)[:, :columns], format, activation)
        want = ops.quantize_activation(x[:, :columns], format, activation)
        if activation == "none":
            assert torch.equal(got.scale.cpu(), want.scale)
            if format == "int8-channel":
                # A GPU rounds x * (1 / s) and to an integer at once: halves may go either way.
                exact = x[:, :columns].float() / want.scale
                assert (exact - got.values.cpu().float()).abs().max() <= 0.5001
            else:
                assert torch.equal(got.values.cpu().float(), want.values.float())
            continue
        if columns > 1:  # alone in its row, a number far below zero is almost 0, or 0
            torch.testing.assert_close(got.scale.cpu(), want.scale, rtol=1e-5, atol=0)
            # Where GELU is rounded otherwise, now and then the next value is chosen.
            same = got.values.cpu().float() == want.values.float()
            assert same.float().mean() > 0.999
        error = reference.dequantize(*got, format).cpu() - reference.dequantize(*want, format)
        largest = F.gelu(x[:, :columns].float(), approximate="tanh").abs().amax()
        assert error.abs().max() <= largest / 8


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_the_output(bad: float, format: str) -> None:
    skip_without_fp8(format)
    x = torch.randn(300, 1536, device=CUDA, dtype=torch.bfloat16)
    x[130, 700] = bad
    weight = ops.quantize_weight(torch.randn(256, 1536, device=CUDA), format)
    rows = slice(128, 256) if format == "int8-block" else slice(130, 131)
    for which in IMPLEMENTATIONS[format]:
        activation = ops.quantize_activation(x, format)
        y = ops.quantized_linear(activation, weight, None, format, torch.bfloat16, which)
        assert not y[rows].isfinite().any()
        assert y[: rows.start].isfinite().all() and y[rows.stop :].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_lengths_share_one_compiled_kernel(format: str) -> None:
    skip_without_fp8(format)
    from turbodit.kernels.quantized_linear import triton

    weight = ops.quantize_weight(torch.randn(256, 1536, device=CUDA), format)

    def compiled() -> int:
        kernels = (
            triton._matmul_kernel,
            triton._quantize_rows_kernel,
            triton._quantize_blocks_kernel,
        )
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    counts = []
    for m in (1, 2, 16, 300, 1024):
        x = torch.randn(m, 1536, device=CUDA, dtype=torch.bfloat16)
        activation = ops.quantize_activation(x, format)
        ops.quantized_linear(activation, weight, None, format, torch.bfloat16, "triton")
        counts.append(compiled())
    assert counts == counts[:1] * len(counts)


@pytest.mark.parametrize(("format", "which"), CASES)
def test_a_cuda_graph_takes_new_inputs(format: str, which: str | None) -> None:
    skip_without_fp8(format)
    weight = ops.quantize_weight(torch.randn(256, 1536, device=CUDA), format)
    bias = torch.randn(256, device=CUDA, dtype=torch.bfloat16)

    def run(x: torch.Tensor) -> torch.Tensor:
        activation = Quantized(*ops.quantize_activation(x, format, "gelu"))
        return ops.quantized_linear(activation, weight, bias, format, torch.bfloat16, which)

    x = torch.randn(2, 150, 1536, device=CUDA, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(x)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = run(x)
    for _ in range(2):
        x.normal_()
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, run(x))


# A product that ends with GELU and fp8.

GELU_IMPLEMENTATIONS = ("separate", "hopper")
GELU_SIZES = [(32760, 1536, 8960), (4097, 5120, 13824)]
ODD_GELU_SIZES = [
    (m, k, n)
    for m in (1, 64, 127, 128, 129, 1001)
    for k, n in ((16, 64), (128, 8960), (144, 320), (1536, 576))
]


def can_fuse() -> bool:
    from turbodit.kernels.quantized_linear import triton

    return torch.cuda.get_device_capability() == (9, 0) and triton.TRITON_VERSION >= (3, 6)


def skip_without(which: str) -> None:
    skip_without_fp8("fp8-channel")
    if which == "hopper" and not can_fuse():
        pytest.skip("needs compute capability 9.0 and Triton 3.6")


@pytest.fixture
def hopper_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows with each call of the kernel for Hopper."""
    skip_without("hopper")
    from turbodit.kernels.quantized_linear import hopper

    calls = []
    gelu_linear = hopper.gelu_linear

    def counted(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(arguments[0]))
        return gelu_linear(*arguments)

    monkeypatch.setattr(hopper, "gelu_linear", counted)
    return calls


def gelu_operands(m: int, k: int, n: int) -> tuple[Quantized, Quantized, torch.Tensor]:
    x = torch.randn(m, k, device=CUDA) * torch.randn(m, 1, device=CUDA).exp()
    weight = torch.randn(n, k, device=CUDA) / k**0.5
    weight *= (0.3 * torch.randn(n, 1, device=CUDA)).exp()
    return (
        ops.quantize_activation(x.bfloat16(), "fp8-channel"),
        ops.quantize_weight(weight, "fp8-channel"),
        torch.randn(n, device=CUDA, dtype=torch.bfloat16),
    )


def norm_of_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def check_gelu(x: Quantized, weight: Quantized, bias: torch.Tensor, which: str) -> None:
    """Sampled rows against float64: the scale, all values, and the error of a row as a whole."""
    (m, _), n = x.values.shape, len(weight.values)
    values, scale = ops.gelu_linear(x, weight, bias, torch.bfloat16, which)
    assert values.shape == (m, n) and values.dtype == torch.float8_e4m3fn
    assert scale.shape == (m, 1) and scale.dtype == torch.float32
    assert scale.isfinite().all() and values.float().isfinite().all()
    rows = torch.cat([torch.tensor([0, m - 1]), torch.randint(m, (30,))]).to(CUDA)
    a = x.values[rows].double() * x.scale[rows]
    b = reference.dequantize(*weight, "fp8-channel").double()
    z, magnitude = a @ b.t() + bias.double(), a.abs() @ b.abs().t()
    h, s, values = F.gelu(z, approximate="tanh"), scale[rows].double(), values[rows].double()
    # z in bfloat16, or tanh right to 11 bits; GELU's slope is at most 1.13.
    of_z = 1.13 * (2.0**-8 * z.abs() + FP8_SUM[None] * magnitude)
    if which == "hopper":
        want = x.scale[rows].double() * b.abs().sum(1).max() + bias.double().abs().max() / 448
        torch.testing.assert_close(s, want, rtol=1e-5, atol=0)
    else:
        difference = (448 * s - h.abs().amax(1, keepdim=True)).abs()
        assert (difference <= of_z.amax(1, keepdim=True) + 1e-6).all()
    # Half a unit of three bits, or of the smallest value.
    rounding = torch.maximum(h.abs() / 16, s / 1024)
    assert ((values * s - h).abs() <= 1.02 * rounding + of_z).all()
    ideal = (h / s).float().to(torch.float8_e4m3fn).double()
    assert norm_of_error(values * s, h) <= 1.05 * norm_of_error(ideal * s, h) + 0.003


@pytest.mark.parametrize("which", GELU_IMPLEMENTATIONS)
@pytest.mark.parametrize(("m", "k", "n"), GELU_SIZES)
def test_gelu_linear_of_wan(m: int, k: int, n: int, which: str) -> None:
    skip_without(which)
    check_gelu(*gelu_operands(m, k, n), which)


@pytest.mark.parametrize("which", GELU_IMPLEMENTATIONS)
def test_gelu_linear_of_any_size(which: str) -> None:
    skip_without(which)
    for m, k, n in ODD_GELU_SIZES:
        check_gelu(*gelu_operands(m, k, n), which)
    x, weight, bias = gelu_operands(130, 1536, 576)
    for dtype in (torch.float32, torch.float16):
        check_gelu(x, weight, bias.to(dtype), which)


def test_both_gelu_linears_are_as_near() -> None:
    """The scale is a hundred times as large, which fp8 hardly feels."""
    skip_without("hopper")
    x, weight, bias = gelu_operands(1000, 1536, 8960)
    y = ops.quantized_linear(x, weight, bias, "fp8-channel", torch.float32)
    want = F.gelu(y, approximate="tanh")
    errors = {}
    for which in GELU_IMPLEMENTATIONS:
        got = ops.gelu_linear(x, weight, bias, torch.bfloat16, which)
        errors[which] = norm_of_error(reference.dequantize(*got, "fp8-channel"), want)
    assert 0.02 < errors["hopper"] < 1.05 * errors["separate"] < 0.03


@pytest.mark.parametrize("which", GELU_IMPLEMENTATIONS)
def test_gelu_linear_of_zeros(which: str) -> None:
    skip_without(which)
    x, weight, bias = gelu_operands(300, 1536, 320)
    x.values.view(torch.uint8)[130], x.scale[130] = 0, 1
    values, scale = ops.gelu_linear(x, weight, bias, torch.bfloat16, which)
    # Of "hopper" it is the scale that comes with values of up to 448.
    h = F.gelu(bias.float(), approximate="tanh")
    rounding = torch.maximum(h.abs() / 16, scale[130] / 1024)
    assert ((values[130].float() * scale[130] - h).abs() <= 1.02 * rounding + 0.01).all()
    zero = Quantized(*(torch.zeros_like(side) for side in weight))
    values, scale = ops.gelu_linear(x, zero, bias * 0, torch.bfloat16, which)
    assert (scale == 1).all() and (values.float() == 0).all()


@pytest.mark.parametrize("which", GELU_IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_gelu_linear_keeps_what_is_not_finite(bad: float, which: str) -> None:
    skip_without(which)
    x = torch.randn(300, 1536, device=CUDA, dtype=torch.bfloat16)
    x[130, 700] = bad
    inputs = ops.quantize_activation(x, "fp8-channel")
    _, weight, bias = gelu_operands(1, 1536, 320)
    hidden = ops.gelu_linear(inputs, weight, bias, torch.bfloat16, which)
    lost = torch.arange(300, device=CUDA) == 130
    assert torch.equal(hidden.scale[:, 0].isfinite(), ~lost)
    assert hidden.values[~lost].float().isfinite().all()
    down = ops.quantize_weight(torch.randn(64, 320, device=CUDA), "fp8-channel")
    y = ops.quantized_linear(hidden, down, None, "fp8-channel", torch.bfloat16)
    assert torch.equal(y.isfinite(), ~lost[:, None].expand_as(y))
    bias[3] = bad
    hidden = ops.gelu_linear(inputs, weight, bias, torch.bfloat16, which)
    assert not hidden.scale.isfinite().any()


@pytest.mark.parametrize(("n", "k"), [(8960, 1536), (13824, 5120), (64, 16), (3, 1000)])
def test_gelu_bound(n: int, k: int) -> None:
    skip_without_fp8("fp8-channel")
    from turbodit.kernels.quantized_linear import triton

    _, weight, bias = gelu_operands(1, k, n)
    rows = reference.dequantize(*weight, "fp8-channel").double().abs().sum(1)
    want = torch.stack([rows.max(), bias.double().abs().max()])
    got = triton.gelu_bound(*weight, bias)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def test_what_ends_with_gelu_in_the_hopper_kernel(hopper_calls: list[int]) -> None:
    def run(m: int, k: int, n: int, *, biased: bool = True, which: str | None = None) -> None:
        x, weight, bias = gelu_operands(m, k, n)
        ops.gelu_linear(x, weight, bias if biased else None, torch.bfloat16, which)

    run(1, 16, 64)
    run(300, 1536, 8960)
    run(129, 1536, 320, which="hopper")
    assert hopper_calls == [1, 300, 129]
    run(300, 1544, 64)
    run(300, 1536, 96)
    run(300, 1536, 64, biased=False)
    run(300, 1536, 64, which="separate")
    assert len(hopper_calls) == 3
    with pytest.raises(ValueError, match="N that 64 divides, got 1536 and 96"):
        run(300, 1536, 96, which="hopper")


def test_gelu_linear_with_leading_dimensions_and_none(hopper_calls: list[int]) -> None:
    x, weight, bias = gelu_operands(300, 1536, 320)
    want = ops.gelu_linear(x, weight, bias, torch.bfloat16)
    folded = Quantized(x.values.view(2, 150, 1536), x.scale.view(2, 150, 1))
    got = ops.gelu_linear(folded, weight, bias, torch.bfloat16)
    assert got.values.shape == (2, 150, 320) and got.scale.shape == (2, 150, 1)
    assert torch.equal(got.values.view(300, 320).float(), want.values.float())
    assert torch.equal(got.scale.view(300, 1), want.scale)
    none = ops.gelu_linear(Quantized(x.values[:0], x.scale[:0]), weight, bias, torch.bfloat16)
    assert none.values.shape == (0, 320) and none.scale.shape == (0, 1)
    assert hopper_calls == [300, 300, 0]


def test_the_hopper_kernel_with_gelu_repeats_itself(hopper_calls: list[int]) -> None:
    """Whatever order its copies and products come in."""
    x, weight, bias = gelu_operands(4097, 1536, 8960)
    want = ops.gelu_linear(x, weight, bias, torch.bfloat16)
    for _ in range(30):
        got = ops.gelu_linear(x, weight, bias, torch.bfloat16)
        assert torch.equal(got.scale, want.scale)
        assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert len(hopper_calls) == 31


def test_lengths_share_one_kernel_with_gelu(hopper_calls: list[int]) -> None:
    from turbodit.kernels.quantized_linear import hopper

    kernel, counts = hopper._gelu_linear_kernel, []
    for m in (1, 2, 16, 300, 1024):
        ops.gelu_linear(*gelu_operands(m, 1536, 320), torch.bfloat16)
        counts.append(sum(len(cache[0]) for cache in kernel.device_caches.values()))
    assert counts == counts[:1] * 5 and len(hopper_calls) == 5


@pytest.mark.parametrize("which", GELU_IMPLEMENTATIONS)
def test_a_cuda_graph_with_gelu_takes_new_inputs_and_weights(which: str) -> None:
    skip_without(which)
    x, weight, bias = gelu_operands(300, 1536, 320)

    def run() -> Quantized:
        return ops.gelu_linear(x, weight, bias, torch.bfloat16, which)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = run()
    for _ in range(2):
        new_x, new_weight, new_bias = gelu_operands(300, 1536, 320)
        new_weight = Quantized(new_weight.values, 5 * new_weight.scale)
        for old, new in zip((*x, *weight, bias), (*new_x, *new_weight, 3 * new_bias), strict=True):
            old.copy_(new)
        out.scale.fill_(torch.nan)
        out.values.view(torch.uint8).fill_(127)
        graph.replay()
        want = run()
        assert torch.equal(out.scale, want.scale) and out.scale.isfinite().all()
        assert torch.equal(out.values.view(torch.uint8), want.values.view(torch.uint8))
