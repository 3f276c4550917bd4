"""8-bit linear layers on a GPU, at sizes of Wan's layers, against float64."""

from __future__ import annotations

from collections.abc import Iterator

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
