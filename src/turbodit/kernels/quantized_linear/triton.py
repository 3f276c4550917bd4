"""8-bit linear layers on a GPU; `reference` says what is computed.

Quantising reads and writes once. A program has one row, in registers, in pieces whose width
divides any length well; only the largest magnitude passes between threads. Magnitudes are
compared as integers: the bits of |x| order as it does, NaN last, so that NaN is not lost.

A tile of the product is summed by one program, which scales it and adds the bias before it is
stored. Tiles are taken in groups of rows, so that what is read twice is still in the L2 cache.
With TMA, tiles are read without address arithmetic, and zeros past the end.

Scales by row enter once, at the end. Scales by block enter after every 128 of K, in float32.
fp8 tensor cores of compute capability 8.9 and 9.0 add with about 14 bits, so fp8 sums too are
moved to float32 after every tile of K; torch._scaled_mm, with fast accumulation, does not. Both
are done one tile late, beside the next product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from turbodit.kernels import LOG2_E
from turbodit.kernels.quantized_linear.reference import BLOCK, DTYPES, LARGEST, TINY, scale_shape

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton 3.3
    TensorDescriptor = None


class Tile(NamedTuple):
    """How the matrix product is cut up and launched."""

    m: int
    n: int
    k: int
    warps: int
    stages: int  # tiles of K on their way at once, and being read
    tma: bool = False
    group: int = 8  # tiles of M side by side


class Choice(NamedTuple):
    """What computes a product, and the tile of our kernel where that does or must."""

    implementation: str
    tile: Tile
    gelu: str = "separate"  # what computes a product that ends with GELU and fp8


IMPLEMENTATIONS = ("triton", "scaled_mm", "int_mm")
GELU_IMPLEMENTATIONS = ("separate", "hopper")
# By compute capability and format; a device takes the last one that is not newer than it.
# Measured on 9.0 only.
CHOICES = {
    (80, "int8-block"): Choice("triton", Tile(128, 128, 128, 8, 3)),
    (80, "int8-channel"): Choice("triton", Tile(128, 256, 64, 8, 3)),
    (86, "int8-block"): Choice("triton", Tile(128, 64, 128, 4, 3)),
    (86, "int8-channel"): Choice("triton", Tile(128, 128, 64, 4, 3)),
    (89, "int8-block"): Choice("triton", Tile(128, 64, 128, 4, 3)),
    (89, "int8-channel"): Choice("triton", Tile(128, 128, 64, 4, 3)),
    (89, "fp8-channel"): Choice("triton", Tile(128, 64, 128, 4, 3)),
    (90, "int8-block"): Choice("triton", Tile(128, 128, 128, 8, 4, tma=True, group=16)),
    (90, "int8-channel"): Choice("triton", Tile(256, 128, 128, 8, 4, tma=True)),
    (90, "fp8-channel"): Choice("scaled_mm", Tile(128, 128, 128, 8, 4, tma=True), "hopper"),
    (100, "int8-block"): Choice("triton", Tile(128, 128, 128, 8, 3)),
    (100, "int8-channel"): Choice("triton", Tile(128, 128, 128, 8, 3)),
    (100, "fp8-channel"): Choice("scaled_mm", Tile(128, 128, 128, 8, 4, tma=True)),
    (120, "int8-block"): Choice("triton", Tile(128, 64, 128, 4, 3)),
    (120, "int8-channel"): Choice("triton", Tile(128, 128, 64, 4, 3)),
    (120, "fp8-channel"): Choice("triton", Tile(128, 64, 128, 4, 3)),
}
INTERPRETER = Choice("triton", Tile(32, 32, 64, 4, 2))

TRITON_VERSION = tuple(int(x) for x in triton.__version__.split(".")[:2])
BOUND_ROWS, BOUND_WIDTH = 8, 256  # of weights that `gelu_bound` looks at, at a time
# Elements of a row that a thread takes at a time, and how many times it may.
_VECTOR, _PIECES = 8, 9
_BLOCK = tl.constexpr(BLOCK)
_TINY = tl.constexpr(TINY)
_LARGEST_BLOCK = tl.constexpr(LARGEST["int8-block"])
LARGEST_INT8 = tl.constexpr(LARGEST["int8-channel"])
LARGEST_FP8 = tl.constexpr(LARGEST["fp8-channel"])
_LOG2E = tl.constexpr(LOG2_E)
_SQRT_2_BY_PI = tl.constexpr(0.7978845608028654)
# 1.5 * 2^23. Added to a smaller float32 it leaves the nearest integer in the low bits.
_ROUNDER = tl.constexpr(12582912.0)
# Nothing is gained from one that 16 divides, and one of 1 would become a constant.
_ROWS = ["M"]


@triton.jit
def magnitude_of(x):
    """The bits of |x|, x float32, an int32 that orders as it does, with NaN the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(magnitude, LARGEST: tl.constexpr):
    """The scale of values whose largest magnitude this is."""
    largest = magnitude.to(tl.float32, bitcast=True)
    return tl.where(largest < _TINY, 1.0, tl.div_rn(largest, tl.zeros_like(largest) + LARGEST))


