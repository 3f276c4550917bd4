"""The DiT's glue, each piece one pass over the tokens: gated residual, LayerNorm, modulation and
quantisation; RMSNorm and rotary positions.

Where a gradient is wanted the reference runs, which PyTorch differentiates, and where a tangent is
wanted, too, unless `kernels.norm_jvp` has a kernel for it. `reference` holds the formulas.

Shapes: B batch, L tokens, D width, n runs of L/n tokens that share a modulation (n divides L).
"""

from __future__ import annotations

from types import ModuleType

import torch

from turbodit.kernels import custom_op, implementation, kernels_run, norm_jvp
from turbodit.kernels.forward_ad import has_tangent
from turbodit.kernels.norm import reference
from turbodit.kernels.quantized_linear import DTYPES, Quantized

ROW_FORMATS = ("int8-channel", "fp8-channel")  # with one scale for each token
MAX_WIDTH = 16384  # a row has to fit into the registers of one multiprocessor

Angles = tuple[torch.Tensor, torch.Tensor]


def norm(
    x: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float,
    out: torch.dtype | str,
) -> torch.Tensor | Quantized:
    """LayerNorm of x over D, times `weight` plus `bias`, times 1 + `scale` plus `shift`.

    Args:
        x: (B, L, D) float32, bfloat16 or float16; on a GPU contiguous, D at most 16384.
        weight, bias: (D,), both or none.
        shift, scale: (B, n, D) float32 with a contiguous last dimension, both or none.
        out: dtype of the result, or a format of `ROW_FORMATS` to quantise it to.

    Returns:
        (B, L, D), or `Quantized` values (B, L, D) and scales (B, L, 1).

    Raises:
        ValueError: shapes or a format other than these, or a derivative of a quantisation.
    """
    dtype, format = _output(out)
    _check(x, None, None, weight, bias, shift, scale)
    if _differentiates(x, weight, bias, shift, scale):
        _refuse_format(format)
        assert dtype is not None
        if _has_kernel_for_tangent(x, (shift, scale), (weight, bias)):
            return norm_jvp.norm(x, weight, bias, shift, scale, eps, dtype)
        return reference.norm(x, weight, bias, shift, scale, eps, dtype, None)[0]
    values, scales = _norm(x, weight, bias, shift, scale, eps, dtype, format)
    return values if format is None else Quantized(values, scales)


def add_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float,
    out: torch.dtype | str,
) -> tuple[torch.Tensor, torch.Tensor | Quantized]:
    """y = x + gate * update, in x's dtype, and `norm` of y.

    Args:
        update: (B, L, D), any floating dtype; on a GPU contiguous.
        gate: (B, n, D) float32 with a contiguous last dimension; None: 1.
        The others are those of `norm`.

    Raises: as `norm`.
    """
    dtype, format = _output(out)
    _check(x, update, gate, weight, bias, shift, scale)
    if _differentiates(x, update, gate, weight, bias, shift, scale):
        _refuse_format(format)
        assert dtype is not None
        if _has_kernel_for_tangent(x, (update, gate, shift, scale), (weight, bias)):
            return norm_jvp.add_norm(x, update, gate, weight, bias, shift, scale, eps, dtype)
        y, h, _ = reference.add_norm(x, update, gate, weight, bias, shift, scale, eps, dtype, None)
        return y, h
    y, values, scales = _add_norm(x, update, gate, weight, bias, shift, scale, eps, dtype, format)
    return y, values if format is None else Quantized(values, scales)


def gated_add(
    x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """x + gate * update in x's dtype; shapes and errors as `add_norm`."""
    _check(x, update, gate, None, None, None, None)
    if _differentiates(x, update, gate):
        if _has_kernel_for_tangent(x, (update, gate)):
            return norm_jvp.gated_add(x, update, gate)
        return reference.add(x, update, gate)
    return _gated_add(x, update, gate)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    angles: Angles | None = None,
    *,
    in_place: bool = False,
) -> torch.Tensor:
    """RMSNorm of x over D, times `weight`, then each head's pairs rotated by `angles`.

    Args:
        x: (B, L, D) floating, rows at any distance; on a GPU D at most 16384.
        weight: (D,).
        angles: cosines and sines (L, head_dim/2), float32, of each token; head_dim divides D.
            None: no rotation.
        in_place: x may be overwritten with the result, which then takes no memory. It is not
            where a derivative is wanted, or the last dimension is not contiguous.

    Returns:
        (B, L, D), dtype of x; contiguous, or x.

    Raises:
        ValueError: shapes other than these.
    """
    if x.ndim != 3 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x and weight must be (B, L, D) and (D,), got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    cos, sin = angles or (None, None)
    if cos is not None and (
        sin is None or cos.shape != sin.shape or cos.ndim != 2 or cos.shape[0] != x.shape[1]
        or x.shape[2] % (2 * cos.shape[1])
    ):  # fmt: skip
        raise ValueError(
            f"angles must be two ({x.shape[1]}, head_dim/2) with head_dim dividing {x.shape[2]}, "
            f"got {tuple(cos.shape)}"
        )
    _check_width(x)
    if _differentiates(x, weight):
        if _has_kernel_for_tangent(x, (), (weight,)):
            return norm_jvp.rms_norm(x, weight, eps, cos, sin)
        return reference.rms_norm(x, weight, eps, cos, sin)
    if in_place and x.stride(-1) == 1:
        _rms_norm_in_place(x, weight, eps, cos, sin)
        return x
    return _rms_norm(x, weight, eps, cos, sin)


