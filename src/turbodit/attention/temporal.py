"""Heads whose blocks go over time.

Block-sparse attention sees blocks of neighbouring tokens. In Wan's order, frame by frame, a block
is a piece of a frame. Heads differ in what they look at: some at their own frame, some at their
own place in all frames (the spatial and temporal heads of Sparse VideoGen, arXiv:2502.01776). For
the latter tokens are better sorted place by place: a block is a few places over all frames.

Which heads these are is a setting of a back-end: a sequence of heads for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch


def check_temporal_heads(heads: Any, layers: int | None = None, count: int | None = None) -> None:
    """Raise a ValueError unless `heads` are lists of different heads, one for each of so many
    layers, of so many heads each; None: any number."""
    if not isinstance(heads, Sequence) or isinstance(heads, str):
        raise ValueError(f"temporal heads must be a list for each layer, got {heads!r}")
    if layers is not None and len(heads) != layers:
        raise ValueError(f"temporal heads are of {len(heads)} layers, but the model has {layers}")
    for layer, its in enumerate(heads):
        if not isinstance(its, Sequence) or not all(type(head) is int for head in its):
            raise ValueError(
                f"the temporal heads of layer {layer} must be a list of integers, got {its!r}"
            )
        if len(set(its)) < len(its) or any(head < 0 or head >= (count or 2**31) for head in its):
            expected = "0 or more" if count is None else f"from 0 to {count - 1}"
            raise ValueError(
                f"the temporal heads of layer {layer} must differ and be {expected}, got {its!r}"
            )


def by_place(x: torch.Tensor, heads: Sequence[int], frames: int) -> torch.Tensor:
    """x (B, L, H, D), whose tokens are sorted frame by frame: those of `heads` place by place.

    Args:
        frames: latent frames, of L / frames tokens each.
    """
    return _transposed(x, heads, frames)


def by_frame(x: torch.Tensor, heads: Sequence[int], frames: int) -> torch.Tensor:
    """Undoes `by_place`."""
    return _transposed(x, heads, x.shape[1] // frames)


def _transposed(x: torch.Tensor, heads: Sequence[int], rows: int) -> torch.Tensor:
    """The tokens of `heads` as a matrix of so many rows, column by column.

    Heads are told apart by slices: an index would be a tensor, on the right device.
    """
    parts = []
    for chosen, run in groupby(range(x.shape[2]), lambda head: head in heads):
        first, *others = run
        part = x[:, :, first : first + 1 + len(others)]
        if chosen:
            part = part.unflatten(1, (rows, -1)).transpose(1, 2).flatten(1, 2)
        parts.append(part)
    return torch.cat(parts, dim=2)
