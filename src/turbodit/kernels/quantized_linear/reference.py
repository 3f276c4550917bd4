"""8-bit linear layers in plain PyTorch: the specification, and what runs on a CPU.

With A the largest magnitude of the values that share a scale s:

    int8-block    s = A / 128,  values = min(round(x / s), 127)
    int8-channel  s = A / 127,  values = round(x / s)
    fp8-channel   s = A / 448,  values = e4m3(x / s)

    y = sum over blocks of K of (x8 w8^T) s_x s_w + bias      with one block if scales are by row

An A under TINY counts as zero: s = 1, and so values of zero. Rounding is to the nearest, ties
to even, and x / s is computed as x * (1 / s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

FORMATS = ("int8-block", "int8-channel", "fp8-channel")
ACTIVATIONS = ("none", "gelu")
BLOCK = 128
DTYPES = {
    "int8-block": torch.int8,
    "int8-channel": torch.int8,
    "fp8-channel": torch.float8_e4m3fn,
}
LARGEST = {"int8-block": 128.0, "int8-channel": 127.0, "fp8-channel": 448.0}
TINY = 1e-30  # under which 1 / s could overflow
# Rows that are multiplied at a time.
TILE = 256
# So many products of int8 add up in float32 without rounding: 128^2 * 1024 = 2^24.
EXACT_IN_FLOAT = 1024


def scale_shape(shape: Sequence[int], format: str) -> tuple[int, ...]:
    """The shape of the scales of an (..., K) tensor."""
    if format == "int8-block":
        rows, columns = math.prod(shape[:-1]), shape[-1]
        return (-(-rows // BLOCK), -(-columns // BLOCK))
    return (*shape[:-1], 1)


def quantize(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of x (..., K)."""
    x = x.contiguous().float()
    if format != "int8-block":
        scale = _scale(x.abs().amax(-1, keepdim=True), format)
        return _round(x, scale, format), scale
    shape, x = x.shape, x.view(-1, x.shape[-1])
    (rows, columns), (blocks, blocks_of_row) = x.shape, scale_shape(shape, format)
    if ragged := rows % BLOCK or columns % BLOCK:
        x = F.pad(x, (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = x.view(blocks, BLOCK, blocks_of_row, BLOCK)
    scale = _scale(tiles.abs().amax((1, 3)), format)
    values = _round(tiles, scale[:, None, :, None], format).view(x.shape)
    if ragged:
        values = values[:rows, :columns].contiguous()
    return values.view(shape), scale


def quantize_activation(
    x: torch.Tensor, format: str, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `turbodit.kernels.quantized_linear.quantize_activation`."""
    if activation == "gelu":
        x = F.gelu(x.float(), approximate="tanh")
    return quantize(x, format)


def dequantize(values: torch.Tensor, scale: torch.Tensor, format: str) -> torch.Tensor:
    """values * scale in float32, the inverse of `quantize` up to rounding."""
    x = values.float()
    if format != "int8-block":
        return x * scale
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return x * spread.reshape(x.shape)


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
    """As `turbodit.kernels.quantized_linear.quantized_linear`.

    Passes over products cost as much as the products. So they are made for a tile of rows at a
    time, which a cache holds, in memory that is used again.
    """
    if implementation is not None:
        raise ValueError(f"implementation={implementation!r} is for GPUs; a CPU has one only")
    y = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
    multiply = _multiply_blocks if format == "int8-block" else _multiply_rows
    multiply(x.reshape(-1, x.shape[-1]), x_scale, weight, weight_scale, y.view(-1, len(weight)))
    if bias is not None:
        y += bias
    return y.to(dtype)


def gelu_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `turbodit.kernels.quantized_linear.gelu_linear`."""
    given = (x, x_scale, weight, weight_scale, bias)
    y = quantized_linear(*given, "fp8-channel", dtype, implementation)
    return quantize_activation(y, "fp8-channel", "gelu")


def _multiply_rows(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """x (M, K), weight (N, K) -> y (M, N), scales by row."""
    x_scale, weight_scale = x_scale.reshape(-1, 1), weight_scale.reshape(-1)
    if x.is_floating_point():
        torch.mm(x.float(), weight.float().t(), out=y).mul_(x_scale).mul_(weight_scale)
        return
    sums = torch.empty(min(TILE, len(x)), len(weight), dtype=torch.int32)
    for rows, scale, out in zip(x.split(TILE), x_scale.split(TILE), y.split(TILE), strict=True):
        out.copy_(_sums(rows, weight, sums[: len(rows)])).mul_(scale).mul_(weight_scale)


def _multiply_blocks(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """x (M, K), weight (N, K) -> y (M, N), scales by block."""
    sums = torch.empty(min(BLOCK, len(x)), len(weight), dtype=torch.int32)
    product = torch.empty(sums.shape)
    column_scales = weight_scale.t().repeat_interleave(BLOCK, 1)[:, : len(weight)]
    blocks = weight.split(BLOCK, 1)
    y.zero_()
    # Without rows there is one part, but no scale.
    for rows, scales, out in zip(x.split(BLOCK), x_scale, y.split(BLOCK), strict=False):
        factors = scales[:, None] * column_scales
        for a, b, factor in zip(rows.split(BLOCK, 1), blocks, factors, strict=True):
            out.addcmul_(product[: len(rows)].copy_(_sums(a, b, sums[: len(rows)])), factor)


def _sums(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a (M, K) b (N, K)^T in int32.

    Without VNNI, PyTorch's int8 product is slow, or saturates sums of pairs in 16 bits: there,
    sums of float32 that need no rounding take its place.
    """
    if torch.cpu._is_vnni_supported():
        return torch._int_mm(a, b.t(), out=out)
    out.zero_()
    for part, other in zip(a.split(EXACT_IN_FLOAT, 1), b.split(EXACT_IN_FLOAT, 1), strict=True):
        out += (part.float() @ other.float().t()).int()
    return out


def _scale(largest: torch.Tensor, format: str) -> torch.Tensor:
    return torch.where(largest < TINY, 1.0, largest / LARGEST[format])


def _round(x: torch.Tensor, scale: torch.Tensor, format: str) -> torch.Tensor:
    """Values of x; with a scale that is NaN or infinite they mean nothing."""
    x = x * (1 / scale)
    if format == "fp8-channel":
        return x.to(torch.float8_e4m3fn)
    x.round_()
    if format == "int8-block":
        x.clamp_(max=127)
    return x.to(torch.int8)
