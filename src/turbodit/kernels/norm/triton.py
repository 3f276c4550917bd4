"""Norms on a GPU; `reference` says what is computed.

A row stays in registers from its load to its store: each tensor is read or written once, and
what a row's mean, variance and scale need never leaves the chip. The float32 vectors that many
rows share (weights, modulation) are as long as a row, and three of them have twice its bytes: a
program loads them once, into registers, and takes ROWS rows.

A row is cut into pieces, so that a width need not be a power of two and little is masked: 5120
is five pieces of 1024. Columns past the end are zeros, and are left out of the variance.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from turbodit.kernels.quantized_linear import DTYPES
from turbodit.kernels.quantized_linear.triton import (
    LARGEST_FP8,
    LARGEST_INT8,
    inverse_of,
    magnitude_of,
    scale_of,
    values_of,
)

ROWS = 4
# Elements that a thread loads at a time, and how many times it may for a row.
VECTOR, PIECES = 8, 5
MAX_WARPS = 16
# Elements of a row that a thread of the RMSNorm takes, and has in registers alone.
RMS_ELEMENTS = 16

# One compiled kernel for all of them: nothing is gained from a length that 16 divides.
_SIZES = ["length", "run"]


@triton.jit
def load_row(pointer, D: tl.constexpr, WIDTH: tl.constexpr, POLICY: tl.constexpr):
    """D numbers in pieces of WIDTH, float32, zeros past the end."""
    pieces = ()
    for start in tl.static_range(0, D, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        if start + WIDTH <= D:
            piece = tl.load(pointer + columns, eviction_policy=POLICY)
        else:
            piece = tl.load(pointer + columns, columns < D, other=0.0, eviction_policy=POLICY)
        pieces += (piece.to(tl.float32),)  # type: ignore[assignment]
    return pieces


@triton.jit
def store_piece(pointer, piece, start: tl.constexpr, D: tl.constexpr):
    """The piece that begins at column `start`."""
    WIDTH: tl.constexpr = piece.shape[0]
    columns = start + tl.arange(0, WIDTH)
    if start + WIDTH <= D:
        tl.store(pointer + columns, piece)
    else:
        tl.store(pointer + columns, piece, columns < D)


@triton.jit
def run_and_row(length, run, ROWS: tl.constexpr):
    """Of this program: its sample, which run of that, and which row of the run it begins with."""
    parts = tl.cdiv(run, ROWS)
    of_all, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    runs = length // run
    return (of_all // runs).to(tl.int64), of_all % runs, part * ROWS


@triton.jit(do_not_specialize=_SIZES)
def _norm_kernel(
    x_ptr, update_ptr, gate_ptr, y_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr,
    out_ptr, out_scale_ptr, length, run, gate_b, gate_n, stride_b, stride_n, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a run: `add_norm`; without update_ptr `norm`, without out_ptr `add`."""
    PIECES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    batch, n, first = run_and_row(length, run, ROWS)
    if gate_ptr is not None:
        gate = load_row(gate_ptr + batch * gate_b + n * gate_n, D, WIDTH, "")
    if weight_ptr is not None:
        weight, bias = load_row(weight_ptr, D, WIDTH, ""), load_row(bias_ptr, D, WIDTH, "")
    if shift_ptr is not None:
        shift = load_row(shift_ptr + batch * stride_b + n * stride_n, D, WIDTH, "")
        scale = load_row(scale_ptr + batch * stride_b + n * stride_n, D, WIDTH, "")
    begin = batch * length + n * run
    for row in range(begin + first, begin + tl.minimum(first + ROWS, run)):
        x = load_row(x_ptr + row * D, D, WIDTH, "evict_first")
        if update_ptr is not None:
            update = load_row(update_ptr + row * D, D, WIDTH, "evict_first")
            sums = ()
            for i in tl.static_range(PIECES):
                change = update[i]
                if gate_ptr is not None:
                    change = change * gate[i]
                y = (x[i] + change).to(y_ptr.dtype.element_ty)
                store_piece(y_ptr + row * D, y, i * WIDTH, D)
                sums += (y.to(tl.float32),)  # type: ignore[assignment]
            x = sums
        if out_ptr is not None:
            total = x[0]
            for i in tl.static_range(1, PIECES):
                total += x[i]
            mean = tl.sum(total, axis=0) / D
            squares = tl.zeros((WIDTH,), tl.float32)
            centred = ()
            for i in tl.static_range(PIECES):
                difference = x[i] - mean
                if (i + 1) * WIDTH > D:
                    difference = tl.where(i * WIDTH + tl.arange(0, WIDTH) < D, difference, 0.0)
                squares += difference * difference
                centred += (difference,)  # type: ignore[assignment]
            inverse_std = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
            largest = tl.zeros((WIDTH,), tl.int32)
            result = ()
            for i in tl.static_range(PIECES):
                h = centred[i] * inverse_std
                if weight_ptr is not None:
                    h = h * weight[i] + bias[i]
                if shift_ptr is not None:
                    h = h * (1 + scale[i]) + shift[i]
                largest = tl.maximum(largest, magnitude_of(h))
                result += (h,)  # type: ignore[assignment]
            if out_scale_ptr is not None:
                LARGEST: tl.constexpr = LARGEST_FP8 if FP8 else LARGEST_INT8
                out_scale = scale_of(tl.max(largest, axis=0), LARGEST)
                tl.store(out_scale_ptr + row, out_scale)
                inverse = inverse_of(out_scale)
                for i in tl.static_range(PIECES):
                    store_piece(out_ptr + row * D, values_of(result[i], inverse, FP8), i * WIDTH, D)
            else:
                for i in tl.static_range(PIECES):
                    h = result[i].to(out_ptr.dtype.element_ty)
                    store_piece(out_ptr + row * D, h, i * WIDTH, D)


