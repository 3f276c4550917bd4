"""Linear layers whose matrix product is in 8 bits: quantisation of both sides, and the product.

A format says what is stored and how many values share a scale; x = values * scale:

- "int8-block": int8, one scale for 128 x 128 values, of activations as of weights. The layout
  of TurboDiffusion's quantised files (arXiv:2512.16093).
- "int8-channel", "fp8-channel": int8 or float8 e4m3, one scale for each row: of an activation
  its token, of a weight its output channel.

`reference` holds the formulas. Shapes: ... any leading dimensions, M rows in all, K inputs,
N outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from turbodit.kernels import custom_op
from turbodit.kernels import implementation as kernels
from turbodit.kernels.quantized_linear import reference
from turbodit.kernels.quantized_linear.reference import (
    ACTIVATIONS,
    BLOCK,
    DTYPES,
    FORMATS,
    scale_shape,
)

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "DTYPES",
    "FORMATS",
    "Quantized",
    "gelu_linear",
    "quantize_activation",
    "quantize_weight",
    "quantized_linear",
    "scale_shape",
]


FLOATING = (torch.float32, torch.float16, torch.bfloat16)


class Quantized(NamedTuple):
    """values (..., K) int8 or float8 e4m3; scale float32, (..., 1) or (M/128, K/128) rounded up."""

    values: torch.Tensor
    scale: torch.Tensor


def quantize_weight(weight: torch.Tensor, format: str) -> Quantized:
    """Quantise a weight (N, K) of any floating dtype, on any device.

    Raises:
        ValueError: an unknown format, another number of dimensions, or NaN or infinite weights.
    """
    _check_format(format)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"a weight is floating (N, K), got {weight.dtype} {tuple(weight.shape)}")
    if not weight.float().isfinite().all():
        raise ValueError("a weight with NaN or infinite values cannot be quantised")
    return Quantized(*reference.quantize(weight, format))


def quantize_activation(x: torch.Tensor, format: str, activation: str = "none") -> Quantized:
    """Quantise activation(x) with scales found at the time of the call.

    NaN and infinities of a row (or block) make its scale NaN or infinite, and so all outputs
    that it has a part in.

    Args:
        x: (..., K) of any strides; on a GPU float32, float16 or bfloat16.
        activation: "none", or "gelu" (its tanh approximation, computed in float32).

    Raises:
        ValueError: an unknown format or activation, x without dimensions or not of a floating
            dtype, or a device that has no such format.
    """
    _check_format(format)
    if x.ndim < 1 or x.dtype not in FLOATING:
        raise ValueError(
            f"activations are (..., K) in one of {_names(FLOATING)}, got {x.dtype} {tuple(x.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; supported: {', '.join(ACTIVATIONS)}")
    return Quantized(*_quantize_activation(x, format, activation))


def quantized_linear(
    x: Quantized,
    weight: Quantized,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
    implementation: str | None = None,
) -> torch.Tensor:
    """x weight^T + bias: (..., K) x (N, K) -> (..., N) in `dtype`.

    Sums are int32 within a block of K or over all of K, scaled and added in float32; fp8 sums
    are float32, with fewer bits in the tensor cores of compute capability 8.9 and 9.0.

    Args:
        bias: (N,), any floating dtype; "scaled_mm" rounds it to `dtype`.
        dtype: float32, float16 or bfloat16.
        implementation: on a GPU: "triton", our kernel, for anything; "scaled_mm", of PyTorch,
            for fp8-channel, K and N that 16 divides, and bfloat16; "int_mm", of PyTorch, for
            int8-channel, more than 16 rows, K and N that 8 divides. None: the one that suits
            the device, or "triton" where that one cannot.

    Raises:
        ValueError: an unknown format, shapes or dtypes that do not fit it, or a device or an
            implementation that cannot compute it.
    """
    _check_format(format)
    _check_operands(x, weight, bias, format, dtype)
    return _quantized_linear(*x, *weight, bias, format, dtype, implementation)


def gelu_linear(
    x: Quantized,
    weight: Quantized,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    implementation: str | None = None,
) -> Quantized:
    """h = gelu(x weight^T + bias) in "fp8-channel", and so are x and weight: (..., K) x (N, K) ->
    (..., N); GELU in its tanh form.

    A row's values are e4m3(h / s) for one of the scales s at which none can overflow, |h| at most
    448 s. Which one, the implementation says:

    - "separate", and any CPU: the smallest. By definition `quantized_linear` to `dtype`, and of
      that `quantize_activation` with "gelu".
    - "hopper", one kernel, in which h is float32: s = s_x max_j |w_j|_1 + max_j |b_j| / 448, with
      w_j the rows of the weight and s_x the scale of the row of x. It needs compute capability
      9.0, Triton 3.6, a bias, K that 16 divides and N that 64 divides. Of h in all an error of
      2.7 % is left instead of 2.6 % (`hopper` has more); single h far smaller than s lose more.

    A row of x whose scale is NaN or infinite gives such a scale, and so all outputs that it has a
    part in.

    Args:
        bias: (N,), any floating dtype.
        dtype: of x weight^T + bias where that is "separate": float32, float16 or bfloat16.
        implementation: None: "hopper" where it can be, else "separate".

    Raises:
        ValueError: shapes or dtypes that do not fit, or a device or an implementation that cannot
            compute it.
    """
    _check_operands(x, weight, bias, "fp8-channel", dtype)
    return Quantized(*_gelu_linear(*x, *weight, bias, dtype, implementation))


@custom_op("turbodit::quantize_activation")
def _quantize_activation(
    x: torch.Tensor, format: str, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels(__name__, x).quantize_activation(x, format, activation)


@_quantize_activation.register_fake
def _(x: torch.Tensor, format: str, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.new_empty(x.shape, dtype=DTYPES[format])
    return values, x.new_empty(scale_shape(x.shape, format), dtype=torch.float32)


@custom_op("turbodit::quantized_linear")
def _quantized_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
    implementation: str | None,
) -> torch.Tensor:
    return kernels(__name__, x).quantized_linear(
        x, x_scale, weight, weight_scale, bias, format, dtype, implementation
    )


@_quantized_linear.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
    implementation: str | None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


@custom_op("turbodit::gelu_linear")
def _gelu_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels(__name__, x).gelu_linear(
        x, x_scale, weight, weight_scale, bias, dtype, implementation
    )


@_gelu_linear.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.new_empty(*x.shape[:-1], weight.shape[0])
    return values, x.new_empty(scale_shape(values.shape, "fp8-channel"), dtype=torch.float32)


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"unknown 8-bit format {format!r}; supported: {', '.join(FORMATS)}")


def _check_operands(
    x: Quantized,
    weight: Quantized,
    bias: torch.Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> None:
    if weight.values.ndim != 2 or x.values.ndim < 1:
        raise ValueError(
            "expected x (..., K) and weight (N, K), got "
            f"{tuple(x.values.shape)} and {tuple(weight.values.shape)}"
        )
    if x.values.shape[-1] != weight.values.shape[1]:
        raise ValueError(
            f"x has K = {x.values.shape[-1]}, and the weight K = {weight.values.shape[1]}"
        )
    for name, side in (("x", x), ("weight", weight)):
        shape = scale_shape(side.values.shape, format)
        if side.values.dtype != DTYPES[format] or side.scale.dtype != torch.float32:
            raise ValueError(
                f"{format} has {DTYPES[format]} values and float32 scales, {name} has "
                f"{side.values.dtype} and {side.scale.dtype}"
            )
        if side.scale.shape != shape:
            raise ValueError(
                f"{format} values {tuple(side.values.shape)} have scales {shape}, {name} has "
                f"{tuple(side.scale.shape)}"
            )
    if bias is not None and (bias.shape != weight.values.shape[:1] or bias.dtype not in FLOATING):
        raise ValueError(
            f"a bias is floating {tuple(weight.values.shape[:1])}, got {bias.dtype} "
            f"{tuple(bias.shape)}"
        )
    if dtype not in FLOATING:
        raise ValueError(f"the output is one of {_names(FLOATING)}, got {dtype}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
