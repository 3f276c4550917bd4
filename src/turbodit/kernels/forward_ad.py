"""Forward-mode differentiation (`torch.func.jvp`, `torch.autograd.forward_ad`): operators that
have no rule for it, and a linear map that has a better one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad


def has_tangent(*tensors: torch.Tensor | None) -> bool:
    """Whether a tangent is wanted of what is computed from these.

    PyTorch differentiates its own operators; ours take another way then: a reference in plain
    PyTorch, or a kernel that computes the tangent itself.
    """
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def unpack(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor and its tangent, which is zeros if it has none."""
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear`, its tangent by one product.

    PyTorch's own rule makes two (torch 2.13): it multiplies x by a tangent of the weight even where
    there is none, by zeros, and adds a tangent of the bias in two more passes.
    """
    if not has_tangent(x) or has_tangent(weight, bias):
        return F.linear(x, weight, bias)
    primal, tangent = forward_ad.unpack_dual(x)
    return forward_ad.make_dual(F.linear(primal, weight, bias), F.linear(tangent, weight))