@triton.jit(do_not_specialize=["length"])
def _rms_norm_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, length, stride_b, stride_l, out_b, out_l, eps,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row; HALF is half a head's width."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // length, row % length
    columns = tl.arange(0, WIDTH)
    inside = columns < D
    x_ptr += batch * stride_b + token * stride_l
    out_ptr += batch * out_b + token * out_l
    x = tl.load(x_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_first")
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    x *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        even, odd = tl.split(tl.reshape(x, (WIDTH // 2, 2)))
        pair = token * HALF + tl.arange(0, WIDTH // 2) % HALF
        cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (WIDTH,))
    tl.store(out_ptr + columns, x.to(out_ptr.dtype.element_ty), mask=inside)


def add(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """As `reference.add`."""
    y = _like(x)
    _launch(x, update, gate, y, None, None, None, None, None, None, 0.0, None)
    return y


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    format: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.norm`."""
    out, out_scale = _outputs(x, dtype, format)
    _launch(x, None, None, None, weight, bias, shift, scale, out, out_scale, eps, format)
    return out, out_scale


def add_norm(
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
    """As `reference.add_norm`."""
    y = _like(x)
    out, out_scale = _outputs(x, dtype, format)
    _launch(x, update, gate, y, weight, bias, shift, scale, out, out_scale, eps, format)
    return y, out, out_scale


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.rms_norm`, into `out` (which may be x) where that is given."""
    batch, length, dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = _like(x) if out is None else out
    width = triton.next_power_of_2(dim)
    _rms_norm_kernel[(batch * length,)](
        x, weight.contiguous(), _contiguous(cos), _contiguous(sin), out, length,
        *x.stride()[:2], *out.stride()[:2], eps,
        D=dim, HALF=1 if cos is None else cos.shape[-1], WIDTH=width,
        num_warps=_rms_warps(width),
    )  # fmt: skip
    return out


def _launch(
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    y: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    eps: float,
    format: str | None,
) -> None:
    batch, length, dim = x.shape
    # A run is one in which no table changes.
    runs = math.lcm(*(table.shape[1] for table in (gate, shift) if table is not None))
    gate, shift, scale = (table_of_runs(table, runs) for table in (gate, shift, scale))
    if shift is not None and scale is not None and shift.stride() != scale.stride():
        shift, scale = shift.contiguous(), scale.contiguous()
    warps = _warps(dim)
    _norm_kernel[programs(batch, length, runs, ROWS)](
        x.contiguous(), _contiguous(update), gate, y, _contiguous(weight), _contiguous(bias),
        shift, scale, out, None if format is None else out_scale, length, length // runs,
        *((0, 0) if gate is None else gate.stride()[:2]),
        *((0, 0) if shift is None else shift.stride()[:2]),
        eps, D=dim, WIDTH=_piece(warps), ROWS=ROWS, FP8=format == "fp8-channel", num_warps=warps,
    )  # fmt: skip


def programs(batch: int, length: int, runs: int, rows: int) -> tuple[int]:
    """A program for every `rows` rows of a run, on a grid's first axis: the others end at 65,535,
    which runs of a token each reach."""
    return (batch * runs * triton.cdiv(length // runs, rows),)


def table_of_runs(table: torch.Tensor | None, runs: int) -> torch.Tensor | None:
    """A (B, n, D) table with a row for each run, and a contiguous last dimension."""
    if table is None:
        return None
    if table.shape[1] != runs:
        return table.repeat_interleave(runs // table.shape[1], dim=1)
    return table if table.stride(-1) == 1 else table.contiguous()


def _outputs(
    x: torch.Tensor, dtype: torch.dtype | None, format: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    kind = dtype if format is None else DTYPES[format]
    scales = (0,) if format is None else (*x.shape[:-1], 1)
    return (
        torch.empty(x.shape, dtype=kind, device=x.device),
        torch.empty(scales, dtype=torch.float32, device=x.device),
    )


def _warps(dim: int) -> int:
    """Warps that share a row: as few as have it in so many pieces."""
    warps = 1
    while warps < MAX_WARPS and dim > _piece(warps) * PIECES:
        warps *= 2
    return warps


def _piece(warps: int) -> int:
    return 32 * warps * VECTOR


def _rms_warps(width: int) -> int:
    return min(max(width // (32 * RMS_ELEMENTS), 1), MAX_WARPS)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
