"""Blocks that torch.compile fuses, where they are trained.

With a gradient the norms, modulation and rotation run as plain PyTorch, an operation at a time,
which costs more than the matrix products between them. Without one our own kernels run, and
with a tangent nothing may be compiled: both stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from turbodit.distributed import Policy, checkpoint_blocks
from turbodit.kernels.forward_ad import has_tangent
from turbodit.model.wan import WanModel


def prepare_blocks(model: WanModel, policy: Policy, *, compiled: bool) -> None:
    """Make the blocks compute again what `policy` says, and compile them if wanted; in place.

    Whole blocks are computed again by their compiled code. Selective checkpointing has to be
    compiled with the block: compiled code reuses buffers, and would write over what is kept from
    within it.
    """
    if compiled and policy == "block":
        compile_blocks(model)
    checkpoint_blocks(model, policy)
    if compiled and policy != "block":
        compile_blocks(model)


def compile_blocks(model: WanModel) -> None:
    """Compile the blocks' passes with a gradient, in place; names do not change."""
    for block in model.blocks:
        eager = block.forward
        block.forward = partial(_run, eager, torch.compile(eager, dynamic=False))


def _run(
    eager: Callable[..., torch.Tensor],
    compiled: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *others: Any,
) -> torch.Tensor:
    if torch.is_grad_enabled() and not has_tangent(x):
        return compiled(x, *others)
    return eager(x, *others)
