"""Norms and their tangents on a GPU; `reference` says what is computed.

As `kernels.norm.triton`: a row stays in registers from its load to its store, in pieces, and the
vectors that rows share are loaded once for ROWS of them. With tangents there is twice of
everything: four vectors where Wan has a norm with a gate or a modulation, and four rows. So more
threads share a row, and each has at most PIECES * VECTOR elements of it: 12 of 1536, 3072 and 5120
columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from turbodit.kernels.norm.triton import (
    load_row,
    programs,
    run_and_row,
    store_piece,
    table_of_runs,
)

ROWS = 4
# Elements that a thread loads at a time, and how many times it may for a row.
VECTOR, PIECES = 4, 3
MAX_WARPS = 16
# Elements of a row that a thread of the RMSNorm takes.
RMS_ELEMENTS = 16

_SIZES = ["length", "run"]


@triton.jit(do_not_specialize=_SIZES)
def _add_norm_kernel(
    x_ptr, dx_ptr, update_ptr, dupdate_ptr, gate_ptr, dgate_ptr, y_ptr, dy_ptr,
    weight_ptr, bias_ptr, shift_ptr, dshift_ptr, scale_ptr, dscale_ptr, out_ptr, dout_ptr,
    length, run, gate_b, gate_n, stride_b, stride_n, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a run; nothing is added without update_ptr, no norm taken without out_ptr."""
    PIECES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    batch, n, first = run_and_row(length, run, ROWS)
    if gate_ptr is not None:
        place = batch * gate_b + n * gate_n
        gate = load_row(gate_ptr + place, D, WIDTH, "")
        dgate = load_row(dgate_ptr + place, D, WIDTH, "")
    if weight_ptr is not None:
        weight, bias = load_row(weight_ptr, D, WIDTH, ""), load_row(bias_ptr, D, WIDTH, "")
    if shift_ptr is not None:
        place = batch * stride_b + n * stride_n
        shift = load_row(shift_ptr + place, D, WIDTH, "")
        dshift = load_row(dshift_ptr + place, D, WIDTH, "")
        scale = load_row(scale_ptr + place, D, WIDTH, "")
        dscale = load_row(dscale_ptr + place, D, WIDTH, "")
    begin = batch * length + n * run
    for row in range(begin + first, begin + tl.minimum(first + ROWS, run)):
        x = load_row(x_ptr + row * D, D, WIDTH, "evict_first")
        dx = load_row(dx_ptr + row * D, D, WIDTH, "evict_first")
        if update_ptr is not None:
            update = load_row(update_ptr + row * D, D, WIDTH, "evict_first")
            dupdate = load_row(dupdate_ptr + row * D, D, WIDTH, "evict_first")
            sums = ()
            dsums = ()
            for i in tl.static_range(PIECES):
                change, dchange = update[i], dupdate[i]
                if gate_ptr is not None:
                    dchange = change * dgate[i] + dchange * gate[i]
                    change = change * gate[i]
                y = (x[i] + change).to(y_ptr.dtype.element_ty)
                dy = (dx[i] + dchange).to(dy_ptr.dtype.element_ty)
                store_piece(y_ptr + row * D, y, i * WIDTH, D)
                store_piece(dy_ptr + row * D, dy, i * WIDTH, D)
                sums += (y.to(tl.float32),)  # type: ignore[assignment]
                dsums += (dy.to(tl.float32),)  # type: ignore[assignment]
            x, dx = sums, dsums
        if out_ptr is not None:
            total, dtotal = x[0], dx[0]
            for i in tl.static_range(1, PIECES):
                total += x[i]
                dtotal += dx[i]
            mean, dmean = tl.sum(total, axis=0) / D, tl.sum(dtotal, axis=0) / D
            squares = tl.zeros((WIDTH,), tl.float32)
            products = tl.zeros((WIDTH,), tl.float32)
            centred = ()
            dcentred = ()
            for i in tl.static_range(PIECES):
                c, dc = x[i] - mean, dx[i] - dmean
                if (i + 1) * WIDTH > D:
                    # dc need not be zero there: it only meets c, and is not stored.
                    c = tl.where(i * WIDTH + tl.arange(0, WIDTH) < D, c, 0.0)
                squares += c * c
                products += c * dc
                centred += (c,)  # type: ignore[assignment]
                dcentred += (dc,)  # type: ignore[assignment]
            inverse_std = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
            along = tl.sum(products, axis=0) / D * inverse_std
            for i in tl.static_range(PIECES):
                h = centred[i] * inverse_std
                dh = (dcentred[i] - h * along) * inverse_std
                if weight_ptr is not None:
                    h = h * weight[i] + bias[i]
                    dh = dh * weight[i]
                if shift_ptr is not None:
                    dh = dh * (1 + scale[i]) + h * dscale[i] + dshift[i]
                    h = h * (1 + scale[i]) + shift[i]
                store_piece(out_ptr + row * D, h.to(out_ptr.dtype.element_ty), i * WIDTH, D)
                store_piece(dout_ptr + row * D, dh.to(dout_ptr.dtype.element_ty), i * WIDTH, D)


