"""Forward-mode differentiation (`torch.func.jvp`, `torch.autograd.forward_ad`) and operators that
have no rule for it."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def has_tangent(*tensors: torch.Tensor | None) -> bool:
    """Whether a tangent is wanted of what is computed from these.

    PyTorch differentiates its own operators; ours take another way then: a reference in plain
    PyTorch, or a kernel that computes the tangent itself.
    """
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