@custom_op("turbodit::norm")
def _norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    format: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(x).norm(x, weight, bias, shift, scale, eps, dtype, format)


@custom_op("turbodit::add_norm")
def _add_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    format: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _implementation(x).add_norm(
        x, update, gate, weight, bias, shift, scale, eps, dtype, format
    )


@custom_op("turbodit::gated_add")
def _gated_add(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return _implementation(x).add(x, update, gate)


@custom_op("turbodit::rms_norm_in_place", mutates=("x",))
def _rms_norm_in_place(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> None:
    _implementation(x).rms_norm(x, weight, eps, cos, sin, out=x)


@custom_op("turbodit::rms_norm")
def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> torch.Tensor:
    return _implementation(x).rms_norm(x, weight, eps, cos, sin)


@_norm.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    format: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_output(x, dtype, format)


@_add_norm.register_fake
def _(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    format: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (x.new_empty(x.shape), *_fake_output(x, dtype, format))


@_gated_add.register_fake
def _(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape)


@_rms_norm_in_place.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> None:
    pass


@_rms_norm.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _implementation(x: torch.Tensor) -> ModuleType:
    """The reference also on GPUs where kernels do not run: the same result, and any model runs."""
    if x.is_cuda and not kernels_run(x.device):
        return reference
    return implementation(__name__, x)


def _fake_output(
    x: torch.Tensor, dtype: torch.dtype | None, format: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.new_empty(x.shape, dtype=dtype if format is None else DTYPES[format])
    scales = (0,) if format is None else (*x.shape[:-1], 1)
    return values, x.new_empty(scales, dtype=torch.float32)


def _output(out: torch.dtype | str) -> tuple[torch.dtype | None, str | None]:
    """dtype and format, one of which is None."""
    if isinstance(out, torch.dtype):
        return out, None
    if out not in ROW_FORMATS:
        raise ValueError(f"a norm quantises to {', '.join(ROW_FORMATS)}; got {out!r}")
    return None, out


def _differentiates(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient or a tangent is wanted."""
    return _trains(*tensors) or has_tangent(*tensors)


def _trains(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient is wanted."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _has_kernel_for_tangent(
    x: torch.Tensor,
    moving: tuple[torch.Tensor | None, ...],
    weights: tuple[torch.Tensor | None, ...] = (),
) -> bool:
    """Whether a kernel computes value and tangent: neither has a gradient then, and only x and
    what else is `moving` may have a tangent, not the weights."""
    return (
        norm_jvp.has_kernel(x) and not _trains(x, *moving, *weights) and not has_tangent(*weights)
    )


def _refuse_format(format: str | None) -> None:
    if format is not None:
        raise ValueError(
            f"quantisation to {format} has no gradient and no tangent: call it under "
            "torch.no_grad() and without tangents, or train the model before its linear layers "
            "are quantised"
        )


def _check(
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    if x.ndim != 3 or (update is not None and update.shape != x.shape):
        shapes = [tuple(t.shape) for t in (x, update) if t is not None]
        raise ValueError(f"x and its update must both be (B, L, D), got {shapes}")
    batch, length, dim = x.shape
    if (weight is None) != (bias is None) or (shift is None) != (scale is None):
        raise ValueError("weight and bias, and shift and scale, come together")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (dim,):
            raise ValueError(f"{name} must be ({dim},), got {tuple(vector.shape)}")
    for name, table in (("gate", gate), ("shift", shift), ("scale", scale)):
        if table is not None and (
            table.ndim != 3 or table.shape[::2] != (batch, dim) or length % table.shape[1]
        ):
            raise ValueError(
                f"{name} must be ({batch}, n, {dim}) with n dividing {length}, "
                f"got {tuple(table.shape)}"
            )
    _check_width(x)


def _check_width(x: torch.Tensor) -> None:
    if x.is_cuda and x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"on a GPU rows have at most {MAX_WIDTH} elements, got {x.shape[-1]}")
