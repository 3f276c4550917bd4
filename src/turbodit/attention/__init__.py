"""Attention: one call over (B, L, H, D) tensors, and the table of back-ends behind it.

A model asks for a back-end by name when it is built and keeps the function it gets:
nothing is chosen at import time, from the environment, or silently in place of another.

Shapes: B batch, Lq/Lk query/key length, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from turbodit.attention import dense

AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        run: (q (B,Lq,H,D), k (B,Lk,H,D), v (B,Lk,H,D)) -> (B,Lq,H,D), non-causal,
            scaled by 1/sqrt(D).
        missing: what keeps it from running on a device, or None if it runs.
        description: one line for `turbodit doctor`.
    """

    run: AttentionFunction
    missing: Callable[[torch.device], str | None]
    description: str


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(
        run=dense.sdpa,
        missing=lambda device: None,
        description="PyTorch's scaled_dot_product_attention (cuDNN, flash, efficient or math)",
    ),
}


def available(name: str, device: torch.device | str) -> tuple[bool, str]:
    """(True, description) if back-end `name` runs on `device`, else (False, what is missing)."""
    backend = _lookup(name)
    reason = backend.missing(torch.device(device))
    return (reason is None, reason or backend.description)


def attention_function(name: str) -> AttentionFunction:
    """The function of back-end `name`.

    Raises:
        ValueError: no back-end has that name.
    """
    return _lookup(name).run


def _lookup(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"unknown attention back-end {name!r}; supported: {', '.join(BACKENDS)}")
    return BACKENDS[name]