@triton.jit
def inverse_of(scale):
    return tl.div_rn(tl.zeros_like(scale) + 1.0, scale)


@triton.jit
def values_of(x, inverse, FP8: tl.constexpr):
    """8-bit values of x float32, |x * inverse| at most what they can be, or NaN."""
    x = x * inverse
    if FP8:
        values = x.to(tl.float8e4nv)
    else:
        bits = (x + _ROUNDER).to(tl.int32, bitcast=True)
        values = bits.to(tl.int8)
    return values


@triton.jit
def _gelu(x):
    """x/2 (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    u = x * (1 + 0.044715 * x * x)
    return x / (1 + tl.exp2(u * (-2 * _SQRT_2_BY_PI * _LOG2E)))


@triton.jit
def _quantize_rows_kernel(
    x_ptr, values_ptr, scale_ptr, stride,
    K: tl.constexpr, WIDTH: tl.constexpr, GELU: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One row; WIDTH is that of a piece."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    values_ptr += row * K
    columns = tl.arange(0, WIDTH)
    magnitude = tl.zeros((WIDTH,), tl.int32)
    pieces = ()
    for start in tl.static_range(0, K, WIDTH):
        if start + WIDTH <= K:
            x = tl.load(x_ptr + start + columns)
        else:
            x = tl.load(x_ptr + start + columns, start + columns < K, other=0.0)
        x = x.to(tl.float32)
        if GELU:
            x = _gelu(x)
        magnitude = tl.maximum(magnitude, magnitude_of(x))
        pieces += (x,)  # type: ignore[assignment]
    LARGEST: tl.constexpr = LARGEST_FP8 if FP8 else LARGEST_INT8
    scale = scale_of(tl.max(magnitude, axis=0), LARGEST)
    tl.store(scale_ptr + row, scale)
    inverse = inverse_of(scale)
    for i in tl.static_range(len(pieces)):
        place = i * WIDTH + columns
        values = values_of(pieces[i], inverse, FP8)
        if (i + 1) * WIDTH <= K:
            tl.store(values_ptr + place, values)
        else:
            tl.store(values_ptr + place, values, place < K)


@triton.jit(do_not_specialize=_ROWS)
def _quantize_blocks_kernel(
    x_ptr, values_ptr, scale_ptr, M, K, stride, GELU: tl.constexpr
):  # fmt: skip
    """One block."""
    first = tl.program_id(0).to(tl.int64) * _BLOCK
    rows = tl.arange(0, _BLOCK)[:, None]
    columns = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = (first + rows < M) & (columns < K)
    x = tl.load(x_ptr + first * stride + (rows * stride + columns), inside, other=0.0)
    x = x.to(tl.float32)
    if GELU:
        x = _gelu(x)
    scale = scale_of(tl.max(tl.max(magnitude_of(x), axis=1), axis=0), _LARGEST_BLOCK)
    tl.store(scale_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)
    # Halfway between 127 and 128 and above, it is 127.
    values = values_of(tl.minimum(x * inverse_of(scale), 127.0), 1.0, False)
    tl.store(values_ptr + first * K + (rows * K + columns), values, inside)


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of a tile: down the columns of GROUP tiles, then to the right."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group, place = tile // (GROUP * tiles_n), tile % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    return (group * GROUP + place % height) * BLOCK_M, (place // height) * BLOCK_N


@triton.jit
def _load_tile(
    source, first, k, rows, K,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_ROWS, BLOCK_K) of a (rows, K) matrix, zeros past K; rows past the end are anything.

    `source` is its descriptor, or the pointer to it.
    """
    if TMA:
        tile = source.load([first, k])
    else:
        within = tl.minimum(tl.arange(0, BLOCK_ROWS), rows - 1 - first)[:, None] * K
        columns = k + tl.arange(0, BLOCK_K)[None, :]
        pointers = source + first.to(tl.int64) * K + (within + columns)
        tile = tl.load(pointers) if EVEN_K else tl.load(pointers, columns < K, other=0.0)
    return tile


