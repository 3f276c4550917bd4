"""Ulysses context parallelism (arXiv:2309.14509) as hooks on a `WanModel`.

Every process of a context group gets the same inputs. The first block splits the tokens, the
head's output is gathered, and between them each process has L/C tokens. Around self attention
an all-to-all turns a share of the tokens with all heads into all tokens with a share of the
heads, so any back-end works unchanged. Cross attention needs no exchange.

Each exchange is linear: its backward pass is its exact adjoint, its tangent the same exchange.
Gradients of the model's inputs are each process's own share: their sum over the group belongs
to the sum of the group's losses.

Shapes: B batch; L tokens; H heads; D width or head dimension; C processes of a context group;
n runs of tokens that share a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from turbodit.kernels.norm import Angles
from turbodit.model.wan import Block, WanModel


def split_tokens(model: WanModel, group: dist.ProcessGroup) -> None:
    """Make `model` split its tokens over the processes of `group`, in place.

    A forward pass then raises ValueError where the number of tokens is not a multiple of the
    group's size: keys that only pad would have to be masked in every back-end.

    Raises:
        ValueError: heads that do not divide over the group.
    """
    count, heads = group.size(), model.config.num_heads
    if heads % count:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{heads} attention heads do not divide over {count} context processes; "
            f"supported: {fitting}"
        )
    split = _Split(group)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.register_forward_pre_hook(split.first_block if index == 0 else split.block)
        op, first = block.self_attn.attn_op, group.rank() * heads // count
        own = range(first, first + heads // count)  # heads of this process, which it counts from 0
        op.temporal_heads = tuple(head - first for head in op.temporal_heads if head in own)
        op.register_forward_pre_hook(_to_heads(group))
        op.register_forward_hook(_to_tokens(group))
    model.head.register_forward_pre_hook(split.head)
    model.head.register_forward_hook(_gather(group))


class _Split:
    """Pre-hooks that leave a module this process's share of what it gets for all tokens."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.count = group.rank(), group.size()

    def first_block(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        length = x.shape[1]
        if length % self.count:
            raise ValueError(
                f"{length} tokens do not divide over {self.count} context processes; supported: "
                f"sizes and lengths of videos that make a multiple of {self.count} tokens"
            )
        share = x.chunk(self.count, dim=1)[self.rank]
        return self.block(block, (share.contiguous(), *others))

    def block(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """x is split already, as it comes from the block before."""
        x, time, angles, *others = args
        return x, self._times(time, x.shape[1]), self._angles(angles), *others

    def head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, time = args
        return x, self._times(time, x.shape[1])

    def _angles(self, angles: Angles) -> Angles:
        cos, sin = (table.chunk(self.count)[self.rank] for table in angles)
        return cos, sin

    def _times(self, time: torch.Tensor, length: int) -> torch.Tensor:
        """The rows of `time` (B, n, ...) for this process's `length` tokens.

        A share may end within a run of L/n tokens: runs are cut to lengths that divide both.
        """
        n = time.shape[1]
        if n == 1:
            return time
        run = self.count * length // n
        piece = math.gcd(run, length)
        starts = torch.arange(0, length, piece, device=time.device) + self.rank * length
        return time.index_select(1, starts // run)


def _to_heads(group: dist.ProcessGroup) -> Any:
    def hook(
        attend: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v (B, L/C, H, D) -> (B, L, H/C, D), in one exchange."""
        send = torch.stack([x.unflatten(2, (group.size(), -1)).movedim(2, 0) for x in args], dim=1)
        received = _AllToAll.apply(send, group)  # (C, 3, B, L/C, H/C, D)
        q, k, v = received.permute(1, 2, 0, 3, 4, 5).flatten(2, 3).unbind()
        return q, k, v

    return hook


def _to_tokens(group: dist.ProcessGroup) -> Any:
    def hook(attend: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        """(B, L, H/C, D) -> (B, L/C, H, D)"""
        send = out.unflatten(1, (group.size(), -1)).movedim(1, 0)
        received = _AllToAll.apply(send, group)  # (C, B, L/C, H/C, D)
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)

    return hook


def _gather(group: dist.ProcessGroup) -> Any:
    def hook(head: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        """(B, L/C, channels) -> (B, L, channels)"""
        send = out.expand(group.size(), *out.shape)  # small, and its adjoint comes for free
        received = _AllToAll.apply(send, group)  # (C, B, L/C, channels)
        return received.movedim(0, 1).flatten(1, 2)

    return hook


class _AllToAll(torch.autograd.Function):
    """x (C, ...): part i goes to process i; what comes back has its part of process i at i.

    As a matrix over all processes it is symmetric, so it is its own adjoint.
    """

    @staticmethod
    def forward(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _exchange(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, x_tangent: torch.Tensor, _: None) -> torch.Tensor:
        return _AllToAll.apply(x_tangent, ctx.group)


def _exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out
