"""The DiT's glue (`kernels.norm`) with its tangent, value and tangent in one pass over the tokens.

By PyTorch's own rules each of these is dozens of operations, value and tangent, with intermediate
results in float32. `reference` holds the formulas.

Results have no gradient: PyTorch raises RuntimeError in a backward pass through them. Weights
have no tangent.

What may have a tangent is a dual tensor of forward-mode differentiation; a tangent that is missing
is zeros. Arguments are those of `kernels.norm`, which checks them and calls this.

Shapes: B batch, L tokens, D width, n runs of L/n tokens that share a modulation.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from turbodit.kernels import custom_op, implementation, kernels_run
from turbodit.kernels.forward_ad import unpack
from turbodit.kernels.norm_jvp import reference

__all__ = ["add_norm", "gated_add", "has_kernel", "norm", "rms_norm"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether kernels take tensors like x."""
    return x.is_cuda and x.dtype in DTYPES and kernels_run(x.device)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """LayerNorm of x and modulation -> (B, L, D) in `dtype`, dual."""
    h, h_tangent = _add_norm_jvp(
        *unpack(x), None, None, None, None, weight, bias, *_unpack(shift), *_unpack(scale), eps,
        dtype,
    )  # fmt: skip
    return forward_ad.make_dual(h, h_tangent)


def add_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x + gate * update in x's dtype, and `norm` of y; both dual."""
    y, y_tangent, h, h_tangent = _add_norm_jvp(
        *unpack(x), *unpack(update), *_unpack(gate), weight, bias, *_unpack(shift),
        *_unpack(scale), eps, dtype,
    )  # fmt: skip
    return forward_ad.make_dual(y, y_tangent), forward_ad.make_dual(h, h_tangent)


def gated_add(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """x + gate * update in x's dtype, dual."""
    no_norm = [None] * 6
    y, y_tangent = _add_norm_jvp(*unpack(x), *unpack(update), *_unpack(gate), *no_norm, 0.0, None)
    return forward_ad.make_dual(y, y_tangent)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> torch.Tensor:
    """RMSNorm of x, rotated where there are angles -> (B, L, D) in x's dtype, dual."""
    return forward_ad.make_dual(*_rms_norm_jvp(*unpack(x), weight, eps, cos, sin))


@custom_op("turbodit::add_norm_jvp")
def _add_norm_jvp(
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
    """y and its tangent if there is an update, and h and its tangent if there is a dtype."""
    return _implementation(x).add_norm(
        x, x_tangent, update, update_tangent, gate, gate_tangent, weight, bias, shift,
        shift_tangent, scale, scale_tangent, eps, dtype,
    )  # fmt: skip


@custom_op("turbodit::rms_norm_jvp")
def _rms_norm_jvp(
    x: torch.Tensor,
    x_tangent: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(x).rms_norm(x, x_tangent, weight, eps, cos, sin)


@_add_norm_jvp.register_fake
def _(x: torch.Tensor, x_tangent: torch.Tensor, *others: Any) -> list[torch.Tensor]:
    update, dtype = others[0], others[-1]
    dtypes = ([x.dtype] * 2 if update is not None else []) + [dtype] * 2 * (dtype is not None)
    return [x.new_empty(x.shape, dtype=kind) for kind in dtypes]


@_rms_norm_jvp.register_fake
def _(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _implementation(x: torch.Tensor) -> ModuleType:
    return implementation(__name__, x) if has_kernel(x) else reference


def _unpack(x: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if x is None else unpack(x)