@triton.jit(do_not_specialize=_ROWS)
def _matmul_kernel(
    x, w, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, M, N, K,
    FORMAT: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x (M, K) w (N, K)^T, scaled, + bias; x and w: pointers, or descriptors with TMA.

    Of "int8-block" a tile has one scale for every 128 of K: BLOCK_K is 128, and BLOCK_M and
    BLOCK_N divide it.
    """
    PRODUCT: tl.constexpr = tl.float32 if FORMAT == "fp8-channel" else tl.int32
    m, n = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    x_scales = x_scale_ptr + m // _BLOCK * tl.cdiv(K, _BLOCK)
    w_scales = w_scale_ptr + n // _BLOCK * tl.cdiv(K, _BLOCK)
    product, scale = tl.zeros((BLOCK_M, BLOCK_N), PRODUCT), 0.0
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = _load_tile(x, m, k, M, K, BLOCK_M, BLOCK_K, TMA, EVEN_K)
        b = _load_tile(w, n, k, N, K, BLOCK_N, BLOCK_K, TMA, EVEN_K).T
        if FORMAT == "int8-channel":
            product = tl.dot(a, b, product, out_dtype=PRODUCT)
        else:
            # The last product is added up while the tensor cores make this one.
            next_product, next_scale = tl.dot(a, b, out_dtype=PRODUCT), 1.0
            if FORMAT == "int8-block":
                next_scale = tl.load(x_scales + k // _BLOCK) * tl.load(w_scales + k // _BLOCK)
            total += product.to(tl.float32) * scale
            product, scale = next_product, next_scale
    if FORMAT == "int8-channel":
        total = product.to(tl.float32)
    else:
        total += product.to(tl.float32) * scale
    _store_tile(total, m, n, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, M, N, FORMAT)


@triton.jit
def _store_tile(
    y, m, n, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, M, N, FORMAT: tl.constexpr
):  # fmt: skip
    """Scale a float32 tile of sums by row, unless it is by block; add the bias and store it."""
    rows, columns = m + tl.arange(0, y.shape[0]), n + tl.arange(0, y.shape[1])
    if FORMAT != "int8-block":
        x_scale = tl.load(x_scale_ptr + rows, rows < M, other=0.0)
        w_scale = tl.load(w_scale_ptr + columns, columns < N, other=0.0)
        y = y * x_scale[:, None] * w_scale[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    pointers = y_ptr + m.to(tl.int64) * N + ((rows - m)[:, None] * N + columns[None, :])
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(pointers, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=_ROWS)
def _scale_sums_kernel(
    sums_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What `_store_tile` does, for sums (M, N) int32 in memory."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows, columns = tl.arange(0, BLOCK_M)[:, None], n + tl.arange(0, BLOCK_N)[None, :]
    inside = (m + rows < M) & (columns < N)
    sums = tl.load(sums_ptr + m.to(tl.int64) * N + (rows * N + columns), inside, other=0)
    _store_tile(
        sums.to(tl.float32), m, n, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, M, N, "int8-channel"
    )


@triton.jit
def _bound_kernel(
    w_ptr, w_scale_ptr, bias_ptr, bound_ptr, N, K, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """ROWS of weights (N, K); bound: int32 (2,), the bits of what `gelu_bound` returns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w_ptr += rows.to(tl.int64)[:, None] * K
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in range(0, K, WIDTH):
        columns = k + tl.arange(0, WIDTH)[None, :]
        w = tl.load(w_ptr + columns, (rows < N)[:, None] & (columns < K), other=0.0)
        sums += tl.abs(w.to(tl.float32))
    scale = tl.load(w_scale_ptr + rows, rows < N, other=0.0)
    bias = tl.load(bias_ptr + rows, rows < N, other=0.0).to(tl.float32)
    weight_bound = tl.max(magnitude_of(tl.sum(sums, axis=1) * scale), axis=0)
    tl.atomic_max(bound_ptr, weight_bound, sem="relaxed")
    tl.atomic_max(bound_ptr + 1, tl.max(magnitude_of(bias), axis=0), sem="relaxed")


def quantize_activation(
    x: torch.Tensor, format: str, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if format == "fp8-channel":
        _check_fp8(x.device)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    (length, inputs), gelu = rows.shape, activation == "gelu"
    values = x.new_empty(x.shape, dtype=DTYPES[format])
    scale = x.new_empty(scale_shape(x.shape, format), dtype=torch.float32)
    if values.numel() == 0:
        return values, scale.fill_(1.0)
    if format == "int8-block":
        _quantize_blocks_kernel[tuple(scale.shape)](
            rows, values, scale, length, inputs, rows.stride(0), GELU=gelu, num_warps=8
        )
        return values, scale
    width, warps = _piece(inputs)
    _quantize_rows_kernel[(length,)](
        rows, values, scale, rows.stride(0),
        K=inputs, WIDTH=width, GELU=gelu, FP8=format == "fp8-channel", num_warps=warps,
    )  # fmt: skip
    return values, scale


def quantized_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
    implementation: str | None = None,
) -> torch.Tensor:
    if format == "fp8-channel":
        _check_fp8(x.device)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weight, x_scale, weight_scale = (t.contiguous() for t in (weight, x_scale, weight_scale))
    choice = _choice(x.device, format)
    why_not = _why_not(choice.implementation, rows, weight, format, dtype)
    if implementation is None:
        # The kernel computes the same, for any shape.
        implementation = "triton" if why_not else choice.implementation
    elif why_not := _why_not(implementation, rows, weight, format, dtype):
        raise ValueError(f"implementation={implementation!r} {why_not}; use another, or None")
    if not len(rows):
        return x.new_empty(*x.shape[:-1], len(weight), dtype=dtype)
    arguments = (rows, x_scale, weight, weight_scale, bias)
    if implementation == "scaled_mm":
        y = _scaled_mm(*arguments, dtype)
    elif implementation == "int_mm":
        y = _int_mm(*arguments, dtype)
    else:
        y = multiply(*arguments, format, dtype, choice.tile)
    return y.view(*x.shape[:-1], len(weight))


def gelu_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    why_not = _why_not_hopper(rows, weight, bias)
    if implementation is None:
        choice = _choice(x.device, "fp8-channel").gelu
        implementation = "separate" if why_not else choice
    elif implementation not in GELU_IMPLEMENTATIONS:
        supported = ", ".join(GELU_IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}; supported: {supported}")
    elif implementation == "hopper" and why_not:
        raise ValueError(f"implementation='hopper' {why_not}; use 'separate', or None")
    if implementation == "separate":
        y = quantized_linear(x, x_scale, weight, weight_scale, bias, "fp8-channel", dtype)
        return quantize_activation(y, "fp8-channel", "gelu")
    assert bias is not None
    from turbodit.kernels.quantized_linear import hopper

    x_scale, weight_scale, bias = (t.contiguous() for t in (x_scale, weight_scale, bias))
    bound = gelu_bound(weight, weight_scale, bias)
    values, scale = hopper.gelu_linear(rows, x_scale, weight, weight_scale, bias, bound)
    return values.view(*x.shape[:-1], len(weight)), scale.view(x_scale.shape)


def gelu_bound(
    weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """(2,) float32: the largest sum of magnitudes of a row of weight * weight_scale, and the
    largest magnitude of the bias; NaN where there is any.

    Found for each product anew, which reads the weights once more: nothing is kept that could be of
    other weights, or would have to be made while a CUDA graph is recorded.
    """
    n, k = weight.shape
    bits = torch.zeros(2, dtype=torch.int32, device=weight.device)
    _bound_kernel[(triton.cdiv(n, BOUND_ROWS),)](
        weight, weight_scale, bias, bits, n, k, ROWS=BOUND_ROWS, WIDTH=BOUND_WIDTH
    )
    return bits.view(torch.float32)


def multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
    tile: Tile,
) -> torch.Tensor:
    """The product by our kernel: x (M, K), weight (N, K), all contiguous -> (M, N)."""
    (m, k), n = x.shape, len(weight)
    y = x.new_empty(m, n, dtype=dtype)
    tma = tile.tma and _can_describe(x, weight)
    a, b = (
        (_described(x, tile.m, tile.k), _described(weight, tile.n, tile.k)) if tma else (x, weight)
    )
    tiles = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    _matmul_kernel[(tiles,)](
        a, b, x_scale, weight_scale, bias, y, m, n, k,
        FORMAT=format, TMA=tma, EVEN_K=k % tile.k == 0,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product by PyTorch, which wants the bias in the dtype of the output."""
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale.view(-1, 1),
        scale_b=weight_scale.view(1, -1),
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )


def _int_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The sums by PyTorch, written and read once more."""
    sums = torch._int_mm(x, weight.t())
    y = torch.empty_like(sums, dtype=dtype)
    m, n = sums.shape
    _scale_sums_kernel[(triton.cdiv(m, 16), triton.cdiv(n, 256))](
        sums, x_scale, weight_scale, bias, y, m, n, BLOCK_M=16, BLOCK_N=256
    )
    return y


def _choice(device: torch.device, format: str) -> Choice:
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    known = [key for key in CHOICES if key[1] == format and key[0] <= 10 * major + minor]
    if not known:
        raise ValueError(
            f"8-bit linear layers need compute capability 8.0, "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )
    return CHOICES[max(known)]


def _check_fp8(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"fp8-channel needs compute capability 8.9, {torch.cuda.get_device_name(device)} is "
            "older; int8-channel and int8-block are supported"
        )


def _why_not(
    implementation: str, x: torch.Tensor, weight: torch.Tensor, format: str, dtype: torch.dtype
) -> str | None:
    """Why an implementation cannot compute a product; None if it can."""
    m, (n, k) = len(x), weight.shape
    if implementation == "triton":
        return None
    if implementation == "scaled_mm":
        if format != "fp8-channel":
            return f"is for fp8-channel, not {format}"
        if dtype != torch.bfloat16:
            return f"gives bfloat16, not {dtype}"
        return f"needs K and N that 16 divides, got {k} and {n}" if k % 16 or n % 16 else None
    if implementation == "int_mm":
        if format != "int8-channel":
            return f"is for int8-channel, not {format}"
        if m <= 16 or k % 8 or n % 8:
            return f"needs more than 16 rows, K and N that 8 divides; got {m}, {k} and {n}"
        return None
    return f"is unknown; supported: {', '.join(IMPLEMENTATIONS)}"


def _why_not_hopper(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why `hopper` cannot compute a product of contiguous matrices; None if it can."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0):
        return "needs a GPU of compute capability 9.0"
    if TRITON_VERSION < (3, 6):
        return f"needs Triton 3.6, this is {triton.__version__}"
    n, k = weight.shape
    if bias is None:
        return "needs a bias"
    if k % 16 or n % 64:
        return f"needs K that 16 divides and N that 64 divides, got {k} and {n}"
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        return "needs x and weight that begin at a multiple of 16 bytes"
    return None


def _piece(inputs: int) -> tuple[int, int]:
    """Width of the pieces of a row, and warps that share it: as few as hold it in registers."""
    warps = 1
    while warps < 32 and inputs > 32 * warps * _VECTOR * _PIECES:
        warps *= 2
    return 32 * warps * _VECTOR, warps


def _can_describe(*tensors: torch.Tensor) -> bool:
    """Whether tiles of the contiguous 8-bit matrices can be read by TMA."""
    return TensorDescriptor is not None and all(
        x.data_ptr() % 16 == 0 and x.shape[1] % 16 == 0 for x in tensors
    )


def _described(x: torch.Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor.from_tensor(x, [rows, columns])
