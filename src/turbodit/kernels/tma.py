"""Tiles of (B, L, H, D) tensors that kernels read through TMA, where the GPU has it."""

from __future__ import annotations

from typing import Any

import torch

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton 3.3
    TensorDescriptor = None


def is_large(x: torch.Tensor) -> bool:
    """Whether x is on Hopper or data-centre Blackwell, with TMA and much shared memory."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def can_describe(*tensors: torch.Tensor | None) -> bool:
    """Whether tiles of the tensors (B, L, H, D) can be read by TMA; None stands for no tensor."""
    there = [x for x in tensors if x is not None]
    return (
        TensorDescriptor is not None
        and is_large(there[0])
        and all(x.data_ptr() % 16 == 0 for x in there)
        and all(stride > 0 and stride % 8 == 0 for stride in strides(*there))
    )


def tiles(rows: int, tma: bool, *tensors: torch.Tensor | None) -> list[Any]:
    """What kernels take: descriptors of (B, H, L, D) for tiles of `rows`, or the tensors."""
    if not tma:
        return list(tensors)
    return [
        x
        if x is None
        else TensorDescriptor.from_tensor(x.transpose(1, 2), [1, 1, rows, x.shape[-1]])
        for x in tensors
    ]


def strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """Of batch, length and heads, for each of the tensors (B, L, H, D); zeros for None."""
    return tuple(n for x in tensors for n in ((0, 0, 0) if x is None else x.stride()[:3]))