@triton.jit
def _rotate(x, cos, sin, WIDTH: tl.constexpr):
    """Each pair of neighbours by its angle."""
    even, odd = tl.split(tl.reshape(x, (WIDTH // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (WIDTH,))


@triton.jit(do_not_specialize=["length"])
def _rms_norm_kernel(
    x_ptr, dx_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, dout_ptr, length,
    stride_b, stride_l, dx_b, dx_l, eps,
    D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row; HALF is half a head's width."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // length, row % length
    columns = tl.arange(0, WIDTH)
    inside = columns < D
    x_ptr += batch * stride_b + token * stride_l
    dx_ptr += batch * dx_b + token * dx_l
    x = tl.load(x_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_first")
    dx = tl.load(dx_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_first")
    x, dx = x.to(tl.float32), dx.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    along = tl.sum(x * dx, axis=0) / D * inverse
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x *= inverse
    dx = (dx - x * along) * inverse * weight
    x *= weight
    if cos_ptr is not None:
        pair = token * HALF + tl.arange(0, WIDTH // 2) % HALF
        cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
        x, dx = _rotate(x, cos, sin, WIDTH), _rotate(dx, cos, sin, WIDTH)
    tl.store(out_ptr + row * D + columns, x.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(dout_ptr + row * D + columns, dx.to(dout_ptr.dtype.element_ty), mask=inside)


def add_norm(
    x: torch.Tensor,
    x_tangent: torch.Tensor,
    update: torch.Tensor | None,
    update_tangent: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_tangent: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    shift_tangent: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_tangent: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    """As `reference.add_norm`."""
    batch, length, dim = x.shape
    sums = _pair(x, None if update is None else x.dtype)
    outs = _pair(x, dtype)
    # A run is one in which no table changes.
    runs = math.lcm(*(table.shape[1] for table in (gate, shift) if table is not None))
    gates = _tables(runs, gate, gate_tangent)
    modulation = _tables(runs, shift, shift_tangent, scale, scale_tangent)
    warps = _warps(dim)
    rows = [_contiguous(t) for t in (x, x_tangent, update, update_tangent)]
    _add_norm_kernel[programs(batch, length, runs, ROWS)](
        *rows, *gates, *sums, _contiguous(weight), _contiguous(bias), *modulation, *outs,
        length, length // runs, *_strides(gates[0]), *_strides(modulation[0]), eps,
        D=dim, WIDTH=_piece(warps), ROWS=ROWS, num_warps=warps,
    )  # fmt: skip
    return [t for t in (*sums, *outs) if t is not None]


def rms_norm(
    x: torch.Tensor,
    x_tangent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.rms_norm`."""
    batch, length, dim = x.shape
    x, x_tangent = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, x_tangent))
    out, out_tangent = _empty(x, x.dtype), _empty(x, x.dtype)
    width = triton.next_power_of_2(dim)
    _rms_norm_kernel[(batch * length,)](
        x, x_tangent, weight.contiguous(), _contiguous(cos), _contiguous(sin), out, out_tangent,
        length, *x.stride()[:2], *x_tangent.stride()[:2], eps,
        D=dim, HALF=1 if cos is None else cos.shape[-1], WIDTH=width,
        num_warps=_rms_warps(width),
    )  # fmt: skip
    return out, out_tangent


def _tables(runs: int, *tables: torch.Tensor | None) -> list[Any]:
    """(B, n, D) tables with a row for each run, and strides that are the same for all."""
    tables = tuple(table_of_runs(table, runs) for table in tables)
    if len({_strides(table) for table in tables}) > 1:
        return [_contiguous(table) for table in tables]
    return list(tables)


def _strides(table: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if table is None else (table.stride(0), table.stride(1))


def _pair(x: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor | None, ...]:
    """Where value and tangent of a result go; None, None: it is not asked for."""
    return (None, None) if dtype is None else (_empty(x, dtype), _empty(x, dtype))


def _empty(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


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


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
