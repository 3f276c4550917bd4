"""Head dimensions that the kernels have no tiles for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turbodit.kernels import HEAD_DIMS


def pad_head_dim(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each tensor (..., D) with zeros up to the next of `HEAD_DIMS`; itself where D is one.

    Zeros change neither scores nor the first D channels of the output; the scale of the scores
    has to stay 1/sqrt(D).

    Raises:
        ValueError: D is larger than all of them.
    """
    dim = tensors[0].shape[-1]
    wider = next((native - dim for native in HEAD_DIMS if native >= dim), None)
    if wider is None:
        raise ValueError(f"head dimensions up to {HEAD_DIMS[-1]} are supported, got {dim}")
    return tuple(F.pad(x, (0, wider)) for x in tensors) if wider else tensors
