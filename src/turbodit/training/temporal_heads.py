"""Which heads of a model look along time: those of which sparse attention then leaves out less.

Without any training, of each head's dense attention, the squared error of what is left at a top-k
ratio is compared, with its tokens frame by frame and place by place (`attention.temporal`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from turbodit.attention import SparseLinearAttention
from turbodit.attention.dense import sdpa
from turbodit.attention.temporal import by_frame, by_place
from turbodit.model.wan import Block, WanModel


@torch.no_grad()
def choose_temporal_heads(
    model: WanModel, settings: Mapping[str, Any], ask: Callable[[], object]
) -> list[list[int]]:
    """The temporal heads of each layer.

    Args:
        model: with dense attention.
        settings: of SLA.
        ask: calls the model as it will be used.
    """
    shape = model.config
    # Untrained, its linear branch adds nothing.
    sparse = SparseLinearAttention(shape.head_dim, **settings).to(
        model.patch_embedding.weight.device
    )
    errors = torch.zeros(shape.num_layers, 2, shape.num_heads)
    with ExitStack() as hooks:
        for block, its_errors in zip(model.blocks, errors, strict=True):
            assert isinstance(block, Block)
            hook = _measure(sparse, its_errors)
            op = block.self_attn.attn_op
            hooks.enter_context(op.register_forward_pre_hook(hook, with_kwargs=True))
        ask()
    by_frames, by_places = errors.unbind(1)
    return [layer.nonzero().flatten().tolist() for layer in by_places < by_frames]


def _measure(sparse: SparseLinearAttention, errors: torch.Tensor) -> Any:
    """A hook that adds to errors (2, H), frame by frame and place by place."""

    def hook(op: torch.nn.Module, qkv: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        q, k, v = qkv
        dense = sdpa(q, k, v)
        frames, all_heads = kwargs["frames"], range(q.shape[2])
        placed = (by_place(x, all_heads, frames) for x in (q, k, v))
        found = sparse(q, k, v), by_frame(sparse(*placed), all_heads, frames)
        for error, out in zip(errors, found, strict=True):
            error += (out - dense).float().square().sum((0, 1, 3)).cpu()

    return hook
