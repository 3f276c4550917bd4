"""Rotary position embedding over three axes: time, height, width.

Each head's D channels are D/2 complex pairs (2i, 2i+1). Of the D/2 frequencies, height
and width get D//6 each and time the rest; the frequency i of an axis with n of them is
10000^(-i/n) (RoFormer, arXiv:2104.09864, one rotation per axis as in Wan, arXiv:2503.20314).
`kernels.norm.rms_norm` turns queries and keys by these angles.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

THETA = 10000.0


@lru_cache(maxsize=16)
def rope_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every token's angles, float32, each (T*H*W, head_dim/2).

    Args:
        grid: number of tokens along time, height and width.
    """
    # A cached inference tensor could not be saved for a later backward pass.
    with torch.inference_mode(False), _outside_transforms():
        per_side = head_dim // 6
        counts = (head_dim // 2 - 2 * per_side, per_side, per_side)
        angles = [_axis_angles(n, count) for n, count in zip(grid, counts, strict=True)]
        t, h, w = grid
        table = torch.cat(
            [
                angles[0][:, None, None, :].expand(t, h, w, -1),
                angles[1][None, :, None, :].expand(t, h, w, -1),
                angles[2][None, None, :, :].expand(t, h, w, -1),
            ],
            dim=-1,
        )
        table = table.flatten(0, 2)
        return table.cos().float().to(device), table.sin().float().to(device)


def _outside_transforms() -> AbstractContextManager[None]:
    """A cached tensor of torch.func has no storage once its transform has ended.

    A compiler, which knows no such guard, caches nothing.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch._C._DisableFuncTorch()


def _axis_angles(positions: int, frequencies: int) -> torch.Tensor:
    exponent = torch.arange(frequencies, dtype=torch.float64) / frequencies
    return torch.outer(torch.arange(positions, dtype=torch.float64), THETA**-exponent)
